"""MobileNetV2 for 32x32 images.

Shape letters: B = batch, X = input channels, Y = output channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepsmith.tasks.networks.convolutions import channels_last, convolution, he_normal

STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip
"""Expansion, channels, blocks and first stride of each stage (t, c, n and s of the paper)."""


class InvertedResidual(nn.Module):
    """shortcut(x) + project(depthwise(expand(x))), of stride 2 without the shortcut.

    `expand` is 1x1 and `depthwise` 3x3, each with batch-norm and ReLU6; `project` is 1x1 with
    batch-norm alone. The shortcut is the identity, or a 1x1 convolution and batch-norm where the
    number of channels changes.

    Args:
        inputs: X.
        outputs: Y.
        expansion: hidden channels for each of X.
        stride: of `depthwise`.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int):
        super().__init__()
        hidden = expansion * inputs
        self.expand = convolution(inputs, hidden, 1)
        self.expand_norm = nn.BatchNorm2d(hidden)
        self.depthwise = convolution(hidden, hidden, stride=stride, groups=hidden)
        self.depthwise_norm = nn.BatchNorm2d(hidden)
        self.project = convolution(hidden, outputs, 1)
        self.project_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module | None = None
        if stride == 1:
            self.shortcut = (
                nn.Identity()
                if inputs == outputs
                else nn.Sequential(convolution(inputs, outputs, 1), nn.BatchNorm2d(outputs))
            )

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, X, height, width) to (B, Y, height / stride, width / stride), rounded up."""
        inner = F.relu6(self.expand_norm(self.expand(hidden)))
        inner = F.relu6(self.depthwise_norm(self.depthwise(inner)))
        inner = self.project_norm(self.project(inner))
        return inner if self.shortcut is None else self.shortcut(hidden) + inner


class MobileNetV2(nn.Module):
    """conv 3x3 (32 channels), the `STAGES`, conv 1x1 (1,280 channels), mean over pixels, linear.

    This is the customary form for CIFAR, 2,296,922 parameters with 10 classes. It departs from the
    paper in three things: the stem and the second stage have stride 1, so that a 32x32 image ends
    as 4x4 pixels; the first block, whose expansion is 1, has an `expand` too (1,088 parameters);
    and the four blocks of stride 1 that change the number of channels have projection shortcuts
    where the paper's have none (59,152). Weights as in `he_normal`; no dropout.

    Args:
        shape: (channels, height, width) of an image.
        classes: outputs.

    Source: Sandler et al. 2018, arXiv:1801.04381, tables 1 and 2.
    """

    def __init__(self, shape: torch.Size, classes: int):
        super().__init__()
        self.stem = convolution(shape[0], 32)
        self.stem_norm = nn.BatchNorm2d(32)
        blocks: list[nn.Module] = []
        inputs = 32
        for expansion, outputs, count, stride in STAGES:
            for block in range(count):
                blocks.append(InvertedResidual(inputs, outputs, expansion, 1 if block else stride))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = convolution(inputs, 1280, 1)
        self.last_norm = nn.BatchNorm2d(1280)
        self.head = nn.Linear(1280, classes)
        he_normal(self)

    def forward(self, images_BXHW: Tensor) -> Tensor:
        """(B, X, height, width) images to (B, classes) scores."""
        hidden = F.relu6(self.stem_norm(channels_last(self.stem(images_BXHW))))
        hidden = F.relu6(self.last_norm(self.last(self.blocks(hidden))))
        return self.head(hidden.mean((2, 3)))


def mobilenetv2(shape: torch.Size, classes: int) -> MobileNetV2:
    """MobileNetV2 of width 1."""
    return MobileNetV2(shape, classes)
