"""Hand-designed baselines and how their rates are tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from stepsmith.names import unknown


@dataclass(frozen=True)
class Baseline:
    """A `torch.optim` optimizer whose rate is to be tuned.

    Args:
        name: for tables.
        make: the optimizer's class, or any callable of (params, lr=..., **fixed).
        centre: middle of the rate grid.
        fixed: its other arguments.
    """

    name: str
    make: Callable[..., torch.optim.Optimizer]
    centre: float
    fixed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.centre > 0:
            raise ValueError(f"baseline {self.name!r}: rates must be > 0, got {self.centre!r}")
        if "lr" in self.fixed:
            raise ValueError(f"baseline {self.name!r}: lr is tuned around `centre`, not `fixed`")

    def grid(self, points: int, factor: float) -> list[float]:
        """`points` rates around the centre, each `factor` times the one before."""
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
    """A baseline by name. Raises ValueError listing the known ones."""
    if name not in BASELINES:
        raise unknown("baseline", name, BASELINES)
    return BASELINES[name]
