"""Small plain ConvNets by name: 3x3 convolutions of stride 2, then a linear map.

A name such as `cnn8`, `cnn8x16` or `cnn8x16-tanh-bn` gives the channels of each convolution,
optionally the activation (ReLU where none is named) and batch-norm before it.

Shape letters: B = batch, X = input channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stepsmith.tasks.networks.mlp import ACTIVATIONS

FORM = "cnnCxC[-ACTIVATION][-bn]"
"""How the names `parse` knows are made."""

_NAME = re.compile(rf"cnn([1-9]\d*(?:x[1-9]\d*)*)(?:-({'|'.join(ACTIVATIONS)}))?(-bn)?")


class CNN(nn.Module):
    """Convolutions 3x3 of stride 2 and padding 1, each followed by an activation, then linear.

    Initial values are as `nn.Conv2d` and `nn.Linear` draw them.

    Args:
        shape: (channels, height, width) of an image.
        channels: outputs of each convolution.
        classes: outputs.
        activation: module class of the nonlinearity.
        batch_norm: whether to normalise before it, with running statistics for tests.
    """

    def __init__(
        self,
        shape: torch.Size,
        channels: tuple[int, ...],
        classes: int,
        activation: type[nn.Module] = nn.ReLU,
        batch_norm: bool = False,
    ):
        super().__init__()
        inputs, height, width = shape
        layers: list[nn.Module] = []
        for outputs in channels:
            layers.append(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1))
            layers += [nn.BatchNorm2d(outputs)] if batch_norm else []
            layers.append(activation())
            inputs, height, width = outputs, -(-height // 2), -(-width // 2)
        head = nn.Linear(inputs * height * width, classes)
        self.layers = nn.Sequential(*layers, nn.Flatten(), head)

    def forward(self, images_BXHW: Tensor) -> Tensor:
        """(B, X, height, width) images to (B, classes) scores."""
        return self.layers(images_BXHW)


def parse(name: str) -> Callable[[torch.Size, int], CNN] | None:
    """The builder a name of the form `FORM` means, or None where it has another form."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    channels = tuple(int(count) for count in found[1].split("x"))
    activation, batch_norm = ACTIVATIONS[found[2] or "relu"], found[3] is not None

    def build(shape: torch.Size, classes: int) -> CNN:
        return CNN(shape, channels, classes, activation, batch_norm)

    return build
