"""A task that is another one seen differently."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from stepsmith.tasks.base import Batch, Buffers, Metrics, Params, Task


class WrappedTask(Task):
    """Data, device and ways to be run of another task; what starts, and where it is changed
    the loss too, are the subclass's.

    Args:
        task: the other one.
    """

    def __init__(self, task: Task):
        self.task = task
        self.name = task.name
        self.device, self.has_test = task.device, task.has_test
        self.stacking, self.capturable = task.stacking, task.capturable
        self.frozen = task.frozen

    @property
    def data_name(self) -> str:
        """The other task's data."""
        return self.task.data_name

    @property
    def network_name(self) -> str:
        """The other task's optimizee."""
        return self.task.network_name

    @property
    def batch_size(self) -> int | None:
        """The other task's, where it has one."""
        return getattr(self.task, "batch_size", None)

    @property
    def details(self) -> dict[str, Any]:
        """The other task's."""
        return self.task.details

    def batch(self, generator: torch.Generator, split: str) -> Batch:
        """As the other task."""
        return self.task.batch(generator, split)

    def batches(self, generators: Sequence[torch.Generator], split: str) -> Batch:
        """As the other task."""
        return self.task.batches(generators, split)

    def stream(self, generators: Sequence[torch.Generator], split: str) -> Iterator[Batch]:
        """As the other task."""
        return self.task.stream(generators, split)

    def test_batches(self) -> Iterator[Batch]:
        """As the other task."""
        return self.task.test_batches()

    def test_weight(self, metric: str, batch: Batch) -> int:
        """As the other task."""
        return self.task.test_weight(metric, batch)

    def randomness(self, generator: torch.Generator) -> AbstractContextManager[None]:
        """As the other task."""
        return self.task.randomness(generator)

    def loss(
        self,
        params: Params,
        buffers: Buffers,
        batch: Batch,
        generator: torch.Generator | None,
        train: bool,
    ) -> tuple[Tensor, Buffers, Metrics]:
        """As the other task."""
        return self.task.loss(params, buffers, batch, generator, train)
