"""Rolling the copies forward.

Shape letters: C = copies, P = parameters, T = steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from stepsmith.unroll.copies import Copies
from stepsmith.unroll.steppers import Stepper


@dataclass(frozen=True)
class Start:
    """What a hook sees before a step is made."""

    step: int
    losses_C: Tensor
    grad_CP: Tensor


def roll(
    copies: Copies,
    stepper: Stepper,
    steps: int,
    *,
    split: str = "train",
    hook: Callable[[Start], None] | None = None,
) -> Tensor:
    """Train the copies for `steps` steps.

    Args:
        copies: moved in place.
        stepper: makes the steps.
        steps: T.
        split: where batches come from.
        hook: called with each step's losses and gradients, before the step.

    Returns:
        (T, C) batch losses, each before its step. A copy that diverges goes on as it is: its
        losses grow or turn into nan, and it disturbs no other copy.
    """
    # Reserved at once: small tensors kept between large ones of each step would scatter the heap.
    losses_TC = copies.theta.new_empty(steps, len(copies))
    for step, batch in zip(range(steps), copies.stream(split), strict=False):
        losses_C, grad_CP = copies.gradients(batch)
        losses_TC[step] = losses_C
        if hook is not None:
            hook(Start(step, losses_C, grad_CP))
        stepper(copies.theta, grad_CP)
    return losses_TC
