"""The papers' figures and tables as programs."""

from stepsmith.names import unknown
from stepsmith.recipes import general, language, paper_a, preprocessing, price, techniques
from stepsmith.recipes.study import FULL, QUICK, SCALES, Recipe, Study, core_hours, run_recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for part in (paper_a, price, language, general, preprocessing, techniques)
    for recipe in part.RECIPES
}


def recipe(name: str) -> Recipe:
    """A recipe by name. Raises ValueError listing the known ones."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]


__all__ = [
    "FULL", "QUICK", "RECIPES", "SCALES", "Recipe", "Study", "core_hours", "recipe", "run_recipe",
]  # fmt: skip
