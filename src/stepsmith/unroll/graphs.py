"""An optimizee's gradient as a CUDA graph: its hundreds of small kernels in one launch.

Shape letters: P = parameters of one optimizee.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepsmith.tasks.base import Batch, Buffers

Gradient = Callable[[Tensor, Buffers, Batch], tuple[Tensor, Tensor, Buffers]]
"""Parameters (P,), buffers and a batch to the loss (), its gradient (P,) and the new buffers."""

WARM_UP = 3
"""Runs before the capture, in which libraries choose and load their kernels."""


class CapturedGradient:
    """A gradient captured on its first call and replayed from then on.

    What is given is copied to where the graph reads it. Loss and gradient are handed out as copies;
    the buffers lie where the graph writes them, until the next call. A batch of other shapes is
    captured anew.

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
        _copy_all((theta_P, *buffers.values(), *batch), self._read)
        self._graph.replay()
        loss, grad_P, moved = self._computed
        return loss.clone(), grad_P.clone(), moved

    def _capture(self, theta_P: Tensor, buffers: Buffers, batch: Batch) -> None:
        self._shapes = [part.shape for part in batch]
        own = {key: value.clone() for key, value in buffers.items()}
        read = (theta_P.clone(), own, tuple(part.clone() for part in batch))
        self._read = (read[0], *own.values(), *read[2])
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


def _copy_all(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """One launch a dtype, whatever their number."""
    for dtype in {target.dtype for target in targets}:
        pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if t.dtype == dtype]
        into, read = [target for target, _ in pairs], [source for _, source in pairs]
        torch._foreach_copy_(into, read)  # pyright: ignore[reportPrivateImportUsage]
