"""How an optimizer's rate changes over a training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from stepsmith.evaluate.baselines import Baseline
from stepsmith.evaluate.cost import MakeOptimizer
from stepsmith.evaluate.tuning import hyper_parameters
from stepsmith.rules.base import (
    require_choice,
    require_count,
    require_kind,
    require_number,
    set_checked,
)


@dataclass(frozen=True)
class Schedule:
    """A factor on the rate, by the share of the training that is done.

    Args:
        kind: `constant`; `steps`, which multiplies by `factor` at each of `drops`; or `cosine`,
            from 1 to 0.
        drops: shares of the training, rising, between 0 and 1; of a cosine at most one, where it
            has come to 0 and stays, by default the end.
        factor: of a drop; of kind `steps` alone.

    Raises:
        ValueError: an unknown kind, drops that do not rise between 0 and 1 or are more than the
            kind takes, or a factor out of range or of no use.
        TypeError: an argument of another type.

    >>> paper = Schedule("steps", (0.5, 0.75))
    >>> [round(paper.at(share), 4) for share in (0.0, 0.49, 0.5, 0.8)]
    [1.0, 1.0, 0.1, 0.01]
    >>> [round(Schedule("cosine", (0.5,)).at(share), 4) for share in (0.0, 0.25, 0.5, 0.8)]
    [1.0, 0.5, 0.0, 0.0]
    """

    kind: str = "constant"
    drops: tuple[float, ...] = ()
    factor: float = 0.1

    def __post_init__(self):
        require_choice("Schedule", "kind", self.kind, ("constant", "steps", "cosine"))
        require_kind("Schedule", "drops", self.drops, Iterable, "shares, such as (0.5, 0.75)")
        drops = tuple(self.drops)
        for drop in drops:
            require_kind("Schedule", "each of drops", drop, Real)
        # Caches go by the text of a schedule, which NumPy's numbers would change.
        drops = tuple(drop if type(drop) in (int, float) else float(drop) for drop in drops)
        set_checked(self, drops=drops, factor=require_number("Schedule", "factor", self.factor))
        ends = (0.0, *self.drops, 1.0)
        if not all(a < b for a, b in itertools.pairwise(ends)):
            raise ValueError(f"Schedule: drops must rise between 0 and 1, got {self.drops}")
        most = {"constant": 0, "cosine": 1}.get(self.kind, len(self.drops))
        idle = self.kind != "steps" and self.factor != Schedule.factor
        if len(self.drops) > most or not 0 < self.factor < 1 or idle:
            raise ValueError(
                f"Schedule: drops belong to kind 'steps', with a factor between 0 and 1, and one "
                f"at most to 'cosine'; got kind {self.kind!r}, drops {self.drops}, "
                f"factor {self.factor!r}"
            )

    def at(self, share: float) -> float:
        """The factor when this share of the training is done."""
        if self.kind == "cosine":
            end = self.drops[0] if self.drops else 1.0
            return 0.5 * (1 + math.cos(math.pi * min(share / end, 1.0)))
        if self.kind == "steps":
            return self.factor ** sum(share >= drop for drop in self.drops)
        return 1.0


@dataclass(frozen=True)
class Scheduled(Baseline):
    """A baseline whose rate follows a schedule.

    Args:
        schedule: over each training's own length.

    Raises:
        ValueError, TypeError: as `Baseline`.
    """

    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self):
        super().__post_init__()
        require_kind(f"baseline {self.name!r}", "schedule", self.schedule, Schedule)

    def at(self, rate: float, steps: int) -> MakeOptimizer:
        """What makes the optimizer for a training of so many steps."""
        arguments = hyper_parameters(self, rate)
        return scheduled(lambda params: self.make(params, **arguments), self.schedule, steps)


def scheduled(
    make: Callable[[Iterable[Tensor]], torch.optim.Optimizer], schedule: Schedule, steps: int
) -> MakeOptimizer:
    """An optimizer that changes its own rate after each of its steps.

    Args:
        make: makes the optimizer of parameters.
        schedule: over `steps` steps.
        steps: of the training.

    Raises:
        ValueError: fewer than one step.
        TypeError: an argument of another type.
    """
    require_kind("scheduled", "make", make, Callable, "it makes the optimizer of parameters")
    require_kind("scheduled", "schedule", schedule, Schedule)
    steps = require_count("scheduled", "steps", steps)
    if schedule.kind == "constant":
        return make

    def made(params: Iterable[Tensor]) -> torch.optim.Optimizer:
        optimizer = make(params)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: schedule.at(done / steps))

        def after(*_: Any) -> None:
            rates.step()

        optimizer.register_step_post_hook(after)
        return optimizer

    return made
