"""The small residual ConvNet of "Transferring Learned Optimizers", and its variants.

Shape letters: B = batch, X = input channels, Y = output channels, K = kernel, P = pixels after
pooling.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _FewChannels(torch.autograd.Function):
    """A convolution of odd kernel and equal padding whose gradient by its input is a convolution
    with the flipped kernel: for three channels four times faster on a CPU than PyTorch's own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(images_BXHW: Tensor, weight_YXKK: Tensor, bias_Y: Tensor) -> Tensor:
        return F.conv2d(images_BXHW, weight_YXKK, bias_Y, padding=weight_YXKK.shape[-1] // 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad_BYHW,) = grads
        images_BXHW, weight_YXKK = ctx.saved_tensors
        pad = [weight_YXKK.shape[-1] // 2] * 2
        by_images = None
        if ctx.needs_input_grad[0]:
            by_images = F.conv2d(grad_BYHW, weight_YXKK.flip(2, 3).transpose(0, 1), padding=pad[0])
        _, by_weight, by_bias = torch.ops.aten.convolution_backward(
            grad_BYHW, images_BXHW, weight_YXKK, weight_YXKK.shape[:1], [1, 1], pad, [1, 1],
            False, [0, 0], 1, [False, True, True],
        )  # fmt: skip
        return by_images, by_weight, by_bias


class Convolution(nn.Conv2d):
    """`nn.Conv2d` of odd kernel that keeps height and width, its gradient fast on a CPU too.

    Raises:
        ValueError: an even kernel.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int):
        if kernel % 2 == 0:
            raise ValueError(f"Convolution: kernel must be odd, got {kernel}")
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, input: Tensor) -> Tensor:
        """(B, X, height, width) to (B, Y, height, width)."""
        if input.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        return _FewChannels.apply(input, self.weight, self.bias)


class ConvNet(nn.Module):
    """Two convolutions of 3 channels around a repeated-input shortcut, pool, batch-norm, linear.

    conv (X->3), activation, conv (3->3), + input repeated over channels, activation, max-pool 2,
    batch-norm (3, always with batch statistics), linear -> classes. Weights N(0, 1/27), N(0, 1/81)
    and N(0, 1/(10 * 588)), biases zero; the variances keep the values of the 3x3 form for every
    kernel size, as published.

    Args:
        shape: (channels, height, width) of an image.
        classes: outputs.
        kernel: size of both kernels, odd.
        activation: `"relu"` or `"sigmoid"`.
        affine: whether batch-norm has a scale and a shift to train.

    Source: Daduryan, "Transferring Learned Optimizers", section 3.3; MNIST: 6,010 parameters.
    """

    def __init__(
        self,
        shape: torch.Size,
        classes: int = 10,
        kernel: int = 3,
        activation: str = "relu",
        affine: bool = True,
    ):
        super().__init__()
        channels, height, width = shape
        self.first = Convolution(channels, 3, kernel)
        self.second = Convolution(3, 3, kernel)
        self.norm = nn.BatchNorm2d(3, affine=affine, track_running_stats=False)
        pooled = 3 * (height // 2) * (width // 2)
        self.head = nn.Linear(pooled, classes)
        self.activation = {"relu": torch.relu, "sigmoid": torch.sigmoid}[activation]
        variances = (1 / 27, 1 / 81, 1 / (pooled * classes))
        for layer, variance in zip((self.first, self.second, self.head), variances, strict=True):
            nn.init.normal_(layer.weight, std=variance**0.5)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, images_BXHW: Tensor) -> Tensor:
        """(B, X, height, width) images to (B, classes) scores."""
        hidden = self.second(self.activation(self.first(images_BXHW)))
        # A grey image is repeated over the channels; a colour image has three already.
        hidden = F.max_pool2d(self.activation(hidden + images_BXHW), 2)
        return self.head(self.norm(hidden).flatten(1))


def convnet(shape: torch.Size, classes: int) -> ConvNet:
    """The paper's ConvNet: 3x3 kernels, ReLU."""
    return ConvNet(shape, classes)


def convnet5x5(shape: torch.Size, classes: int) -> ConvNet:
    """The kernel-size variant: 5x5."""
    return ConvNet(shape, classes, kernel=5)


def convnet_sigmoid(shape: torch.Size, classes: int) -> ConvNet:
    """The activation variant: sigmoid."""
    return ConvNet(shape, classes, activation="sigmoid")
