"""What a rule measures gradients and steps in, for an optimizee as a whole.

Shape letters: C = copies of an optimizee, P = coordinates of one.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        # Held in the state's dtype; sums of finite gradients may be beyond it.
        norm_C = (norm_C * clipped).clamp_max(_LARGEST).to(state["running_norm"])
        # In floats, as it is kept: where all coordinates have gradients f_t is n_1 to the last bit.
        size_C = torch.full_like(norm_C, size)
        known_C = state["first_norm"] > 0
        before_C = state["first_norm"] * (size_C / state["first_size"].clamp_min(1))
        for early, times in SHRUNK:
            shrunk_C = (norm_C * times < before_C) & (norm_C > 0)
            known_C = known_C & ~(shrunk_C & (state["measured"] < early))
        early, times = GROWN
        known_C = known_C & ~((norm_C > before_C * times) & (state["measured"] < early))
        norm_1_C = torch.where(known_C, state["first_norm"], norm_C)
        size_1_C = torch.where(known_C, state["first_size"], size_C)
        first_C = norm_1_C * (size_C / size_1_C)
        measured_C = torch.where(known_C, state["measured"], 0) + 1
        running_C = torch.where(known_C, state["running_norm"], 0)
        running_C = torch.lerp(torch.minimum(norm_C, first_C * times), running_C, self.beta)
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

    def lag(self, norm: float, running: float, measured: float) -> float:
        """n^ over n_t, at least 1: by how much larger gradients are on average than this one.

        Args:
            norm: n_t.
            running, measured: `running_norm` and `measured` of the state after it.
        """
        mean = running / (1 - self.beta**measured) if measured else 0.0
        return max(1.0, mean / norm) if norm > 0 else 1.0


def norms(grad_CP: Tensor) -> Tensor:
    """(C,) sums of magnitudes, in the dtype of statistics; inf where they are beyond it."""
    return grad_CP.abs().sum(dim=1, dtype=statistics_dtype(grad_CP.dtype))
