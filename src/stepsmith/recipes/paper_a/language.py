"""Section 6: a small BERT, in full and in low-rank form, and transfers of its rule."""

from __future__ import annotations

from dataclasses import replace

from stepsmith.recipes.paper_a.rules import learned
from stepsmith.recipes.study import Recipe, Study

BASELINES = ("adamw", "adam", "nag", "momentum")
TASKS = {
    "bert-e2e": ("bert-e2e", "mlp-mnist"),
    "bert-lora-e2e": ("bert-lora-e2e", "bert-e2e"),
    "bert-4layers-e2e": ("bert-e2e",),
    "bert-wide-e2e": ("bert-e2e",),
    "bert-4heads-e2e": ("bert-e2e",),
    "bert-e2e-mr": ("bert-e2e",),
}
"""Task -> rules: its own, and transfers over depth, width, heads, the text set, and from images."""


def bert(study: Study) -> None:
    """Masked language modelling at the paper's horizon; a tenth of the seeds, for its cost."""
    first = study.scale.first
    horizon = replace(first, seeds=max(2, first.seeds // 10), tuning_seeds=min(2, first.seeds))
    for name, rules in TASKS.items():
        named = {f"learned ({rule})": learned(study, rule) for rule in rules}
        study.compare(study.task(name), named, BASELINES, horizon=horizon, timing=True)


RECIPES = (Recipe("a10-bert", "a small BERT, full and low-rank, and transfers (section 6)", bert),)
