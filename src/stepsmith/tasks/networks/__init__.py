"""Optimizees by name, one family a file.

Two kinds of names: those of `NETWORKS`, and those that say how a network of one of `FORMS` is
built, such as `mlp32x32-tanh`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from stepsmith.names import unknown
from stepsmith.tasks.networks import cnn, mlp
from stepsmith.tasks.networks.convnet import convnet, convnet5x5, convnet_sigmoid
from stepsmith.tasks.networks.gru import gru_rows
from stepsmith.tasks.networks.mobilenet import mobilenetv2
from stepsmith.tasks.networks.resnet import resnet_small, resnet_small_gn
from stepsmith.tasks.networks.resnet_cifar import resnet8, resnet18, resnet20
from stepsmith.tasks.networks.vgg import vgg16, vgg_small
from stepsmith.tasks.networks.vit import mixer_small, vit_small

Build = Callable[[torch.Size, int], nn.Module]
"""Makes a freshly initialised network for images of a shape (channels, height, width) and a number
of classes."""

NETWORKS: dict[str, Build] = {
    "mlp": mlp.mlp,
    "convnet": convnet,
    "convnet5x5": convnet5x5,
    "convnet-sigmoid": convnet_sigmoid,
    "linear": mlp.linear,
    "resnet-small": resnet_small,
    "resnet-small-gn": resnet_small_gn,
    "vit-small": vit_small,
    "mixer-small": mixer_small,
    "gru-rows": gru_rows,
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet18": resnet18,
    "vgg-small": vgg_small,
    "vgg16": vgg16,
    "mobilenetv2": mobilenetv2,
}
"""Networks with a name of their own; the first four are those of "Transferring Learned Optimizers",
the last six the customary ones for 32x32 images."""

FORMS: dict[str, Callable[[str], Build | None]] = {mlp.FORM: mlp.parse, cnn.FORM: cnn.parse}
"""Families whose names say how they are built, with what reads such a name."""


def find_network(name: str) -> Build | None:
    """What builds the network of this name, or None where there is none."""
    if name in NETWORKS:
        return NETWORKS[name]
    return next((build for parse in FORMS.values() if (build := parse(name))), None)


def get_network(name: str) -> Build:
    """What builds the network of this name.

    Raises:
        ValueError: there is none; lists the names and forms there are.

    >>> build = get_network("mlp32x16-tanh")
    >>> sum(p.numel() for p in build(torch.Size([1, 8, 8]), 10).parameters())
    2778
    """
    build = find_network(name)
    if build is None:
        raise unknown("network", name, [*NETWORKS, *FORMS])
    return build


__all__ = ["FORMS", "NETWORKS", "Build", "find_network", "get_network"]
