"""Noisy batches on purpose: now and then a batch holds only a few distinct examples.

Shape letters: C = copies, B = examples of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from stepsmith.tasks.base import Batch, Task
from stepsmith.tasks.data import ArrayData
from stepsmith.tasks.module import ModuleTask


@dataclass(frozen=True)
class NoisyData(ArrayData):
    """Data whose streams repeat a few examples to a whole batch every so often.

    All other batches are those of the same seed without noise, so that runs are paired.

    Args:
        every: steps from one noisy batch to the next; the first is batch number `every` of a roll,
            so that meta-training in shorter windows sees none.
        distinct: examples of a noisy batch.

    Raises:
        ValueError: `every` or `distinct` below 1.
    """

    every: int = 40
    distinct: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.every < 1 or self.distinct < 1:
            raise ValueError(
                f"{self.name}: every and distinct must be at least 1, got {self.every} and "
                f"{self.distinct}"
            )

    def to(self, device: torch.device) -> NoisyData:
        """The same data on a device."""
        moved = super().to(device)
        return dataclasses.replace(
            self, train=moved.train, test=moved.test, standardise=moved.standardise
        )

    def stream(
        self, generators: Sequence[torch.Generator], split: str, size: int
    ) -> Iterator[Batch]:
        """Endless draws of (C, size, ...) inputs and targets, every so often noisy."""
        for number, (inputs, targets) in enumerate(super().stream(generators, split, size), 1):
            if number % self.every == 0:
                index = torch.arange(size, device=inputs.device) % min(self.distinct, size)
                inputs, targets = inputs[:, index], targets[:, index]
            yield inputs, targets


def with_noisy_batches(task: Task, every: int = 40, distinct: int = 8) -> Task:
    """Give a task noisy batches, in place, and a name that says so.

    Args:
        task: a fresh `ModuleTask` on data in memory.
        every, distinct: see `NoisyData`.

    Returns:
        The task.

    Raises:
        TypeError: a task of another kind.
    """
    if not isinstance(task, ModuleTask):
        raise TypeError(f"with_noisy_batches: needs a ModuleTask, got {type(task).__name__}")
    data = task.data
    task.data = NoisyData(
        data.train, data.test, data.name, data.scale, every=every, distinct=distinct,
        augment=data.augment, standardise=data.standardise,
    )  # fmt: skip
    task.name = f"{task.name}, noisy"
    return task
