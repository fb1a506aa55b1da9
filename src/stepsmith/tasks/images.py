"""Image classification: a network of the papers on a data set, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stepsmith.names import unknown
from stepsmith.tasks.augment import load_variant
from stepsmith.tasks.data import as_data
from stepsmith.tasks.datasets import ImageSet
from stepsmith.tasks.module import ModuleTask
from stepsmith.tasks.networks.convnet import convnet, convnet5x5, convnet_sigmoid
from stepsmith.tasks.networks.mlp import mlp

NETWORKS: dict[str, Callable[[torch.Size, int], nn.Module]] = {
    "mlp": mlp,
    "convnet": convnet,
    "convnet5x5": convnet5x5,
    "convnet-sigmoid": convnet_sigmoid,
}


class ImageTask(ModuleTask):
    """A network of `NETWORKS` classifying images by cross-entropy.

    Args:
        network: one of `NETWORKS`.
        images: an `ImageSet`, or the name of one for `load_images`, with variants such as
            `mnist@1000@shift` (see `stepsmith.tasks.augment.load_variant`).
        batch_size: examples of a batch.
        source, data_dir: where a named set comes from, as in `load_images`.
        options: as for `ModuleTask`.

    Raises:
        ValueError: unknown network, data set or variant.
    """

    def __init__(
        self,
        network: str,
        images: ImageSet | str,
        *,
        batch_size: int = 128,
        source: str = "auto",
        data_dir: str | Path | None = None,
        **options: Any,
    ):
        if network not in NETWORKS:
            raise unknown("network", network, NETWORKS)
        if isinstance(images, str):
            images, augment = load_variant(images, source=source, data_dir=data_dir)
        else:
            augment = None
        shape = images.train_images.shape[1:]
        self._network = network
        super().__init__(
            lambda: NETWORKS[network](shape, images.num_classes),
            F.cross_entropy,
            replace(as_data(images), augment=augment),
            batch_size=batch_size,
            name=f"{network}-{images.name}",
            **options,
        )

    @property
    def network_name(self) -> str:
        """The network's name."""
        return self._network
