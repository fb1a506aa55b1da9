"""VGG networks with batch-norm for 32x32 images: VGG-16, and a small one.

Shape letters: B = batch, X = input channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepsmith.tasks.networks.convolutions import channels_last, convolution, he_normal


class VGG(nn.Module):
    """Stages of (conv 3x3, batch-norm, ReLU), each with a max-pool 2, mean over pixels, linear.

    Pools round up, so that 28x28 images pass five of them as 32x32 ones do, which they leave as one
    pixel. The one linear map is the customary classifier at this size, in place of the three of
    the paper, whose first takes 7x7 pixels. Weights as in `he_normal`.

    Args:
        shape: (channels, height, width) of an image.
        classes: outputs.
        stages: channels of each convolution, stage by stage.
        bias: whether convolutions have biases. The batch-norms behind them take them away again: in
            training they change no output, and their gradients are zero up to rounding.

    Source: Simonyan & Zisserman 2015, arXiv:1409.1556, table 1; batch-norm came after it.
    """

    def __init__(
        self, shape: torch.Size, classes: int, stages: tuple[tuple[int, ...], ...], bias: bool
    ):
        super().__init__()
        layers: list[nn.Module] = []
        inputs = shape[0]
        for stage in stages:
            for outputs in stage:
                layers.append(convolution(inputs, outputs, bias=bias))
                layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.stem = layers[0]
        self.layers = nn.Sequential(*layers[1:])
        self.head = nn.Linear(inputs, classes)
        he_normal(self)

    def forward(self, images_BXHW: Tensor) -> Tensor:
        """(B, X, height, width) images to (B, classes) scores."""
        return self.head(self.layers(channels_last(self.stem(images_BXHW))).mean((2, 3)))


def vgg16(shape: torch.Size, classes: int) -> VGG:
    """Configuration D, thirteen convolutions with biases; CIFAR-10: 14,728,266 parameters."""
    stages = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
    return VGG(shape, classes, stages, bias=True)


def vgg_small(shape: torch.Size, classes: int) -> VGG:
    """The first three stages of configuration A at half their channels, without biases; CIFAR-10:
    242,474 parameters."""
    return VGG(shape, classes, ((32,), (64,), (128, 128)), bias=False)
