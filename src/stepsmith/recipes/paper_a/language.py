"""Section 6: a small BERT, in full and in low-rank form, and transfers of its rule."""

from __future__ import annotations

from stepsmith.recipes.paper_a.horizons import LONG, longer
from stepsmith.recipes.paper_a.rules import learned
from stepsmith.recipes.study import Recipe, Study

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
    """Masked language modelling at the paper's horizon, a tenth of the seeds for its cost; over ten
    times as many steps the tasks that rules were made for, a quarter of the seeds."""
    first, long = study.scale.first, study.scale.long
    horizon, further = first.fewer(10), long and long.fewer(4, tuning=1)
    for name, rules in TASKS.items():
        task = study.task(name)
        named = {f"learned ({rule})": learned(study, rule) for rule in rules}
        found = study.compare(task, named, LONG, horizon=horizon, timing=True)
        if name in rules:
            longer(study, task, named, found, further)


RECIPES = (Recipe("a10-bert", "a small BERT, full and low-rank, and transfers (section 6)", bert),)
