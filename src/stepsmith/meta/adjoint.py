"""Coordinate-sampled adjoint back-propagation: the meta-gradient in the memory of deployment.

The optimizee's gradient g_t enters the network as a constant (Andrychowicz et al. 2016), so that
the parameters theta_t depend on the rule's weights phi only through the sum of earlier steps u_s:

    theta_t+1 = (1 - d) theta_t + lr u_t          d = lr * weight decay
    J         = sum_t w_t L_t(theta_t)
    dJ/dphi   = lr sum_s <lambda_s, du_s/dphi>
    lambda_s  = w_s+1 g_s+1 + discount (1 - d) lambda_s+1

Roll forward with no graph, keeping the gradients of a sample of coordinates; form lambda by suffix
sums; replay the network on the sample and back-propagate through it. With every coordinate sampled
this equals back-propagation through the whole unrolled graph without second derivatives; otherwise
it is an unbiased estimate of it.

Shape letters: T = steps of the window, C = copies, S = sampled coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stepsmith.meta.losses import META_LOSSES, meta_loss
from stepsmith.meta.sample import Sample
from stepsmith.rules.base import (
    Weights,
    require_choice,
    require_count,
    require_kind,
    require_number,
)
from stepsmith.unroll import Copies, RuleStepper, Start, roll

LossTimes = Literal["after", "before"]


@dataclass(frozen=True)
class Window:
    """What one window gave.

    Attributes:
        gradients: dJ/dphi by weight name, J being the mean over the copies that stayed finite.
        value: J.
        losses_TC: (T, C) losses before each step.
        finite_C: (C,) whether all of a copy's losses and gradients were finite.
    """

    gradients: dict[str, Tensor]
    value: float
    losses_TC: Tensor
    finite_C: Tensor


def adjoint_window(
    copies: Copies,
    stepper: RuleStepper,
    weights: Weights,
    steps: int,
    *,
    kind: str = "mean",
    losses: LossTimes = "after",
    fraction: float = 1.0,
    discount: float = 1.0,
    ages: list[int] | None = None,
    horizon: int | None = None,
    generator: torch.Generator | None = None,
    split: str = "meta_train",
) -> Window:
    """Roll the copies one window forward and return the meta-gradient.

    Args:
        copies: moved in place.
        stepper: the rule's statistics and carry, moved in place; it must step by `weights`.
        weights: phi, requiring gradients.
        steps: T.
        kind: meta-loss, one of `META_LOSSES`.
        losses: `"after"` counts L_1..L_T, at the price of one more gradient; `"before"` counts
            L_0..L_{T-1}, as both papers do, and gives the last step no signal.
        fraction: share of the coordinates replayed, in (0, 1].
        discount: gamma in the recursion of lambda.
        ages: steps each copy has made so far; by default none.
        horizon: steps of an episode; by default T.
        generator: draws the sample; needed where `fraction` < 1.
        split: where batches come from.

    Raises:
        ValueError: a fraction outside (0, 1], or below 1 without a generator or for a rule whose
            network couples coordinates (the estimate would be biased); an unknown meta-loss, or
            another argument out of range.
        TypeError: an argument of another type.
    """
    owner = "adjoint_window"
    steps = require_window(owner, copies, steps, kind, losses)
    discount = require_number(owner, "discount", discount, above=0, most=1)
    if horizon is not None:
        horizon = require_count(owner, "horizon", horizon, least=steps)
    if ages is not None and len(ages) != len(copies):
        raise ValueError(f"{owner}: ages must be one a copy ({len(copies)}), got {len(ages)}")
    sample = Sample(copies, stepper, steps, fraction, generator)
    losses_TC = roll(copies, sample, steps, split=split, hook=sample.keep)
    if losses == "after":
        # The window's last step is judged on a batch of its own; no step follows it.
        final_C, grad_CP = copies.gradients(copies.batches(split))
        sample.keep(Start(steps, final_C, grad_CP))
        counted_TC = torch.cat([losses_TC[1:], final_C[None]])
    else:
        counted_TC = losses_TC
    device = losses_TC.device
    ages_C = torch.tensor(ages or [0] * len(copies), device=device)
    places_TC = ages_C + torch.arange(1, steps + 1, device=device)[:, None]
    value_C, w_TC = meta_loss(kind, counted_TC, places_TC, horizon or steps)

    lambda_TS = torch.zeros_like(sample.grads_TS[1:])
    if losses == "after":
        torch.mul(w_TC.index_select(1, sample.owner_S), sample.grads_TS[1:], out=lambda_TS)
    else:
        ahead_TS = w_TC[1:].index_select(1, sample.owner_S)
        torch.mul(ahead_TS, sample.grads_TS[1:-1], out=lambda_TS[:-1])
    _sum_suffixes_(lambda_TS, discount * (1 - stepper.lr * stepper.weight_decay))
    finite_C = counted_TC.isfinite().all(0) & losses_TC.isfinite().all(0)
    gradients, finite_C = sample.replay(weights, lambda_TS, finite_C)
    value = float(value_C[finite_C].mean()) if finite_C.any() else float("nan")
    return Window(gradients, value, losses_TC, finite_C)


def require_window(owner: str, copies: Copies, steps: int, kind: str, losses: str) -> int:
    """Check what windows share, before a copy is moved; returns the steps.

    Raises:
        ValueError: fewer than one step, or an unknown choice.
        TypeError: an argument of another type.
    """
    require_kind(owner, "copies", copies, Copies)
    require_choice(owner, "kind", kind, META_LOSSES)
    require_choice(owner, "losses", losses, ("after", "before"))
    return require_count(owner, "steps", steps)


def _sum_suffixes_(ahead_TS: Tensor, decay: float) -> None:
    """lambda_s = ahead_s + decay * lambda_s+1, where ahead_s = w_s+1 g_s+1; written over it."""
    for s in range(len(ahead_TS) - 2, -1, -1):
        ahead_TS[s].add_(ahead_TS[s + 1], alpha=decay)
