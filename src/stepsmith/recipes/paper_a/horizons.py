"""The question the paper leaves open: what becomes of its rules beyond their horizon."""

from __future__ import annotations

from collections.abc import Mapping

from stepsmith.evaluate import Evaluation
from stepsmith.hub import TrainedRule
from stepsmith.recipes.study import Horizon, Study
from stepsmith.tasks import Task

LONG = ("nag", "adam", "adamw", "momentum")
"""Baselines of the longer horizons."""


def longer(
    study: Study,
    task: Task,
    rules: Mapping[str, TrainedRule],
    shorter: Evaluation,
    horizon: Horizon | None,
) -> Evaluation:
    """Rules beside `LONG` at a longer horizon, each baseline tuned around its best rate at a
    shorter one; the shorter evaluation where a scale has no longer horizon.

    Args:
        study: gets the records.
        task, rules: as in `Study.compare`.
        shorter: of the same task, with `LONG` tuned.
        horizon: the longer one.
    """
    if horizon is None:
        return shorter
    around = {name: shorter.tuned[name].rates["final"] for name in LONG}
    return study.compare(task, rules, LONG, horizon=horizon, tune_around=around)
