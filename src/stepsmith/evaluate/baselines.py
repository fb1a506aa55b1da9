"""Hand-designed baselines and how their rates are tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from stepsmith.names import unknown
from stepsmith.rules.base import is_number, require_count, require_kind, require_number, set_checked

SMALLEST_RATE, LARGEST_RATE = 1e-30, 1e30
"""Of a baseline's centre: grids around it widen by factors, and must stay finite."""


def require_rate(owner: str, name: str, rate: Any) -> float:
    """Check a rate that grids may be laid around.

    Raises:
        ValueError: not above 0, or so small or large that a grid around it would not be finite.
        TypeError: no number.
    """
    if not is_number(rate):
        raise TypeError(f"{owner}: {name} must be numbers > 0, got {rate!r}")
    if not SMALLEST_RATE <= rate <= LARGEST_RATE:
        raise ValueError(
            f"{owner}: {name} must be > 0, from {SMALLEST_RATE} to {LARGEST_RATE}, got {rate!r}"
        )
    return require_number(owner, name, rate)


@dataclass(frozen=True)
class Baseline:
    """A `torch.optim` optimizer whose rate is to be tuned.

    Args:
        name: for tables.
        make: the optimizer's class, or any callable of (params, lr=..., **fixed).
        centre: middle of the rate grid.
        fixed: its other arguments.

    Raises:
        ValueError: a centre that is no rate, or `lr` among the fixed arguments.
        TypeError: an argument of another type.
    """

    name: str
    make: Callable[..., torch.optim.Optimizer]
    centre: float
    fixed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        require_kind("Baseline", "name", self.name, str)
        owner = f"baseline {self.name!r}"
        require_kind(owner, "make", self.make, Callable, "an optimizer's class")
        set_checked(self, centre=require_rate(owner, "rates", self.centre))
        require_kind(owner, "fixed", self.fixed, dict)
        if "lr" in self.fixed:
            raise ValueError(f"baseline {self.name!r}: lr is tuned around `centre`, not `fixed`")

    def grid(self, points: int, factor: float) -> list[float]:
        """`points` rates around the centre, each `factor` times the one before.

        Raises:
            ValueError: fewer than one, or a factor not above 1.
        """
        points = require_count(f"baseline {self.name!r}", "points", points)
        factor = require_number(f"baseline {self.name!r}", "factor", factor, above=1)
        return [self.centre * factor ** (i - points // 2) for i in range(points)]


BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("sgd", torch.optim.SGD, 0.5),
        Baseline("momentum", torch.optim.SGD, 0.25, {"momentum": 0.9}),
        Baseline("nag", torch.optim.SGD, 0.25, {"momentum": 0.9, "nesterov": True}),
        Baseline("adam", torch.optim.Adam, 0.016),
        Baseline("adamw", torch.optim.AdamW, 0.016),
        Baseline("rmsprop", torch.optim.RMSprop, 0.008),
        Baseline("adagrad", torch.optim.Adagrad, 0.064),
    )
}


def baseline(name: str) -> Baseline:
    """A baseline by name. Raises ValueError listing the known ones, TypeError for no text."""
    require_kind("evaluate", "a baseline", name, str, "a name or a Baseline")
    if name not in BASELINES:
        raise unknown("baseline", name, BASELINES)
    return BASELINES[name]
