"""The papers' figures and tables as programs."""

from stepsmith.names import unknown
from stepsmith.recipes import (
    full_space,
    general,
    language,
    paper_a,
    paper_b,
    preprocessing,
    price,
    principal,
    techniques,
)
from stepsmith.recipes.study import FULL, QUICK, SCALES, Recipe, Study, core_hours, run_recipe

PARTS = (
    paper_a, price, language, general, preprocessing, techniques, paper_b, principal, full_space,
)  # fmt: skip

RECIPES: dict[str, Recipe] = {recipe.name: recipe for part in PARTS for recipe in part.RECIPES}


def recipe(name: str) -> Recipe:
    """A recipe by name. Raises ValueError listing the known ones."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]


__all__ = [
    "FULL", "QUICK", "RECIPES", "SCALES", "Recipe", "Study", "core_hours", "recipe", "run_recipe",
]  # fmt: skip
