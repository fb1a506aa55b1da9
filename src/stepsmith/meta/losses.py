"""Meta-losses: what a rule is asked to make small, by value and by derivative.

Shape letters: T = losses of a window, C = copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepsmith.rules.base import require_choice

META_LOSSES = ("mean", "final", "log")
"""`mean`: mean of the window's losses. `final`: mean of those in the last tenth of the horizon.
`log`: mean of log(loss + 1e-8), which asks for the same relative gain at every scale."""

_EPS = 1e-8


def meta_loss(
    kind: str, losses_TC: Tensor, places_TC: Tensor, horizon: int
) -> tuple[Tensor, Tensor]:
    """The meta-loss of each copy, and its derivative with respect to each loss.

    Args:
        kind: one of `META_LOSSES`.
        losses_TC: (T, C) losses that count.
        places_TC: (T, C) place of each loss in its episode, 1 to `horizon`.
        horizon: steps of an episode.

    Returns:
        (C,) values and (T, C) derivatives w_t, in the sense J = sum_t w_t L_t to first order.

    Raises:
        ValueError: unknown kind.
    """
    require_choice("meta_loss", "kind", kind, META_LOSSES)
    share = 1 / len(losses_TC)
    if kind == "mean":
        return losses_TC.mean(0), torch.full_like(losses_TC, share)
    if kind == "log":
        shifted_TC = losses_TC + _EPS
        return shifted_TC.log().mean(0), share / shifted_TC
    last = max(1, horizon // 10)
    counted_TC = (places_TC > horizon - last).to(losses_TC.dtype) / last
    return (losses_TC * counted_TC).sum(0), counted_TC
