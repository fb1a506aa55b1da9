"""The small residual ConvNet of "Transferring Learned Optimizers", and its variants.

Shape letters: B = batch, X = image channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepsmith.tasks.networks.few_channels import Convolution
from stepsmith.tasks.networks.residual_block import residual_block


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
        self.activation = activation
        variances = (1 / 27, 1 / 81, 1 / (pooled * classes))
        for layer, variance in zip((self.first, self.second, self.head), variances, strict=True):
            nn.init.normal_(layer.weight, std=variance**0.5)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, images_BXHW: Tensor) -> Tensor:
        """(B, X, height, width) images to (B, classes) scores."""
        first, second = self.first, self.second
        assert first.bias is not None
        assert second.bias is not None
        weights = (first.weight, first.bias, second.weight, second.bias)
        hidden = residual_block(images_BXHW, weights, self.activation)
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
