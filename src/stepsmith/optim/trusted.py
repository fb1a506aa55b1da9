"""Trust in a rule's steps in deployment: what became of the last one, how much of the next is made.

Shape letters: n = coordinates of some neighbouring parameters of a bucket, flat and joined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from stepsmith.optim.buckets import Bucket, Member
from stepsmith.rules.trust import Held, Trust, few

OPTIONS = {f"trust_{name}": value for name, value in vars(Held()).items()}
"""`Held` as options of every parameter group, where it is saved and loaded with the rest."""


@dataclass
class Part:
    """What one run of a bucket's members is to do.

    Attributes:
        group: their group.
        bucket: the bucket.
        run: the members.
        grad_n: their gradient, downhill being where they are to go.
        delta_n: the rule's step, before units and rate.
    """

    group: dict[str, Any]
    bucket: Bucket
    run: list[Member]
    grad_n: Tensor
    delta_n: Tensor | None = None

    @property
    def span(self) -> slice:
        """Where they lie in the bucket."""
        return slice(self.run[0].span.start, self.run[-1].span.stop)

    def decay(self) -> None:
        """Shrink the parameters by the group's weight decay."""
        decay = float(self.group["weight_decay"])
        if decay:
            factor = 1 - float(self.group["lr"]) * decay
            params = [member.param for member in self.run]
            torch._foreach_mul_(params, factor)  # pyright: ignore[reportPrivateImportUsage]


def taken_back(
    trust: Trust, parts: Iterable[Part], groups: Sequence[dict[str, Any]], buckets: list[Bucket],
    clipped: float,
) -> bool:  # fmt: skip
    """Judge the last step by the gradients after it, and undo it where it is to be undone.

    Args:
        trust: the bounds.
        parts: with the gradients.
        groups: the optimizer's; they hold what is remembered.
        buckets: all there are.
        clipped: how many times larger the gradients were before they were clipped.

    Returns:
        Whether it was undone.
    """
    held = _held(groups)
    if not held.predicted:
        return False
    after = 0.0
    for part in parts:  # what has no gradient now says nothing
        assert part.bucket.last is not None
        (grad_n, share), (last_n, _) = few(part.grad_n), few(part.bucket.last[part.span])
        after += share * float(torch.dot(grad_n, last_n))
    if not after:
        return False  # none of what moved has a gradient now
    back = held.judge(trust, after * clipped)
    _note(held, groups)
    if back:
        for bucket in buckets:
            assert bucket.last is not None
            bucket.move(bucket.members, -bucket.last)
            bucket.last.zero_()
    return back


def make(
    trust: Trust, parts: Sequence[Part], groups: Sequence[dict[str, Any]], buckets: list[Bucket],
    *, gain: float, lag: float, fresh: bool, clipped: float,
) -> None:  # fmt: skip
    """Make a step, as far as the rule is trusted.

    Args:
        trust: the bounds.
        parts: with the rule's steps.
        groups: the optimizer's; they hold what is remembered.
        buckets: all there are.
        gain: factor on the rule's steps.
        lag: by how much larger gradients are on average than these, at least 1.
        fresh: whether no step was made before.
        clipped: how many times larger the gradients were before they were clipped.
    """
    held = Held() if fresh else _held(groups)
    first = not held.limit
    if first:
        params = (param for group in groups for param in group["params"] if param.requires_grad)
        held.meet(trust, params, fresh=fresh)
    square = uphill = predicted = 0.0
    for part in parts:
        assert part.delta_n is not None
        (grad_n, share), (delta_n, _) = few(part.grad_n), few(part.delta_n)
        told = (
            torch.dot(delta_n, delta_n), torch.dot(grad_n, delta_n),
            torch.dot(grad_n.abs(), delta_n.abs()),
        )  # fmt: skip
        # One wait for a GPU, not three.
        one, slope, size = torch.stack(told).tolist() if delta_n.is_cuda else map(float, told)
        rate = float(part.group["lr"])
        square, uphill, predicted = (
            square + share * one, uphill + share * rate * slope, predicted + share * rate * size,
        )  # fmt: skip
    count = sum(len(part.grad_n) for part in parts)
    size = gain * math.sqrt(square / count) if count else 0.0
    slopes = (gain * clipped * uphill, abs(gain * clipped * predicted))
    factor = held.factor(trust, size, *slopes, lag=lag, first=first and fresh)
    moving = {id(bucket): len(bucket.members) for bucket in buckets}
    for part in parts:
        moving[id(part.bucket)] -= len(part.run)
    for bucket in buckets:
        if bucket.last is not None and moving[id(bucket)]:
            bucket.last.zero_()
    for part in parts:
        assert part.delta_n is not None
        assert part.bucket.last is not None
        amount = gain * factor * float(part.group["lr"])
        moved_n = torch.mul(part.delta_n, amount, out=part.bucket.last[part.span])
        part.decay()
        part.bucket.move(part.run, moved_n)
    _note(held, groups)


def require_held(group: Mapping[str, Any]) -> None:
    """Check what a loaded group says of trust.

    Raises:
        ValueError: what is no number, not finite or below zero; a share outside (0, 1].
    """
    for option in OPTIONS.keys() & group.keys():
        value = group[option]
        least = -math.inf if option == "trust_slope" else 0.0
        number = float(value) if isinstance(value, Real) else math.nan
        sound = math.isfinite(number) and number >= least
        if not sound or (option == "trust_share" and not 0 < number <= 1):
            raise ValueError(
                f"LearnedOptimizer: option {option!r} of a saved group should be a finite number"
                f"{', above 0 and at most 1' if option == 'trust_share' else ''}, is {value!r}; "
                "the state is damaged, load another"
            )


def _held(groups: Sequence[dict[str, Any]]) -> Held:
    # A group that was made by hand knows nothing of it.
    known = max(groups, key=lambda group: group.get("trust_limit", 0.0))
    return Held(*[known.get(option, usual) for option, usual in OPTIONS.items()])


def _note(held: Held, groups: Sequence[dict[str, Any]]) -> None:
    told = dict(zip(OPTIONS, vars(held).values(), strict=True))
    for group in groups:
        group.update(told)
