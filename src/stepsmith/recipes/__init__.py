"""The papers' figures and tables as programs."""

from stepsmith.names import unknown
from stepsmith.recipes import paper_a, paper_b
from stepsmith.recipes.study import FULL, QUICK, SCALES, Recipe, Study, core_hours, run_recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for paper in (paper_a, paper_b) for recipe in paper.RECIPES
}


def recipe(name: str) -> Recipe:
    """A recipe by name. Raises ValueError listing the known ones."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]


__all__ = [
    "FULL", "QUICK", "RECIPES", "SCALES", "Recipe", "Study", "core_hours", "recipe", "run_recipe",
]  # fmt: skip
