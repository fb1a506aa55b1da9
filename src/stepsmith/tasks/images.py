"""Image classification: a network on a data set, both by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from stepsmith.tasks.data import as_data
from stepsmith.tasks.datasets import ImageSet
from stepsmith.tasks.module import ModuleTask
from stepsmith.tasks.networks import get_network
from stepsmith.tasks.variants import load_variant


class ImageTask(ModuleTask):
    """A network classifying images by cross-entropy.

    Args:
        network: a name that `stepsmith.tasks.networks` knows, such as `convnet` or `mlp64-relu`.
        images: an `ImageSet`, or the name of one for `load_images`, with variants such as
            `mnist@1000@shift` (see `stepsmith.tasks.variants.load_variant`).
        batch_size: examples of a batch.
        source, data_dir: where a named set comes from, as in `load_images`.
        options: as for `ModuleTask`.

    Raises:
        ValueError: unknown network, data set or variant.
    """

    library = True

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
        build = get_network(network)
        if isinstance(images, str):
            images, augment = load_variant(images, source=source, data_dir=data_dir)
        else:
            augment = None
        shape = images.train_images.shape[1:]
        self._network = network
        super().__init__(
            lambda: build(shape, images.num_classes),
            F.cross_entropy,
            replace(as_data(images), augment=augment),
            batch_size=batch_size,
            name=f"{network}-{images.name}",
            **options,
        )
        self.capturable = not self._random

    @property
    def network_name(self) -> str:
        """The network's name."""
        return self._network
