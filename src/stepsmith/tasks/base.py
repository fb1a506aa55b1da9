"""The contract of a task: something to be optimised, again and again from fresh starts.

Shape letters: B = examples of a batch, C = copies of an optimizee.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]
Buffers = dict[str, Tensor]
Batch = tuple[Tensor, ...]
Metrics = dict[str, Tensor]

Stacking = Literal["vmap", "loop", "threads"]

SPLITS = ("train", "meta_train", "meta_valid", "test")
"""`train`: everything an optimizee may train on. `meta_train` and `meta_valid` divide it in two, so
that rules are validated on examples that meta-training never saw. `test`: held out from both."""


class Task(ABC):
    """An optimizee, its data and its loss.

    Attributes:
        has_test: whether there is a `test` split, with a loss and an accuracy to measure.
        stacking: how many copies run at once: `"vmap"` stacks them, `"loop"` runs them one by one,
            `"threads"` runs them side by side, one thread each (`loss` must then be thread-safe).
            None is always fastest: convolutions with a weight per copy are slow on CPUs, and small
            ones gain nothing from a second thread.
        capturable: whether `loss` in training mode runs the same kernels whatever the numbers,
            looks at none of them on the host and draws no random ones, so that a CUDA graph can
            replay it, with its gradient.
        frozen: names of buffers that are parameters of the model, held fast.
    """

    name: str
    device: torch.device = torch.device("cpu")
    has_test: bool = True
    stacking: Stacking = "vmap"
    capturable: bool = False
    frozen: frozenset[str] = frozenset()

    @abstractmethod
    def init(self, generator: torch.Generator) -> tuple[Params, Buffers]:
        """A fresh start: parameters, and buffers (a problem's instance, running statistics)."""

    @abstractmethod
    def batch(self, generator: torch.Generator, split: str) -> Batch:
        """Draw one batch of a split (one of `SPLITS`): a tuple of tensors."""

    @abstractmethod
    def loss(
        self,
        params: Params,
        buffers: Buffers,
        batch: Batch,
        generator: torch.Generator | None,
        train: bool,
    ) -> tuple[Tensor, Buffers, Metrics]:
        """The () loss on a batch, the new buffers, and () metrics.

        Args:
            params: parameters by name.
            buffers: buffers by name; not written to.
            batch: what `batch` drew.
            generator: source of the optimizee's own randomness (dropout), or None.
            train: training mode; metrics other than the loss are needed only where False.
        """

    def randomness(self, generator: torch.Generator) -> AbstractContextManager[None]:
        """Entered around stacked copies; a task whose loss draws from torch's global generators
        seeds them from `generator` here."""
        return nullcontext()

    def batches(self, generators: Sequence[torch.Generator], split: str) -> Batch:
        """One batch for each generator, stacked: tensors of shape (C, B, ...)."""
        drawn = [self.batch(generator, split) for generator in generators]
        return tuple(torch.stack(column) for column in zip(*drawn, strict=True))

    def stream(self, generators: Sequence[torch.Generator], split: str) -> Iterator[Batch]:
        """Endless stacked batches for one roll; data that come in epochs start one here."""
        while True:
            yield self.batches(generators, split)

    def test_batches(self) -> Iterator[Batch]:
        """The whole test split, in order; nothing where there is none."""
        return iter(())

    def test_weight(self, metric: str, batch: Batch) -> int:
        """How much a test batch counts in the mean of `loss`, or of a metric, over the split: as
        many times as it has examples, where a task does not say otherwise."""
        return len(batch[0])

    @property
    def data_name(self) -> str:
        """Which data, and where from, for records."""
        return ""

    @property
    def network_name(self) -> str:
        """Which optimizee, for records."""
        return self.name

    @property
    def details(self) -> dict[str, Any]:
        """What tells the task from others of its names, start and first batches, JSON-able."""
        return {}

    @staticmethod
    def from_module(
        make_module: Callable[[], nn.Module],
        loss: Callable[[Any, Tensor], Tensor],
        data: Any,
        **options: Any,
    ) -> Task:
        """A task from an unmodified module; see `stepsmith.tasks.module.ModuleTask`."""
        from stepsmith.tasks.module import ModuleTask

        return ModuleTask(make_module, loss, data, **options)


def onto(drawn: Tensor, device: torch.device) -> Tensor:
    """Bring what a generator drew on the CPU to a device, without waiting for the device to have
    done what it was given before."""
    if device.type == "cuda" and drawn.device.type == "cpu":
        return drawn.pin_memory().to(device, non_blocking=True)
    return drawn.to(device)


def check_split(split: str) -> str:
    """Return `split`, or raise ValueError where it is none of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    return split
