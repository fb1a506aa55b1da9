"""Small residual networks: basic blocks of 8 and 16 channels.

Shape letters: B = batch, X = input channels, Y = output channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepsmith.tasks.networks.few_channels import Convolution

MakeNorm = Callable[[int], nn.Module]


class Block(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))), both convolutions 3x3.

    The shortcut is the identity where channels and stride keep the shape, otherwise a 1x1
    convolution of that stride and a normalisation.

    Source: He et al. 2016, arXiv:1512.03385, figure 2 and section 3.3, option B.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: MakeNorm):
        super().__init__()
        self.first = (
            Convolution(inputs, outputs, 3)
            if stride == 1
            else nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        )
        self.first_norm = norm(outputs)
        self.second = Convolution(outputs, outputs, 3)
        self.second_norm = norm(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), norm(outputs)
            )

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, inputs, height, width) to (B, outputs, height / stride, width / stride)."""
        inner = F.relu(self.first_norm(self.first(hidden)))
        return F.relu(self.shortcut(hidden) + self.second_norm(self.second(inner)))


class ResNet(nn.Module):
    """conv 3x3 of stride 2, norm, ReLU, max-pool 2, blocks, mean over pixels, linear.

    Args:
        shape: (channels, height, width) of an image.
        classes: outputs.
        channels: of the stages; each but the first begins with stride 2.
        blocks: blocks a stage.
        norm: makes a normalisation of a number of channels.
    """

    def __init__(
        self,
        shape: torch.Size,
        classes: int,
        channels: tuple[int, ...] = (8, 16),
        blocks: int = 1,
        norm: MakeNorm = nn.BatchNorm2d,
    ):
        super().__init__()
        self.stem = nn.Conv2d(shape[0], channels[0], 3, stride=2, padding=1)
        self.stem_norm = norm(channels[0])
        stages: list[nn.Module] = []
        inputs = channels[0]
        for stage, outputs in enumerate(channels):
            for block in range(blocks):
                stages.append(Block(inputs, outputs, 2 if stage and not block else 1, norm))
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images_BXHW: Tensor) -> Tensor:
        """(B, X, height, width) images to (B, classes) scores."""
        # Small maps early: the blocks of a 28x28 image work on 7x7 pixels, and cost a third.
        hidden = F.max_pool2d(F.relu(self.stem_norm(self.stem(images_BXHW))), 2)
        return self.head(self.stages(hidden).mean((2, 3)))


def _groups_of_four(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // 4, channels)


def resnet_small(shape: torch.Size, classes: int) -> ResNet:
    """Two blocks, of 8 and 16 channels, with batch-norm; running statistics for tests."""
    return ResNet(shape, classes)


def resnet_small_gn(shape: torch.Size, classes: int) -> ResNet:
    """The same with group-norm, four channels a group."""
    return ResNet(shape, classes, norm=_groups_of_four)
