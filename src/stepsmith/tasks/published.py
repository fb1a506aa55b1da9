"""The data of "Transferring Learned Optimizers" as they were really used.

Shape letters: M = examples, B = examples of a batch, C = copies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepsmith.tasks.base import Batch, check_split, onto
from stepsmith.tasks.data import ArrayData, as_data
from stepsmith.tasks.datasets import ImageSet

_HALVES_SEED = 10
"""Of the permutation that halves a set; the published one is not known."""


@dataclass(frozen=True)
class PublishedHalves(ArrayData):
    """One half of the training images to meta-train on, one half of the test images for all else.

    What the paper calls training loss is measured on 5,000 test images, in epochs of 40 batches of
    128 whose last has the 8 images that are left; rules are selected and rates tuned on the same
    images. Made to recognise the published figures, not to be followed.

    Attributes:
        train: meta-training examples, drawn with replacement.
        test: examples of the splits `train`, `meta_valid` and `test`; a stream of the first two
            goes through them in epochs, every epoch in an order of its own.

    Source: Daduryan, "Transferring Learned Optimizers", and its public code.
    """

    @classmethod
    def of(cls, images: ImageSet) -> PublishedHalves:
        """The halves of a set."""
        whole = as_data(images)
        assert whole.test is not None
        name = f"{whole.name}, halves as published"
        halves = _half(whole.train), _half(whole.test)
        return cls(*halves, name, whole.scale, standardise=whole.standardise)

    def to(self, device: torch.device) -> PublishedHalves:
        """The same data on a device."""
        moved = super().to(device)
        return dataclasses.replace(
            self, train=moved.train, test=moved.test, standardise=moved.standardise
        )

    def draw(self, generators: Sequence[torch.Generator], split: str, size: int) -> Batch:
        """(C, size, ...) inputs and targets, drawn with replacement."""
        own = "train" if check_split(split) == "meta_train" else "test"
        return super().draw(generators, own, size)

    def stream(
        self, generators: Sequence[torch.Generator], split: str, size: int
    ) -> Iterator[Batch]:
        """Epochs over the half of the test images; endless draws for `meta_train`."""
        if check_split(split) not in ("train", "meta_valid"):
            yield from super().stream(generators, split, size)
        assert self.test is not None
        inputs, targets = self.test
        while True:
            drawn = [torch.randperm(len(inputs), generator=g, device=g.device) for g in generators]
            order_CM = onto(torch.stack(drawn), inputs.device)
            for index_CB in order_CM.split(size, dim=1):
                yield self._finished(self._cast(inputs[index_CB])), targets[index_CB]


def _half(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(_HALVES_SEED)
    index = torch.randperm(len(pair[0]), generator=generator)[: len(pair[0]) // 2]
    return pair[0][index], pair[1][index]
