"""What a rule measures gradients and steps in, for an optimizee as a whole.

Shape letters: C = copies of an optimizee, P = coordinates of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from stepsmith.rules.base import (
    State,
    require_count,
    require_number,
    set_checked,
    statistics_dtype,
)

FIRST = 1e-3
"""The mean magnitude of an optimizee's first gradient, as a rule with relative units sees it: in
the middle of what `log_sign` resolves."""

SHRUNK = ((2, 1e2), (20, 1e20))
"""One of so many first gradients that is so many times smaller than the first takes its place."""

GROWN = (20, 1e3)
"""The same for one that is larger; on a plateau gradients grow too, but by less. Later, none counts
for more than so many times the first in the running mean."""

_TINY, _LARGEST = 1e-30, 1e30


@dataclass(frozen=True)
class RelativeUnits:
    """Gradients in units of the first one, steps in predicted change of the loss.

    With n_t = sum |g_t| over the coordinates of the optimizee, P_t of them (some may have no
    gradient at a step), and f_t = P_t n_1 / P_1, what n_1 was for as many,

        gradient seen = FIRST * P_t / f_t * g_t
        step made     = min(1, t / warmup) * u_t / max(n^_t, n_t, floor * f_t)

    where n^ is n's bias-corrected running mean and u the rule's own step. To first order a step of
    |u| everywhere changes the loss by at most |u|: a trust region in units of the loss, drawn in at
    once where gradients grow, as they do at the edge of a plateau. Good steps
    of networks that differ tenfold in their parameters' scale are alike in these units
    (docs/6-transfer.md), and an optimizee whose parameters are rescaled as a whole is trained
    alike. The loss must be in the units it was meta-trained in (nats, say). The floor keeps steps
    from growing without bound where gradients vanish; a warm-up keeps the first ones from leaping
    off a plateau, where the first gradient says little of those around it.

    A first gradient that was no measure (a batch of padding, a loss in other units) is forgotten: a
    gradient soon after it that is many times smaller (`SHRUNK`) or larger (`GROWN`) takes its
    place, in the running mean too.

    Not shard-safe: where parameters are sharded, n is the shard's own.

    Args:
        beta: decay of the running mean, in [0, 1).
        floor: share of f_t that n^ is not taken to fall below, > 0.
        warmup: steps over which the steps' size rises linearly to the whole, >= 1 (none).

    Raises:
        ValueError: one of them out of range.
        TypeError: no numbers.
    """

    beta: float = 0.9
    floor: float = 0.3
    warmup: int = 1

    def __post_init__(self):
        owner = "RelativeUnits"
        set_checked(
            self,
            beta=require_number(owner, "beta", self.beta, least=0, below=1),
            floor=require_number(owner, "floor", self.floor, above=0),
            warmup=require_count(owner, "warmup", self.warmup),
        )

    def init(
        self,
        copies: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> State:
        """Nothing measured yet: (C,) zeros."""
        names = ("first_norm", "first_size", "running_norm", "measured")
        return {name: torch.zeros(copies, dtype=dtype, device=device) for name in names}

    def measure(
        self, norm_C: Tensor, size: int, state: State, clipped: float = 1.0
    ) -> tuple[Tensor, Tensor, State]:
        """Take in one gradient.

        Args:
            norm_C: (C,) n_t, from `norms`.
            size: P_t.
            state: from `init` or the last call; not written to.
            clipped: how many times larger the gradients were before they were clipped, >= 1.

        Returns:
            (C,) factors on gradients, (C,) factors on steps, and the new state.
        """
        # Sums of finite gradients may be beyond the dtype that they are held in.
        norm_C = (norm_C if clipped == 1 else norm_C * clipped).clamp_max(_LARGEST)
        # In floats, as it is kept: where all coordinates have gradients f_t is n_1 to the last bit.
        size_C = torch.full_like(norm_C, size)
        before_C = state["first_norm"] * (size_C / state["first_size"].clamp_min(1))
        known_C = (before_C > 0) & ~displaces(norm_C, before_C, state["measured"])
        norm_1_C = torch.where(known_C, state["first_norm"], norm_C)
        size_1_C = torch.where(known_C, state["first_size"], size_C)
        first_C = norm_1_C * (size_C / size_1_C)
        measured_C = torch.where(known_C, state["measured"], 0) + 1
        running_C = torch.where(known_C, state["running_norm"], 0)
        counted_C = torch.minimum(norm_C, first_C * GROWN[1])
        running_C = torch.lerp(counted_C, running_C, self.beta)
        mean_C = running_C / (1 - self.beta**measured_C)
        largest_C = torch.maximum(torch.maximum(mean_C, norm_C), self.floor * first_C)
        new = {
            "first_norm": norm_1_C, "first_size": size_1_C, "running_norm": running_C,
            "measured": measured_C,
        }  # fmt: skip
        risen_C = (measured_C / self.warmup).clamp_max(1)
        return (
            FIRST * size / first_C.clamp_min(_TINY),
            risen_C / largest_C.clamp_min(_TINY),
            new,
        )

    def measure_one(
        self, norm: float, size: int, state: Mapping[str, float], clipped: float = 1.0
    ) -> tuple[float, float, dict[str, float]]:
        """`measure` for one optimizee in Python's numbers, a tenth of the time; the same to
        rounding."""
        norm = min(norm * clipped, _LARGEST)
        first, first_size = state["first_norm"], state["first_size"]
        running, measured = state["running_norm"], state["measured"]
        before = first * (size / max(first_size, 1))
        if not before > 0 or displaces(norm, before, measured):
            first, first_size, running, measured = norm, float(size), 0.0, 0.0
        here = first * (size / first_size)
        measured += 1
        running += (1 - self.beta) * (min(norm, here * GROWN[1]) - running)
        largest = max(running / (1 - self.beta**measured), norm, self.floor * here, _TINY)
        new = {
            "first_norm": first, "first_size": first_size, "running_norm": running,
            "measured": measured,
        }  # fmt: skip
        risen = min(1.0, measured / self.warmup)
        return FIRST * size / max(here, _TINY), risen / largest, new

    def lag(self, norm: float, running: float, measured: float) -> float:
        """n^ over n_t, at least 1: by how much larger gradients are on average than this one.

        Args:
            norm: n_t.
            running, measured: `running_norm` and `measured` of the state after it.
        """
        mean = running / (1 - self.beta**measured) if measured else 0.0
        return max(1.0, mean / norm) if norm > 0 else 1.0


Numbers = TypeVar("Numbers", float, Tensor)


def displaces(norm: Numbers, first: Numbers, measured: Numbers) -> Any:
    """Whether a gradient takes the first one's place.

    Args:
        norm: n_t.
        first: n_1, for as many coordinates.
        measured: how many were measured before.
    """
    early, times = GROWN
    found = (norm > first * times) & (measured < early)
    for early, times in SHRUNK:
        found = found | ((norm * times < first) & (norm > 0) & (measured < early))
    return found


def norms(grad_CP: Tensor) -> Tensor:
    """(C,) sums of magnitudes, in the dtype of statistics; inf where they are beyond it."""
    return grad_CP.abs().sum(dim=1, dtype=statistics_dtype(grad_CP.dtype))
