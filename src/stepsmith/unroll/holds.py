"""Trust in a rule's steps, for many copies in one flat tensor.

Shape letters: C = copies, P = parameters of one optimizee.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stepsmith.layout import Layout
from stepsmith.rules.trust import Held, Trust


class Holds:
    """What `stepsmith.rules.trust` needs of each copy, and what it decides.

    Args:
        trust: the bounds.
        layout: of one copy.
        copies: C.

    Attributes:
        held: one a copy.
    """

    def __init__(self, trust: Trust, layout: Layout, copies: int):
        self.trust, self.layout = trust, layout
        self.held = [Held() for _ in range(copies)]
        self._predicted = [0.0] * copies
        self._sizes = [0.0] * copies
        self._last_CP: Tensor | None = None

    def restart(self, copy: int) -> None:
        """Forget one copy's training."""
        self.held[copy] = Held()
        self._predicted[copy] = 0.0

    def judge(self, grad_CP: Tensor) -> list[int]:
        """The copies whose last step is to be taken back, by the gradients (C, P) after it."""
        if self._last_CP is None:
            return []
        after = torch.linalg.vecdot(grad_CP, self._last_CP).tolist()
        told = zip(self.held, after, self._predicted, self._sizes, strict=True)
        return [
            copy
            for copy, (held, slope, predicted, size) in enumerate(told)
            if held.judge(self.trust, slope if math.isfinite(slope) else math.inf, predicted, size)
        ]

    def hold(
        self, theta_CP: Tensor, grad_CP: Tensor, delta_CP: Tensor, lag_C: Tensor, back: Sequence[int]
    ) -> Tensor:
        """The steps that are made.

        Args:
            theta_CP: (C, P) parameters.
            grad_CP: (C, P) gradients.
            delta_CP: (C, P) the rule's steps.
            lag_C: (C,) by how much larger gradients are on average than these, at least 1.
            back: from `judge`.

        Returns:
            (C, P): the rule's steps by each copy's factor; for copies in `back` minus the last.
        """
        sizes = delta_CP.square().mean(1).sqrt().tolist()
        uphill = torch.linalg.vecdot(grad_CP, delta_CP).tolist()
        factors = []
        for copy, held in enumerate(self.held):
            first = math.isnan(held.limit)
            if first:
                tensors = self.layout.views(theta_CP[copy]).values()
                held.meet(self.trust, tensors, fresh=True)
            factors.append(held.factor(self.trust, sizes[copy], uphill[copy], first=first))
        made_CP = delta_CP * delta_CP.new_tensor(factors)[:, None]
        predicted_C = torch.linalg.vecdot(grad_CP.abs(), made_CP.abs()) * lag_C
        self._predicted = predicted_C.tolist()
        self._sizes = [size * factor for size, factor in zip(sizes, factors, strict=True)]
        for copy in back:
            assert self._last_CP is not None
            made_CP[copy] = -self._last_CP[copy]
            self._predicted[copy] = 0.0
        self._last_CP = made_CP
        return made_CP
