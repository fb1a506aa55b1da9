"""Multi-layer perceptrons: the one of "Transferring Learned Optimizers", and any by name.

A name such as `mlp64-relu`, `mlp32x32-tanh` or `mlp20x20-gelu-ln` gives the units of each hidden
layer, the activation, and optionally a normalisation after each hidden layer's linear map.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU, "silu": nn.SiLU,
    "elu": nn.ELU,
}  # fmt: skip
"""Activations by the name they have in a network's name."""

NORMS: dict[str, type[nn.Module]] = {"bn": nn.BatchNorm1d, "ln": nn.LayerNorm}
"""Normalisations of a hidden layer by the name they have in a network's name."""

FORM = "mlpWxW-ACTIVATION[-bn|-ln]"
"""How the names `parse` knows are made."""

_NAME = re.compile(
    rf"mlp([1-9]\d*(?:x[1-9]\d*)*)-({'|'.join(ACTIVATIONS)})(?:-({'|'.join(NORMS)}))?"
)


class MLP(nn.Module):
    """inputs-hidden-...-classes.

    Args:
        inputs: pixels of a flattened image; 784 for MNIST.
        hidden: units of each hidden layer.
        classes: outputs.
        activation: module class of the nonlinearity.
        norm: module class of a normalisation before it, made of the number of units; or None.
        paper: weights N(0, 1/fan-in) and biases zero, as in the paper; otherwise both are as
            `nn.Linear` draws them, uniform within 1/sqrt(fan-in), which is what most people train.

    Source of the paper's: Daduryan, "Transferring Learned Optimizers", section 3.2; 15,910
    parameters.
    """

    def __init__(
        self,
        inputs: int = 784,
        hidden: tuple[int, ...] = (20,),
        classes: int = 10,
        activation: type[nn.Module] = nn.Sigmoid,
        norm: type[nn.Module] | None = None,
        paper: bool = True,
    ):
        super().__init__()
        sizes = (inputs, *hidden, classes)
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            linear = nn.Linear(fan_in, fan_out)
            if paper:
                nn.init.normal_(linear.weight, std=fan_in**-0.5)
                nn.init.zeros_(linear.bias)
            layers += [linear] if norm is None else [linear, norm(fan_out)]
            layers.append(activation())
        # The scores are neither normalised nor activated.
        kept = layers[: -1 if norm is None else -2]
        self.layers = nn.Sequential(nn.Flatten(-3), *kept)

    def forward(self, images: Tensor) -> Tensor:
        """(..., channels, height, width) images to (..., classes) scores."""
        return self.layers(images)


def mlp(shape: torch.Size, classes: int) -> MLP:
    """The paper's MLP for images of `shape` (channels, height, width)."""
    return MLP(shape.numel(), classes=classes)


def linear(shape: torch.Size, classes: int) -> MLP:
    """Logistic regression: no hidden layer, initial values as `nn.Linear` draws them."""
    return MLP(shape.numel(), (), classes, paper=False)


def parse(name: str) -> Callable[[torch.Size, int], MLP] | None:
    """The builder a name of the form `FORM` means, or None where it has another form."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    hidden = tuple(int(units) for units in found[1].split("x"))
    activation, norm = ACTIVATIONS[found[2]], NORMS[found[3]] if found[3] else None

    def build(shape: torch.Size, classes: int) -> MLP:
        return MLP(shape.numel(), hidden, classes, activation, norm, paper=False)

    return build
