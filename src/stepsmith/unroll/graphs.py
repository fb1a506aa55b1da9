"""An optimizee's gradient as a CUDA graph: its hundreds of small kernels in one launch.

Shape letters: P = parameters of one optimizee.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepsmith.tasks.base import Batch, Buffers

Gradient = Callable[[Tensor, Buffers, Batch], tuple[Tensor, Tensor, Buffers]]
"""Parameters (P,), buffers and a batch to the loss (), its gradient (P,) and the new buffers."""

WARM_UP = 3
"""Runs before the capture, in which libraries choose and load their kernels."""


class CapturedGradient:
    """A gradient captured on its first call and replayed from then on.

    What is given is copied to where the graph reads it, and what it computes is handed out as
    copies, so that callers need not know of it. A batch of other shapes is captured anew.

    Args:
        gradient: the same kernels at every call, with no look at their numbers on the way (see
            `Task.capturable`), on a CUDA device.
    """

    def __init__(self, gradient: Gradient):
        self._gradient = gradient
        self._shapes: list[torch.Size] = []

    def __call__(
        self, theta_P: Tensor, buffers: Buffers, batch: Batch
    ) -> tuple[Tensor, Tensor, Buffers]:
        """As the gradient itself."""
        if self._shapes != [part.shape for part in batch]:
            self._capture(theta_P, buffers, batch)
        given = (theta_P, *buffers.values(), *batch)
        read = (self._theta_P, *self._buffers.values(), *self._batch)
        for source, target in zip(given, read, strict=True):
            target.copy_(source)
        self._graph.replay()
        loss, grad_P, moved = self._computed
        return loss.clone(), grad_P.clone(), {key: value.clone() for key, value in moved.items()}

    def _capture(self, theta_P: Tensor, buffers: Buffers, batch: Batch) -> None:
        self._shapes = [part.shape for part in batch]
        self._theta_P = theta_P.clone()
        self._buffers = {key: value.clone() for key, value in buffers.items()}
        self._batch = tuple(part.clone() for part in batch)
        read = (self._theta_P, self._buffers, self._batch)
        # Libraries set themselves up on first use, which a capture forbids; and not on the default
        # stream, which others wait for.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._gradient(*read)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._computed = self._gradient(*read)
