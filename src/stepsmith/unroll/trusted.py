"""A rule's steps as far as deployment trusts them, for many copies in one flat tensor.

Meta-training makes the bare steps (`RuleStepper`): a rule is to learn from what it does.

Shape letters: C = copies, P = parameters of one optimizee.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stepsmith.rules.trust import Held, Trust, few
from stepsmith.rules.units import norms
from stepsmith.unroll.steppers import Keep, RuleStepper


class TrustedStepper(RuleStepper):
    """A rule whose steps are judged by the gradients after them; see `stepsmith.rules.trust`.

    Args:
        given: as `RuleStepper` takes.
        trust: the bounds.
        options: as `RuleStepper` takes.

    Attributes:
        held: one a copy.
    """

    def __init__(self, *given: Any, trust: Trust, **options: Any):
        super().__init__(*given, **options)
        theta_CP: Tensor = given[2]
        self.trust = trust
        self.held = [Held() for _ in theta_CP]
        # In Python's numbers: they are looked at here, and few.
        self._measured = [self._unmeasured() for _ in theta_CP]
        # The last step: the rule's own, and how much of it each copy made.
        self._last_CP = torch.zeros_like(theta_CP)
        self._made = [0.0] * len(theta_CP)

    def _unmeasured(self) -> dict[str, float]:
        return dict.fromkeys(self.measures, 0.0)

    def restart(self, copy: int, theta_CP: Tensor) -> None:
        """Forget what one copy has seen."""
        super().restart(copy, theta_CP)
        self.held[copy], self._measured[copy] = Held(), self._unmeasured()

    @torch.no_grad()
    def __call__(self, theta_CP: Tensor, grad_CP: Tensor, keep: Keep | None = None) -> None:
        """One step."""
        grads, share = few(grad_CP)
        after = torch.linalg.vecdot(grads, few(self._last_CP)[0]).tolist()
        back = []
        for copy, (held, slope) in enumerate(zip(self.held, after, strict=True)):
            slope *= share * self._made[copy]
            if held.judge(self.trust, slope if math.isfinite(slope) else math.inf):
                back.append(copy)
        seen, gains, lags = self._measure(grad_CP, back)
        memories = [self._memory(copy, theta_CP.shape[1], clone=True) for copy in back]
        if seen is not None:
            grad_CP = grad_CP * grad_CP.new_tensor(seen)[:, None]
        delta_CP = self._delta(theta_CP, grad_CP, keep)
        for copy, memory in zip(back, memories, strict=True):  # it has not seen this gradient
            now = self._memory(copy, theta_CP.shape[1], clone=False)
            for part, known in zip(now, memory, strict=True):
                part.copy_(known)
        amounts = self._amounts(theta_CP, grads, delta_CP, share, gains, lags, back)
        for copy in back:
            delta_CP[copy], amounts[copy] = self._last_CP[copy], -self._made[copy]
        if self.weight_decay:
            decays = [1 - self.lr * self.weight_decay] * len(theta_CP)
            for copy in back:  # makes no step
                decays[copy] = 1.0
            theta_CP.mul_(theta_CP.new_tensor(decays)[:, None])
        theta_CP.addcmul_(delta_CP, delta_CP.new_tensor(amounts)[:, None])
        self._last_CP, self._made = delta_CP, amounts

    def _measure(
        self, grad_CP: Tensor, back: list[int]
    ) -> tuple[list[float] | None, list[float], list[float]]:
        """The units' factors on each copy's gradients (None without units) and steps, and by how
        much larger its gradients are on average."""
        units, copies = self.rule.units, len(grad_CP)
        if units is None:
            return None, [1.0] * copies, [1.0] * copies
        seen, gains, lags = [], [], []
        for copy, norm in enumerate(norms(grad_CP).tolist()):
            one, gain, new = units.measure_one(norm, self.layout.total, self._measured[copy])
            seen.append(one)
            gains.append(gain)
            lags.append(units.lag(norm, new["running_norm"], new["measured"]))
            if copy not in back:
                self._measured[copy] = new
        return seen, gains, lags

    def _amounts(
        self,
        theta_CP: Tensor,
        grads: Tensor,
        delta_CP: Tensor,
        share: float,
        gains: list[float],
        lags: list[float],
        back: list[int],
    ) -> list[float]:
        """How much of the rule's step each copy makes."""
        deltas = few(delta_CP)[0]
        along = grads * deltas
        told = (
            torch.linalg.vecdot(deltas, deltas).mul_(share / self.layout.total).sqrt_(),
            along.sum(1).mul_(share), along.abs_().sum(1).mul_(share),
        )  # fmt: skip
        amounts = []
        for copy, row in enumerate(torch.stack(told, 1).tolist()):
            held = self.held[copy]
            first = not held.limit
            if first:
                held.meet(self.trust, self.layout.views(theta_CP[copy]).values(), fresh=True)
            size, uphill, predicted = (gains[copy] * number for number in row)
            rate = self.lr
            factor = 0.0
            if copy not in back:
                factor = held.factor(
                    self.trust, size, rate * uphill, abs(rate * predicted), lag=lags[copy],
                    first=first,
                )  # fmt: skip
            amounts.append(rate * gains[copy] * factor)
        return amounts

    def _memory(self, copy: int, size: int, *, clone: bool) -> list[Tensor]:
        """All that one copy's rule keeps, or copies of it."""
        span = slice(copy * size, (copy + 1) * size)
        parts = [value[copy] for value in self.state.values()]
        parts += [value[:, span] for value in self.carry.values()]
        return [part.clone() for part in parts] if clone else parts
