"""Many copies of one task in one flat tensor.

Shape letters: C = copies, P = parameters of one optimizee (all tensors, flattened and joined),
B = examples of a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor

from stepsmith.layout import Layout
from stepsmith.rules.base import require_count, require_kind
from stepsmith.tasks.base import Batch, Buffers, Task
from stepsmith.tasks.plain import require_graph, require_number
from stepsmith.unroll.graphs import CapturedGradient, Gradient


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "stepsmith", torch.set_num_threads, (1,))


@contextmanager
def one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """A pool of as many threads as torch uses, each of them running torch on itself alone."""
    threads = torch.get_num_threads()
    try:
        yield _pool(threads)
    finally:
        # The BLAS library's count is global: the pool's threads have set it to one.
        torch.set_num_threads(threads)


class Copies:
    """C copies of a task, each with random numbers of its own, so that a seed means the same run
    whatever runs beside it.

    Args:
        task: the task.
        seeds: one a copy.

    Attributes:
        theta: (C, P) parameters.
        buffers: stacked buffers, (C, ...) each.
        generators: one a copy: starts, batches and dropout all come from it.

    Raises:
        ValueError: no seeds, or one below 0.
        TypeError: an argument of another type.

    `gradients` raises ValueError where a loss is no single number, or depends on no parameter.
    """

    def __init__(self, task: Task, seeds: Sequence[int]):
        require_kind("Copies", "task", task, Task)
        require_kind("Copies", "seeds", seeds, Iterable, "whole numbers, one a copy")
        seeds = [require_count("Copies", "each of the seeds", seed, least=0) for seed in seeds]
        if not seeds:
            raise ValueError("Copies: needs a seed for each copy, got none")
        self.task = task
        self._owner = type(task).__name__
        self.generators = [torch.Generator() for _ in seeds]
        starts = []
        for generator, seed in zip(self.generators, seeds, strict=True):
            generator.manual_seed(seed)
            starts.append(task.init(generator))
        self.layout = Layout.of(starts[0][0])
        self.theta = torch.stack([self.layout.flatten(params) for params, _ in starts])
        self.buffers: Buffers = {
            key: torch.stack([buffers[key] for _, buffers in starts]) for key in starts[0][1]
        }
        self._gradient: Gradient | None = None
        if task.capturable and self.theta.is_cuda:
            self._gradient = CapturedGradient(partial(self._of_one, generator=None))

    def __len__(self) -> int:
        return len(self.generators)

    def restart(self, copy: int) -> None:
        """A fresh start for one copy, from its own generator."""
        params, buffers = self.task.init(self.generators[copy])
        self.theta[copy] = self.layout.flatten(params)
        for key, value in buffers.items():
            self.buffers[key][copy] = value

    def batches(self, split: str) -> Batch:
        """One batch a copy, stacked."""
        return self.task.batches(self.generators, split)

    def stream(self, split: str) -> Iterator[Batch]:
        """The batches of one roll, as the task hands them out."""
        return self.task.stream(self.generators, split)

    def gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses (C,) and gradients (C, P) on a stacked batch; buffers move on."""
        if self.task.stacking == "vmap" and len(self) > 1:
            return self._stacked(batch)
        alone = partial(self._alone, batch=batch)
        if self.task.stacking == "threads" and len(self) > 1:
            with one_thread_each() as pool:
                done = list(pool.map(alone, range(len(self))))
        else:
            done = [alone(copy) for copy in range(len(self))]
        losses, grads, buffers = zip(*done, strict=True)
        self.buffers = {key: _stacked([b[key] for b in buffers]) for key in self.buffers}
        return _stacked(losses), _stacked(grads)

    def _alone(self, copy: int, batch: Batch) -> tuple[Tensor, Tensor, Buffers]:
        """Loss (), gradient (P,) and buffers of one copy, by its graph where it is captured."""
        own = {key: value[copy] for key, value in self.buffers.items()}
        given = (self.theta[copy], own, tuple(part[copy] for part in batch))
        if self._gradient is None:
            return self._of_one(*given, generator=self.generators[copy])
        loss, grad_P, moved = self._gradient(*given)
        if len(self) > 1:  # the next copy's lie there too
            moved = {key: value.clone() for key, value in moved.items()}
        return loss, grad_P, moved

    def _of_one(
        self, theta_P: Tensor, buffers: Buffers, batch: Batch, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Buffers]:
        """The same by ordinary autograd."""
        theta_P = theta_P.detach().requires_grad_()
        params = self.layout.views(theta_P)
        loss, moved, _ = self.task.loss(params, buffers, batch, generator, True)
        require_number(self._owner, loss)
        require_graph(self._owner, loss)
        (grad_P,) = torch.autograd.grad(loss, theta_P)
        return loss.detach(), grad_P, moved

    def _stacked(self, batch: Batch) -> tuple[Tensor, Tensor]:
        theta_CP = self.theta.detach().requires_grad_()
        with self.task.randomness(self.generators[0]):
            losses_C, moved = torch.func.vmap(self._loss, randomness="different")(
                theta_CP, self.buffers, batch
            )
        require_graph(self._owner, losses_C)
        # Within vmap nothing says that it has a graph.
        self.buffers = {key: value.detach() for key, value in moved.items()}
        (grad_CP,) = torch.autograd.grad(losses_C.sum(), theta_CP)
        return losses_C.detach(), grad_CP

    def _loss(self, theta_P: Tensor, buffers: Buffers, batch: Batch) -> tuple[Tensor, Buffers]:
        loss, buffers, _ = self.task.loss(self.layout.views(theta_P), buffers, batch, None, True)
        require_number(self._owner, loss)
        return loss, buffers

    @torch.no_grad()
    def test(self) -> dict[str, Tensor]:
        """Mean loss and metrics over the whole test split: `loss` and each metric, (C,) each; a
        metric of which nothing counts is left out."""
        rows = []
        for copy in range(len(self)):
            params = self.layout.views(self.theta[copy])
            own = {key: value[copy] for key, value in self.buffers.items()}
            totals: dict[str, Tensor] = {}
            counts: Counter[str] = Counter()
            for batch in self.task.test_batches():
                loss, _, metrics = self.task.loss(params, own, batch, None, False)
                require_number(self._owner, loss)
                for key, value in {"loss": loss, **metrics}.items():
                    if size := self.task.test_weight(key, batch):
                        totals[key] = totals.get(key, torch.zeros_like(value)) + value * size
                        counts[key] += size
            rows.append({key: value / counts[key] for key, value in totals.items()})
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    # One part needs no copy.
    return parts[0][None] if len(parts) == 1 else torch.stack(tuple(parts))
