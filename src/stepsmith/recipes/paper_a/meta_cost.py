"""What a rule's meta-training costs on this machine, whatever machine it once ran on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from stepsmith.hub import TrainedRule
from stepsmith.meta import MetaTrainConfig
from stepsmith.meta.trainer import Run
from stepsmith.tasks import Task

VALIDATION_STEPS = 25
"""Steps of a timed validation: every step of it costs the same."""


class Spent(NamedTuple):
    """Seconds by the clock, and processor time of all threads."""

    seconds: float
    core_seconds: float

    def per(self, count: float) -> Spent:
        """Of one of so many."""
        return Spent(self.seconds / count, self.core_seconds / count)


@dataclass(frozen=True)
class MetaCost:
    """What a meta-training takes.

    Attributes:
        step: of an inner step, meta-gradient and meta-update included.
        validation_step: of a step of one optimizee in a validation: gradient and rule.
        validation_share: validation steps made for each inner step.
        inner_steps: of the whole meta-training.
    """

    step: Spent
    validation_step: Spent
    validation_share: float
    inner_steps: int

    @property
    def inner_step(self) -> Spent:
        """Of an inner step with its share of the validations."""
        pairs = zip(self.step, self.validation_step, strict=True)
        return Spent(*(step + self.validation_share * checked for step, checked in pairs))

    @property
    def whole(self) -> Spent:
        """Of the whole meta-training."""
        return self.inner_step.per(1 / self.inner_steps)


def meta_cost(tasks: Sequence[Task], trained: TrainedRule, rounds: int) -> MetaCost:
    """Time a rule's meta-training, as its manifest says it was made, on these tasks.

    Args:
        tasks: its own, or others.
        trained: the rule; its weights are where the timed windows start from.
        rounds: episodes and validations timed, after one of each that warms up; medians of them
            are taken.

    Raises:
        ValueError: a rule made in several stages, of which the manifest tells the last alone.
    """
    manifest = trained.manifest
    if "parent" in manifest:
        raise ValueError(
            f"meta_cost: {trained.name} was meta-trained in stages, and only the last could be "
            "timed; give a rule meta-trained at once"
        )
    config = MetaTrainConfig(**manifest["meta_training"])
    steps = min(config.validation_horizon or config.horizon, VALIDATION_STEPS)
    run = Run(tasks, trained, replace(config, validation_horizon=steps))
    validated = steps * config.validation_copies * len(tasks)
    windows, validations = [], []
    for _ in range(rounds + 1):
        before = run.progress.inner_steps
        spent = _timed(lambda: _episode(run))
        windows.append(spent.per(run.progress.inner_steps - before))
        validations.append(_timed(run.validate).per(validated))
    return MetaCost(
        _medians(windows[1:]), _medians(validations[1:]),
        validation_share(manifest, len(tasks)), manifest["inner_steps"],
    )  # fmt: skip


def _episode(run: Run) -> None:
    """Windows over a whole episode of every task, so that its restart is counted too."""
    for _ in range(len(run.tasks) * run.config.horizon // run.config.unroll):
        run.window()


def validation_share(manifest: dict[str, Any], tasks: int = 1) -> float:
    """Validation steps a meta-training made for each inner step.

    Args:
        manifest: of the rule.
        tasks: how many each validation was of.

    >>> config = {"steps": 40_000, "horizon": 100, "validation_copies": 20}
    >>> done = {"meta_training": config, "inner_steps": 40_000, "validations": [{}] * 21}
    >>> validation_share(done)
    1.05
    """
    config = MetaTrainConfig(**manifest["meta_training"])
    steps = config.validation_copies * (config.validation_horizon or config.horizon) * tasks
    return steps * len(manifest["validations"]) / manifest["inner_steps"]


def _timed(do: Callable[[], Any]) -> Spent:
    begun, begun_cores = time.perf_counter(), time.process_time()
    do()
    return Spent(time.perf_counter() - begun, time.process_time() - begun_cores)


def _medians(spent: Sequence[Spent]) -> Spent:
    return Spent(*(statistics.median(column) for column in zip(*spent, strict=True)))
