"""The ConvNet's residual block, one image at a time where it can be.

Layer by layer a batch goes through memory a dozen times, with three channels where vectors hold
eight or sixteen; an image at a time it stays in the first cache. `residual_block_native` does that,
compiled by numba, on a CPU and in float32; everywhere else the same layers run as PyTorch has them.

Shape letters: B = batch, X = image channels, K = kernel.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepsmith.tasks.networks.few_channels import convolve

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "sigmoid": torch.sigmoid}
CHANNELS = 3
"""Of both convolutions."""
NATIVE_KERNELS = (3, 5)


def residual_block(images_BXHW: Tensor, weights: tuple[Tensor, ...], activation: str) -> Tensor:
    """conv, activation, conv, + input repeated over channels, activation, max-pool 2.

    Args:
        images_BXHW: (B, 1 or 3, height, width).
        weights: (3, X, K, K), (3,), (3, 3, K, K), (3,): of both convolutions, K odd.
        activation: a key of `ACTIVATIONS`.

    Returns:
        (B, 3, height // 2, width // 2).
    """
    if _suits(images_BXHW, weights):
        return _Block.apply(activation, images_BXHW, *weights)[0]
    return by_layers(images_BXHW, weights, activation)


def by_layers(images_BXHW: Tensor, weights: tuple[Tensor, ...], activation: str) -> Tensor:
    """`residual_block` by PyTorch's own layers."""
    first, first_bias, second, second_bias = weights
    act = ACTIVATIONS[activation]
    hidden = convolve(act(convolve(images_BXHW, first, first_bias)), second, second_bias)
    # A grey image is repeated over the channels; a colour image has three already.
    return F.max_pool2d(act(hidden + images_BXHW), 2)


@functools.cache
def _native() -> ModuleType | None:
    try:
        return importlib.import_module("stepsmith.tasks.networks.residual_block_native")
    except ImportError:  # numba, an extra, is missing
        return None


def _suits(images_BXHW: Tensor, weights: tuple[Tensor, ...]) -> bool:
    tensors = (images_BXHW, *weights)
    return (
        all(one.device.type == "cpu" and one.dtype == torch.float32 for one in tensors)
        and not images_BXHW.requires_grad
        and not torch.is_autocast_enabled("cpu")
        and images_BXHW.shape[1] in (1, CHANNELS)
        and weights[0].shape[-1] in NATIVE_KERNELS
        and min(images_BXHW.shape[-2:]) >= 2
        and _native() is not None
    )


def _ran() -> ModuleType:
    native = _native()
    assert native is not None
    return native


@torch.library.custom_op(
    "stepsmith::residual_block", mutates_args=(),
    schema="(str activation, Tensor images, Tensor first, Tensor first_bias, Tensor second, "
    "Tensor second_bias) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
def _forward(activation: str, images: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _ran().forward(images, weights, activation == "sigmoid")


@torch.library.custom_op(
    "stepsmith::residual_block_backward", mutates_args=(),
    schema="(str activation, Tensor grad, Tensor images, Tensor second, Tensor pooled, "
    "Tensor hidden, Tensor places) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def _backward(activation: str, *given: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _ran().backward(*given, activation == "sigmoid")


def _one_by_one(operator: Any) -> None:
    """Under vmap the copies run in turn: each has weights of its own."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> Any:
        rows = [
            operator(
                *(
                    part if dim is None else part.select(dim, copy)
                    for part, dim in zip(given, in_dims, strict=True)
                )
            )
            for copy in range(info.batch_size)
        ]
        parts = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return parts, (0,) * len(parts)

    operator.register_vmap(rule)


_one_by_one(_forward)
_one_by_one(_backward)


class _Block(torch.autograd.Function):
    """The compiled block and its gradient by the weights."""

    generate_vmap_rule = True

    @staticmethod
    def forward(activation: str, images: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(activation, images, *weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.activation, ctx.weights = inputs[0], len(inputs) - 2
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[1:], *output)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        images, *weights = ctx.saved_tensors[: 1 + ctx.weights]
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            pooled = by_layers(images, tuple(weights), ctx.activation)
            return None, None, *torch.autograd.grad(pooled, weights, grad, create_graph=True)
        results = ctx.saved_tensors[1 + ctx.weights :]
        return None, None, *_backward(ctx.activation, grad, images, weights[2], *results)
