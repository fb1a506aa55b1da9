"""The MLP of "Transferring Learned Optimizers": one hidden layer of 20 sigmoid units."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """inputs-hidden-...-classes, weights N(0, 1/fan-in), biases zero.

    Args:
        inputs: pixels of a flattened image; 784 for MNIST.
        hidden: units of each hidden layer.
        classes: outputs.
        activation: module class of the nonlinearity.

    Source: Daduryan, "Transferring Learned Optimizers", section 3.2; 15,910 parameters.
    """

    def __init__(
        self,
        inputs: int = 784,
        hidden: tuple[int, ...] = (20,),
        classes: int = 10,
        activation: type[nn.Module] = nn.Sigmoid,
    ):
        super().__init__()
        sizes = (inputs, *hidden, classes)
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            linear = nn.Linear(fan_in, fan_out)
            nn.init.normal_(linear.weight, std=fan_in**-0.5)
            nn.init.zeros_(linear.bias)
            layers += [linear, activation()]
        self.layers = nn.Sequential(nn.Flatten(-3), *layers[:-1])

    def forward(self, images: Tensor) -> Tensor:
        """(..., channels, height, width) images to (..., classes) scores."""
        return self.layers(images)


def mlp(shape: torch.Size, classes: int) -> MLP:
    """The paper's MLP for images of `shape` (channels, height, width)."""
    return MLP(shape.numel(), classes=classes)
