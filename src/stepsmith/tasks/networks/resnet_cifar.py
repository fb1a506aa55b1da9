"""Residual networks for 32x32 images: ResNet-8 and -20 without shortcut parameters, ResNet-18.

Shape letters: B = batch, X = input channels, Y = output channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepsmith.tasks.networks.convolutions import channels_last, convolution, he_normal


class Subsample(nn.Module):
    """Every `stride`-th pixel of each row and column, channels of zeros after the given ones.

    Args:
        added: channels of zeros.
        stride: from one pixel kept to the next.

    Source: He et al. 2016, arXiv:1512.03385, section 3.3, option A.
    """

    def __init__(self, added: int, stride: int):
        super().__init__()
        self.added, self.stride = added, stride

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, X, height, width) to (B, X + added, height / stride, width / stride), rounded up."""
        kept = hidden[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, 0, self.added))


class Block(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))), both convolutions 3x3 without bias.

    Args:
        inputs: X.
        outputs: Y.
        stride: of the first convolution.
        projection: where channels or stride change the shape, the shortcut is a 1x1 convolution and
            a normalisation (option B) in place of `Subsample` (option A); elsewhere the identity.

    Source: He et al. 2016, arXiv:1512.03385, figure 2 and section 3.3.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, projection: bool):
        super().__init__()
        self.first = convolution(inputs, outputs, stride=stride)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = convolution(outputs, outputs)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = (
                nn.Sequential(
                    convolution(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs)
                )
                if projection
                else Subsample(outputs - inputs, stride)
            )

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, X, height, width) to (B, Y, height / stride, width / stride), rounded up."""
        inner = F.relu(self.first_norm(self.first(hidden)))
        return F.relu(self.shortcut(hidden) + self.second_norm(self.second(inner)))


class CifarResNet(nn.Module):
    """conv 3x3, norm, ReLU, stages of blocks, mean over pixels, linear.

    Each stage but the first begins with stride 2. Weights as in `he_normal`.

    Args:
        shape: (channels, height, width) of an image.
        classes: outputs.
        channels: of the stages; the first's are the stem's too.
        blocks: blocks a stage.
        projection: as for `Block`.
    """

    def __init__(
        self,
        shape: torch.Size,
        classes: int,
        channels: tuple[int, ...],
        blocks: int,
        projection: bool,
    ):
        super().__init__()
        self.stem = convolution(shape[0], channels[0])
        self.stem_norm = nn.BatchNorm2d(channels[0])
        stages: list[nn.Module] = []
        inputs = channels[0]
        for stage, outputs in enumerate(channels):
            for block in range(blocks):
                stages.append(Block(inputs, outputs, 2 if stage and not block else 1, projection))
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)
        he_normal(self)

    def forward(self, images_BXHW: Tensor) -> Tensor:
        """(B, X, height, width) images to (B, classes) scores."""
        hidden = F.relu(self.stem_norm(channels_last(self.stem(images_BXHW))))
        return self.head(self.stages(hidden).mean((2, 3)))


def _thin(shape: torch.Size, classes: int, depth: int) -> CifarResNet:
    """Depth 6n + 2: three stages of n blocks with 16, 32 and 64 channels, shortcuts of option A.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2.
    """
    return CifarResNet(shape, classes, (16, 32, 64), (depth - 2) // 6, projection=False)


def resnet8(shape: torch.Size, classes: int) -> CifarResNet:
    """The section 4.2 network with one block a stage; CIFAR-10: 75,290 parameters."""
    return _thin(shape, classes, 8)


def resnet20(shape: torch.Size, classes: int) -> CifarResNet:
    """The section 4.2 network with three blocks a stage; CIFAR-10: 269,722 parameters."""
    return _thin(shape, classes, 20)


def resnet18(shape: torch.Size, classes: int) -> CifarResNet:
    """ResNet-18 in its customary form for 32x32 images; CIFAR-10: 11,173,962 parameters.

    Four stages of two blocks with 64 to 512 channels, shortcuts of option B. The stem is a 3x3
    convolution of stride 1 without max-pooling, where that for ImageNet has 7x7, stride 2 and a
    pool.

    Source: He et al. 2016, arXiv:1512.03385, table 1.
    """
    return CifarResNet(shape, classes, (64, 128, 256, 512), 2, projection=True)
