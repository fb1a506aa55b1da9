"""Whether a task computes what an ordinary backward pass of its module does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stepsmith.layout import Layout
from stepsmith.tasks.base import Batch, Buffers, Params, Task
from stepsmith.tasks.plain import require_graph, require_number

Start = tuple[Params, Buffers]

TOLERANCE = 1e-3
"""Difference of two computations of one thing, relative to its norm, that rounding explains."""


class Step(NamedTuple):
    """What one training step from a start shows.

    Attributes:
        loss: ().
        grads: by parameter.
        buffers: as the step left them.
        tested: () loss afterwards, in evaluation mode; None where there is no test.
        tests_write: whether evaluation mode wrote to buffers.
        drew: whether the step drew from torch's generators.
    """

    loss: Tensor
    grads: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    tested: Tensor | None = None
    tests_write: bool = False
    drew: bool = False


def task_step(task: Task, start: Start, batch: Batch) -> Step:
    """The step of a task.

    Raises:
        ValueError: a loss that is no single number, or that depends on no parameter.
    """
    params, buffers = start
    layout = Layout.of(params)
    theta_P = layout.flatten(params).requires_grad_()
    with same_draws(task.device) as drew:
        loss, moved, _ = task.loss(layout.views(theta_P), buffers, batch, None, True)
        require_number(task.name, loss)
        require_graph(task.name, loss)
        (grad_P,) = torch.autograd.grad(loss, theta_P)
        drawn = drew()
    return Step(loss.detach(), layout.views(grad_P), moved, drew=drawn)


def then_tested(task: Task, start: Start, step: Step, batch: Batch) -> Step:
    """A step and a test after it, of the parameters from before; the step alone where the task has
    no tests."""
    if not task.has_test:
        return step
    params, own = ({key: value.clone() for key, value in part.items()}
                   for part in (start[0], step.buffers))  # fmt: skip
    with same_draws(task.device), torch.no_grad():
        tested, _, _ = task.loss(params, own, batch, None, False)
    wrote = any(not torch.equal(own[key], step.buffers[key]) for key in own)
    return step._replace(tested=tested, tests_write=wrote)


def require_carried(name: str, module: nn.Module, start: Start, step: Step) -> None:
    """Raise ValueError where a step of this module moves what no task can carry: a parameter that
    `forward` writes to, or a buffer whose shape or dtype it changes."""
    params, buffers = start
    for key, param in module.named_parameters():
        if key in params and not torch.equal(param.detach(), params[key]):
            raise ValueError(
                f"{name}: forward writes to its own parameter {key!r}, which only the optimizer "
                "may move; compute what is needed from the parameter instead, as "
                "torch.nn.utils.parametrize does"
            )
    for key, old in buffers.items():
        new = step.buffers[key]
        if (new.shape, new.dtype) != (old.shape, old.dtype):
            raise ValueError(
                f"{name}: forward turns the buffer {key!r} from {tuple(old.shape)}, {old.dtype} "
                f"into {tuple(new.shape)}, {new.dtype}; register it with the shape and dtype that "
                "it is to have"
            )


def stacked_steps(task: Task, start: Start, batches: Sequence[Batch]) -> list[Step]:
    """The steps of stacked copies, one a batch, all from one start."""
    params, buffers = start
    copies = len(batches)
    layout = Layout.of(params)
    theta_CP = layout.flatten(params).repeat(copies, 1).requires_grad_()

    def step(theta_P: Tensor, buffers: Buffers, batch: Batch) -> tuple[Tensor, Buffers]:
        loss, moved, _ = task.loss(layout.views(theta_P), buffers, batch, None, True)
        return loss, moved

    with same_draws(task.device):
        losses_C, moved = torch.func.vmap(step, randomness="different")(
            theta_CP,
            {key: torch.stack([value] * copies) for key, value in buffers.items()},
            tuple(torch.stack(parts) for parts in zip(*batches, strict=True)),
        )
        (grad_CP,) = torch.autograd.grad(losses_C.sum(), theta_CP)
    return [
        Step(
            losses_C[copy],
            layout.views(grad_CP[copy]),
            {key: value[copy] for key, value in moved.items()},
        )
        for copy in range(copies)
    ]


def difference(one: Step, other: Step, start: Mapping[str, Tensor]) -> str | None:
    """What differs by more than rounding explains, or None; `start` are the buffers before."""
    if _differ(one.loss, other.loss):
        return "the loss"
    # A gradient of zero (a bias before batch-norm) is rounding noise and nothing else.
    noise = 1e-3 * TOLERANCE * max(float(grad.norm()) for grad in other.grads.values())
    for key, grad in one.grads.items():
        if _differ(grad, other.grads[key], noise):
            return f"the gradient of {key!r}"
    for key, old in start.items():
        new, want = one.buffers[key], other.buffers[key]
        noise = 0.0
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
