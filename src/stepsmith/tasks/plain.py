"""A module used as torch means it: its own parameters, one call, one backward pass.

`torch.func.functional_call` lends a module tensors for the length of a call. What looks at the
module later, such as gradient checkpointing in the backward pass, finds other tensors there. Here
the module's own parameters hold the given numbers until the backward pass is done.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepsmith.tasks.base import Batch, Buffers, Params


class Passed(NamedTuple):
    """What a call gave.

    Attributes:
        loss: with no graph.
        output: of the module.
        grads: by parameter, None where the backward pass gave none; empty where it was not run.
        buffers: as the call left them.
    """

    loss: Tensor
    output: Any
    grads: dict[str, Tensor | None]
    buffers: Buffers


def run(
    module: nn.Module,
    loss: Callable[[Any, Tensor], Tensor],
    params: Params,
    buffers: Buffers,
    batch: Batch,
    *,
    backward: bool,
) -> Passed:
    """Call a module with these numbers, and run the backward pass.

    Args:
        module: keeps the numbers; nothing else may hold its tensors.
        loss: `loss(output, target) -> ()`.
        params: of the parameters that require gradients; shared with the module.
        buffers: of all else the module holds; copied.
        batch: the module's arguments and the targets.
        backward: whether to run the backward pass.

    Raises:
        ValueError: a loss that is no single number, or a call that took a buffer away.
    """
    fill(module, params, {key: value.detach().clone() for key, value in buffers.items()})
    *inputs, targets = batch
    own = dict(module.named_parameters())
    with torch.set_grad_enabled(backward):
        output = module(*inputs)
        measured = loss(output, targets)
    require_number(type(module).__name__, measured)
    if backward and measured.requires_grad:
        measured.backward()
    grads = {key: _dense(own[key].grad) for key in params} if backward else {}
    for param in own.values():
        param.grad = None
    held = {**own, **dict(module.named_buffers(remove_duplicate=False))}
    if gone := [key for key in buffers if key not in held]:
        raise ValueError(
            f"{type(module).__name__}: forward takes the buffer {gone[0]!r} away, so that the next "
            "step would lack it; set it to a tensor"
        )
    return Passed(measured.detach(), output, grads, {key: held[key].detach() for key in buffers})


def require_number(name: str, loss: Any) -> None:
    """Raise ValueError where a loss is anything else than a tensor of one number."""
    if not isinstance(loss, Tensor) or loss.shape != ():
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"{name}: the loss must be a single number (shape ()), got {shape}; reduce it over the "
            "batch, for example by .mean()"
        )


def require_graph(name: str, loss: Tensor) -> None:
    """Raise ValueError where a loss has no gradient."""
    if not loss.requires_grad:
        raise ValueError(
            f"{name}: the loss depends on no parameter that requires a gradient; compute it from "
            "the module's output, and detach nothing on the way"
        )


def _dense(grad: Tensor | None) -> Tensor | None:
    return grad if grad is None or grad.layout == torch.strided else grad.to_dense()


@torch.no_grad()
def fill(module: nn.Module, params: Params, buffers: Buffers) -> None:
    """Make these tensors a module's own, without a copy; `buffers` may hold frozen parameters."""
    for key, param in module.named_parameters():
        given = params.get(key, buffers.get(key))
        if given is not None:
            param.data = given.detach()
    first: dict[int, str] = {}
    for key, buffer in list(module.named_buffers(remove_duplicate=False)):
        # Of a buffer with two names only the first is given.
        given = buffers.get(first.setdefault(id(buffer), key))
        if given is not None:
            *owners, name = key.split(".")
            setattr(functools.reduce(getattr, owners, module), name, given)


def with_gradients(loss: Tensor, grads: Mapping[str, Tensor | None], params: Params) -> Tensor:
    """A loss whose gradients in these parameters are known already.

    Raises:
        RuntimeError: on the backward pass, where a second derivative is asked for.
    """
    return _WithGradients.apply(loss, list(grads.values()), *params.values())


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor | None], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "no second derivatives (create_graph=True) of a module whose steps are ordinary "
                "backward passes; switch its gradient checkpointing off"
            )
        return None, None, *(None if grad is None else outer[0] * grad for grad in ctx.grads)


def share_memory(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold a tensor in common."""
    first, second = (
        {
            tensor.untyped_storage().data_ptr()
            for tensor in (*module.parameters(), *module.buffers())
            if tensor.numel()
        }
        for module in (one, other)
    )
    return bool(first & second)
