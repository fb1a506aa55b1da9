"""Examples in memory, batched on the device by index.

Shape letters: M = examples, B = examples of a batch, C = copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stepsmith.tasks.base import Batch, check_split, onto
from stepsmith.tasks.datasets import ImageSet
from stepsmith.tasks.sources import where_from
from stepsmith.tasks.standardise import Standardise

HELD_OUT = 10
"""Every tenth training example belongs to `meta_valid`, the others to `meta_train`."""


@dataclass(frozen=True)
class ArrayData:
    """Inputs and targets of a training and a test split.

    Args:
        train: (M, ...) inputs and (M, ...) targets.
        test: the same for the test split, or None.
        name: for records.
        scale: factor on uint8 inputs, which become float32 when batched.
        augment: changes training batches, (C, B, ...) inputs, with one generator a copy (see
            `stepsmith.tasks.augment`); the test split never.
        standardise: the last change of every batch, of both splits, or None.

    Raises:
        ValueError: no examples, fewer than two, or counts that differ.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None = None
    name: str = "data"
    scale: float = 1 / 255
    augment: Callable[[Tensor, Sequence[torch.Generator]], Tensor] | None = None
    standardise: Standardise | None = None

    def __post_init__(self):
        for split, pair in (("train", self.train), ("test", self.test)):
            if pair is None:
                continue
            inputs, targets = pair
            if len(inputs) != len(targets) or len(inputs) == 0:
                raise ValueError(
                    f"{self.name}: the {split} split has {len(inputs)} inputs and "
                    f"{len(targets)} targets; it needs the same number of both, at least one"
                )
        if len(self.train[0]) < 2:
            raise ValueError(f"{self.name}: needs at least 2 training examples (one is held out)")

    def to(self, device: torch.device) -> ArrayData:
        """The same data on a device."""
        train = (self.train[0].to(device), self.train[1].to(device))
        test = None if self.test is None else (self.test[0].to(device), self.test[1].to(device))
        standardise = None if self.standardise is None else self.standardise.to(device)
        return replace(self, train=train, test=test, standardise=standardise)

    def draw(self, generators: Sequence[torch.Generator], split: str, size: int) -> Batch:
        """Batches drawn with replacement, one a generator: (C, size, ...) inputs and targets.

        Each generator's draw is its own, so that a seed sees the same batches however many copies
        run beside it.
        """
        pair = self.test if check_split(split) == "test" else self.train
        if pair is None:
            raise ValueError(f"{self.name}: there is no test split")
        inputs, targets = pair
        count = len(inputs)
        held = -(-count // HELD_OUT)
        span = {"meta_train": count - held, "meta_valid": held}.get(split, count)
        chosen = [torch.randint(span, (size,), generator=g, device=g.device) for g in generators]
        index = onto(torch.stack(chosen), inputs.device)
        if split == "meta_valid":
            index = index * HELD_OUT
        elif split == "meta_train" and count > 1:
            # 0..8 -> 1..9, 9..17 -> 11..19: all but the multiples of ten.
            index = index + index // (HELD_OUT - 1) + 1
        # index_select copies whole rows; indexing would walk them number by number.
        flat = index.reshape(-1)
        drawn = inputs.index_select(0, flat).view(*index.shape, *inputs.shape[1:])
        labels = targets.index_select(0, flat).view(*index.shape, *targets.shape[1:])
        drawn = self._cast(drawn)
        if self.augment is not None and split != "test":
            drawn = self.augment(drawn, generators)
        return self._finished(drawn), labels

    def stream(
        self, generators: Sequence[torch.Generator], split: str, size: int
    ) -> Iterator[Batch]:
        """Endless draws."""
        while True:
            yield self.draw(generators, split, size)

    def test_batches(self, size: int) -> Iterator[Batch]:
        """The test split in order, in batches of at most `size`."""
        if self.test is not None:
            for inputs, targets in zip(
                self.test[0].split(size), self.test[1].split(size), strict=True
            ):
                yield self._finished(self._cast(inputs)), targets

    def _cast(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale if inputs.dtype == torch.uint8 else inputs

    def _finished(self, inputs: Tensor) -> Tensor:
        return inputs if self.standardise is None else self.standardise(inputs)


def as_data(data: Any, name: str = "data") -> ArrayData:
    """Make `ArrayData` of what users have.

    Args:
        data: `ArrayData`, an `ImageSet`, (inputs, targets), (train, test) pairs of those, or a
            map-style data set of (input, target) items, which is read into memory once.
        name: for records, where `data` has none.

    Raises:
        TypeError: none of these.
    """
    if isinstance(data, ArrayData):
        return data
    if isinstance(data, ImageSet):
        return ArrayData(
            (data.train_images, data.train_labels),
            (data.test_images, data.test_labels),
            f"{data.name} ({where_from(data.origin)}, {len(data.train_labels):,} images)",
            standardise=Standardise.of(data.train_images) if data.standardised else None,
        )
    if isinstance(data, tuple | list) and len(data) == 2:
        if all(isinstance(part, Tensor) for part in data):
            return ArrayData((data[0], data[1]), name=name)
        train, test = (as_data(part, name) for part in data)
        return ArrayData(train.train, test.train, name, standardise=train.standardise)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        items = [data[i] for i in range(len(data))]
        if items and all(isinstance(item, tuple | list) and len(item) == 2 for item in items):
            inputs = torch.stack([torch.as_tensor(item[0]) for item in items])
            targets = torch.stack([torch.as_tensor(item[1]) for item in items])
            return ArrayData((inputs, targets), name=name)
    raise TypeError(
        f"data must be (inputs, targets) tensors, a (train, test) pair of those, an ImageSet or a "
        f"map-style data set of (input, target) items; got {type(data).__name__}"
    )
