"""Where the accuracy of a user's scores comes from: the loss itself says what the classes are.

torch's losses take scores (B, K, ...) with the classes second; other losses take (B, ..., K), shift
the targets or leave some of them out. At equal scores the slope of a classification loss is lowest
at the target, and zero where the target does not count. Which axis, and which targets, is read off
these slopes; a loss that shows no such slopes has no accuracy.

Shape letters: B = examples of a batch, K = classes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**22
"""Scores tried at once, at most."""
TRIALS = 16
"""Batches of scores tried, at most; of more classes than these hold, the middle ones are taken to
count."""


@dataclass(frozen=True)
class Scores:
    """How outputs of one shape are read.

    Attributes:
        axis: of the output, along which the classes lie.
        classes: K.
        counts_K: (K,) whether a target of this class counts; None where all do.
    """

    axis: int
    classes: int
    counts_K: Tensor | None

    def counted(self, targets: Tensor) -> Tensor:
        """Whether each target counts: it is a class, and one that the loss looks at."""
        inside = (targets >= 0) & (targets < self.classes)
        if self.counts_K is None:
            return inside
        return inside & self.counts_K[targets.long().clamp(0, self.classes - 1)]

    def accuracy(self, output: Tensor, targets: Tensor) -> Tensor:
        """The share of the counted targets whose score is the highest; nan where none counts."""
        counted = self.counted(targets)
        right = (output.argmax(self.axis) == targets) & counted
        return right.sum().to(torch.promote_types(output.dtype, torch.float32)) / counted.sum()


def find_scores(
    loss: Callable[[Any, Tensor], Tensor], output: Any, targets: Tensor
) -> Scores | None:
    """Try out what a loss takes outputs of this shape for.

    Args:
        loss: `loss(output, targets)`, a tensor of one number.
        output: (B, ...) of a module; only its shape, dtype and device matter.
        targets: (B, ...), likewise.

    Returns:
        How to read the outputs, or None where they are not the scores of integer targets.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    if targets.is_floating_point() or targets.is_complex():
        return None
    found = [
        scores
        for axis in range(1, output.dim())
        if (*output.shape[:axis], *output.shape[axis + 1 :]) == tuple(targets.shape)
        and (scores := _along(axis, loss, output, targets)) is not None
    ]
    return found[0] if len(found) == 1 else None


def _along(
    axis: int, loss: Callable[[Any, Tensor], Tensor], output: Tensor, targets: Tensor
) -> Scores | None:
    classes, places = output.shape[axis], math.prod(targets.shape[1:])
    if classes < 2 or places == 0:
        return None
    examples = min(len(targets), -(-classes // places), LARGEST // (places * classes))
    examples = max(2, examples)
    tried = min(classes, 2) if targets.dtype == torch.bool else classes
    tried = min(tried, torch.iinfo(targets.dtype).max + 1) if tried > 2 else tried
    parts = [range(tried)[i : i + examples * places] for i in range(0, tried, examples * places)]
    counts_K = torch.ones(classes, dtype=torch.bool)
    for part in parts if len(parts) <= TRIALS else [*parts[: TRIALS - 1], parts[-1]]:
        drawn = (list(part) * -(-examples * places // len(part)))[: examples * places]
        # In no order that a loss with the axes the other way round would find right too.
        random.Random(0).shuffle(drawn)
        given = torch.tensor(drawn, device=targets.device).view(examples, *targets.shape[1:])
        slopes = _slopes(loss, (examples, *output.shape[1:]), classes, output, given, targets.dtype)
        if slopes is None:
            return None
        index = given.unsqueeze(axis)
        counted = (slopes != 0).any(axis)
        others = slopes.scatter(axis, index, math.inf).amin(axis)
        own = slopes.gather(axis, index).squeeze(axis)
        if bool((counted & ~((own < 0) & (own < others))).any()):
            return None
        looked_at = given[counted].unique().cpu()
        left_out = given[~counted].unique().cpu()
        if bool(torch.isin(looked_at, left_out).any()):
            return None
        counts_K[left_out] = False
    if not bool(counts_K.any()):
        return None
    every = bool(counts_K.all())
    return Scores(axis, classes, None if every else counts_K.to(output.device))


def _slopes(
    loss: Callable[[Any, Tensor], Tensor],
    shape: tuple[int, ...],
    classes: int,
    output: Tensor,
    given: Tensor,
    dtype: torch.dtype,
) -> Tensor | None:
    """The loss's gradient in equal scores, which are probabilities too, for losses that want
    these."""
    devices = [output.device] if output.is_cuda else []
    with torch.enable_grad(), torch.random.fork_rng(devices=devices):
        equal = torch.full(
            shape, 1 / classes, dtype=output.dtype, device=output.device, requires_grad=True
        )
        try:
            (slopes,) = torch.autograd.grad(loss(equal, given.to(dtype)), equal)
        except Exception:
            # A loss that takes no scores but the module's own says nothing about classes.
            return None
    return slopes
