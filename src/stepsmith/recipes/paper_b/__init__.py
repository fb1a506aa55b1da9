""" "Scalable Learning to Optimize" (Chen et al., ECCV 2022): learned rules in tiny subspaces."""

from stepsmith.recipes.paper_b import choices, comparisons, full_space, principal

PARTS = (comparisons, choices, principal, full_space)
RECIPES = tuple(recipe for part in PARTS for recipe in part.RECIPES)
