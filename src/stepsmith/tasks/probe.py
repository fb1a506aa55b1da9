"""Whether a task computes what an ordinary backward pass of its module does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-3
"""Difference of two computations of one thing, relative to its norm, that rounding explains."""


class Outcome(NamedTuple):
    """What one training step from a start shows.

    Attributes:
        loss: ().
        grads: by parameter, None for zero.
        buffers: as the step left them.
        tested: () loss afterwards, in evaluation mode; None where there is no test.
    """

    loss: Tensor
    grads: Mapping[str, Tensor | None]
    buffers: Mapping[str, Tensor]
    tested: Tensor | None


def difference(one: Outcome, other: Outcome, start: Mapping[str, Tensor]) -> str | None:
    """What differs by more than rounding explains, or None; `start` are the buffers before."""
    if _differ(one.loss, other.loss):
        return "the loss"
    whole = [grad for grad in other.grads.values() if grad is not None]
    # A gradient of zero (a bias before batch-norm) is rounding noise and nothing else.
    noise = 1e-3 * TOLERANCE * max(float(grad.detach().norm()) for grad in whole) if whole else 0.0
    for key, grad in one.grads.items():
        want = other.grads[key]
        known = grad if grad is not None else want
        if known is not None:
            pair = (torch.zeros_like(known) if g is None else g for g in (grad, want))
            if _differ(*pair, noise):
                return f"the gradient of {key!r}"
    for key, old in start.items():
        new, want = one.buffers[key], other.buffers[key]
        if old.is_floating_point():
            # How far it moved, which may be little of what it is.
            noise = 64 * torch.finfo(old.dtype).eps * float(old.norm())
            new, want = new - old, want - old
        if _differ(new, want, noise):
            return f"the buffer {key!r} after a step"
    if one.tested is not None and other.tested is not None and _differ(one.tested, other.tested):
        return "the loss of a test"
    return None


def _differ(one: Tensor, other: Tensor, noise: float = 0.0) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return True
    one, other = one.detach(), other.detach()
    if torch.equal(one, other):
        return False
    if not one.is_floating_point():
        return True
    finite = one.isfinite()
    same = (one == other) | (one.isnan() & other.isnan())
    if not torch.equal(finite, other.isfinite()) or not bool((same | finite).all()):
        return True
    tolerance = max(TOLERANCE, 16 * torch.finfo(one.dtype).eps)
    one, other = one[finite].double(), other[finite].double()
    return bool((one - other).norm() > tolerance * other.norm() + noise)


@contextmanager
def same_draws(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Seed every global generator that a module may draw from, put all back after.

    Yields:
        Says whether torch's own have been drawn from.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            before = _states(device)
            yield lambda: not all(map(torch.equal, before, _states(device)))
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _states(device: torch.device) -> list[Tensor]:
    states = [torch.random.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
