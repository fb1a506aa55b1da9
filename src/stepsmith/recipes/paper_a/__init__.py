""" "Transferring Learned Optimizers" (Daduryan): its figures, its transfers, and the price."""

from stepsmith.recipes.paper_a import (
    figures,
    general,
    language,
    preprocessing,
    price,
    techniques,
)

PARTS = (figures, price, language, general, preprocessing, techniques)
RECIPES = tuple(recipe for part in PARTS for recipe in part.RECIPES)
