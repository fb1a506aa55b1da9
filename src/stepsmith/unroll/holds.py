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
        self._last_CP: Tensor | None = None

    def restart(self, copy: int) -> None:
        """Forget one copy's training."""
        self.held[copy] = Held()

    def judge(self, grad_CP: Tensor) -> list[int]:
        """The copies whose last step is to be taken back, by the gradients (C, P) after it."""
        if self._last_CP is None:
            return []
        after = torch.linalg.vecdot(grad_CP, self._last_CP).tolist()
        return [
            copy
            for copy, (held, slope) in enumerate(zip(self.held, after, strict=True))
            if held.judge(self.trust, slope if math.isfinite(slope) else math.inf)
        ]

    def hold(
        self,
        theta_CP: Tensor,
        grad_CP: Tensor,
        delta_CP: Tensor,
        lags: Sequence[float],
        back: Sequence[int],
    ) -> Tensor:
        """The steps that are made.

        Args:
            theta_CP: (C, P) parameters.
            grad_CP: (C, P) gradients.
            delta_CP: (C, P) the rule's steps.
            lags: by how much larger each copy's gradients are on average than these, at least 1.
            back: from `judge`.

        Returns:
            (C, P): the rule's steps by each copy's factor; for copies in `back` minus the last.
        """
        told = (
            delta_CP.square().mean(1).sqrt(), torch.linalg.vecdot(grad_CP, delta_CP),
            torch.linalg.vecdot(grad_CP.abs(), delta_CP.abs()),
        )  # fmt: skip
        factors = []
        for copy, (size, uphill, predicted) in enumerate(torch.stack(told, 1).tolist()):
            held = self.held[copy]
            first = not held.limit
            if first:
                held.meet(self.trust, self.layout.views(theta_CP[copy]).values(), fresh=True)
            if copy in back:
                factors.append(0.0)
                continue
            told_one = (size, uphill, predicted)
            factors.append(held.factor(self.trust, *told_one, lag=lags[copy], first=first))
        made_CP = delta_CP * delta_CP.new_tensor(factors)[:, None]
        for copy in back:
            assert self._last_CP is not None
            made_CP[copy] = -self._last_CP[copy]
        self._last_CP = made_CP
        return made_CP
