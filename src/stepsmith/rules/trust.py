"""How much of a rule's step is made: all of it where the rule is at home, less where it overshoots.

A learned rule is bold: its steps are as long as what it was meta-trained on bears. On another loss,
or on a network that is trained already, the same steps can raise the loss a thousandfold. `Trust`
holds a rule back by two things that every training tells anyway, gradients and parameters:

* **Slope.** Let D be the last step and g, g' the gradients before and after it. To second order the
  step changed the loss by (g + g') D / 2. The ratio r = g' D / sum |g| |D| is -1 where nothing
  bends, 0 where the step went just far enough, and large where it overshot. A step with
  r > `reject` is taken back. Where the running mean of r is above `slope`, steps shrink; where it
  is below `undershot`, they grow again, up to the rule's own.
* **Change.** A step of root mean square x on a matrix of `out` rows, `in` columns and root mean
  square w may change its largest singular value, which is near w (sqrt out + sqrt in) at a random
  start, by x sqrt(out in). The product over matrices of 1 + the ratio of the two bounds what a step
  does to the network. No step may exceed `change`, nor `far` times the parameters' own root mean
  square. A step below `notable` is not taken back: it can't be why gradients grew.

A rule is not at home where its first step exceeds these bounds, or where a matrix has a singular
value above `edge` times that of random numbers, which training leaves behind. It then starts at
`start` of its steps, keeps to `foreign_change`, and makes no step that does not go down its own
gradient, by `downhill` at least: a step with g D > -`downhill` sum |g| |D|.

On the networks that the bundled rules were meta-trained on none of this acts: `docs/6-transfer.md`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepsmith.rules.base import Rule, require_number, require_positive

ROUNDS = 12
"""Of power iteration; a singular value that stands out shows after a few."""


SAMPLED = 2**14
"""Coordinates of a long vector that slopes and sizes are told by, evenly apart."""


@dataclass(frozen=True)
class Trust:
    """When a rule is held back; see the module.

    Args:
        change: largest factor by which a step may change a network, >= 1; `foreign_change` where
            the rule is not at home.
        foreign_change: see `change`.
        notable: change of a step below which it is not taken back, >= 1.
        slope: mean r above which steps shrink; `foreign_slope` where the rule is not at home.
        foreign_slope: see `slope`.
        undershot: mean r below which steps grow again, < 0.
        reject: r above which the last step is taken back.
        start: share of its steps that a rule begins with where it is not at home, in (0, 1].
        downhill: least share of a step that goes down its own gradient, in [0, 1).
        grow, shrink: factors on the share, a step.
        decay: of the running mean of r, in [0, 1).
        edge: largest singular value of an untrained matrix, over that of random numbers.
        far: largest step, over the parameters' root mean square.
        least: the share does not fall below this.

    Raises:
        ValueError: a number out of its range.
    """

    change: float = 50.0
    foreign_change: float = 1.5
    notable: float = 1.1
    slope: float = 0.4
    foreign_slope: float = 0.3
    undershot: float = -0.25
    reject: float = 10.0
    start: float = 1 / 64
    downhill: float = 0.15
    grow: float = 1.2
    shrink: float = 0.95
    decay: float = 0.8
    edge: float = 1.3
    far: float = 10.0
    least: float = 1e-6

    def __post_init__(self):
        values = dataclasses.asdict(self)
        undershot = values.pop("undershot")
        for name in ("decay", "downhill"):
            require_number("Trust", name, values.pop(name), least=0, below=1)
        require_positive("Trust", **values)
        factors = (self.change, self.foreign_change, self.notable, self.grow)
        if min(factors) < 1 or not -1 <= undershot < 0:
            raise ValueError(
                "Trust: change, foreign_change, notable and grow must be >= 1 and undershot in "
                f"[-1, 0), got {self!r}"
            )
        if max(self.start, self.shrink, self.least) > 1:
            raise ValueError(f"Trust: start, shrink and least must be <= 1, got {self!r}")


@dataclass
class Held:
    """How much one optimizee's rule is trusted now: numbers to be saved and loaded.

    Attributes:
        share: of the rule's steps that is made, in (0, 1].
        slope: running mean of r.
        limit: largest root mean square of a step at a rate of 1, parameter units; 0 before `meet`.
        careful: the same where the rule is not at home.
        notable: root mean square of a step below which it is not taken back.
        foreign: 1.0 where the rule is not at home, else 0.0.
        predicted: sum |g| |D| of the last step D, loss units; 0 where there is none to be judged.
        size: root mean square of the last step.
    """

    share: float = 1.0
    slope: float = 0.0
    limit: float = 0.0
    careful: float = 0.0
    notable: float = 0.0
    foreign: float = 0.0
    predicted: float = 0.0
    size: float = 0.0

    def meet(self, trust: Trust, params: Iterable[Tensor], *, fresh: bool) -> None:
        """Look at the parameters before the first step.

        Args:
            trust: the bounds.
            params: the optimizee's tensors, in their own shapes.
            fresh: whether this is the beginning of the training; one that goes on may look trained.
        """
        params = [param.detach() for param in params if param.numel()]
        self.limit, self.careful, self.notable = _limits(params, trust)
        if fresh and any(_outlier(param) > trust.edge for param in params):
            self._doubt(trust)

    def judge(self, trust: Trust, slope_after: float) -> bool:
        """Take in the slope along the last step; returns whether that step is to be taken back.

        Args:
            trust: the bounds.
            slope_after: g' D, loss units; inf where g' is not finite.
        """
        predicted, self.predicted = self.predicted, 0.0
        if not 0 < predicted < math.inf or math.isnan(slope_after):
            return False
        ratio = slope_after / predicted
        if ratio > trust.reject and self.size > self.notable:
            self.share = max(trust.least, self.share / min(ratio, 1 / trust.start))
            self.slope = 0.0
            return True
        seen = min(max(ratio, -1.0), 4.0)
        self.slope = trust.decay * self.slope + (1 - trust.decay) * seen
        if self.slope > (trust.foreign_slope if self.foreign else trust.slope):
            self.share = max(trust.least, self.share * trust.shrink)
        elif self.slope < trust.undershot:
            self.share = min(1.0, self.share * trust.grow)
        return False

    def factor(
        self,
        trust: Trust,
        size: float,
        uphill: float,
        predicted: float,
        *,
        lag: float = 1.0,
        first: bool = False,
    ) -> float:
        """The factor on a step D, which is taken to be made.

        Args:
            trust: the bounds.
            size: the step's root mean square, parameter units.
            uphill: g D, loss units; above zero the step goes up its own gradient.
            predicted: sum |g| |D|, loss units.
            lag: by how much larger gradients are on average than g, at least 1.
            first: whether this is the optimizee's first step.
        """
        if first and size > self.limit:
            self._doubt(trust)
        factor = self._factor(trust, size, uphill > -trust.downhill * predicted)
        self.size, self.predicted = factor * size, factor * predicted * lag
        return factor

    def _factor(self, trust: Trust, size: float, idle: bool) -> float:
        if self.foreign and idle:
            self.share = max(trust.least, self.share * trust.shrink)
            return 0.0
        limit = self.careful if self.foreign else self.limit
        return self.share * min(1.0, limit / size) if size > 0 else self.share

    def _doubt(self, trust: Trust) -> None:
        self.foreign = 1.0
        self.share = min(self.share, trust.start)


def few(values_XN: Tensor) -> tuple[Tensor, float]:
    """Some of many numbers along the last axis, evenly apart, and for how many each stands."""
    count = values_XN.shape[-1]
    apart = -(-count // SAMPLED)
    if apart <= 1:
        return values_XN, 1.0
    some = values_XN[..., ::apart]
    return some, count / some.shape[-1]


def usual_trust(rule: Rule, manifest: Mapping[str, Any]) -> Trust | None:
    """How far a rule is trusted where nothing else is said.

    Args:
        rule: the rule.
        manifest: its `trust`, where there is one, holds some fields of `Trust`.

    Returns:
        None, for as far as it goes: classic rules, and rules in absolute units without `trust` in
        their manifest, which treat every coordinate alone.

    Raises:
        ValueError: a field that `Trust` does not have, or out of range.
    """
    given = manifest.get("trust")
    if not rule.learned or (given is None and rule.units is None):
        return None
    given = {} if given is None else given
    known = {field.name for field in dataclasses.fields(Trust)}
    if not isinstance(given, Mapping) or not set(given) <= known:
        raise ValueError(
            f"trust must hold fields of Trust ({', '.join(sorted(known))}), got {given!r}"
        )
    return Trust(**given)


def _limits(params: list[Tensor], trust: Trust) -> tuple[float, float, float]:
    """The largest root mean square of a step; where the rule is not at home; and of one that is too
    small to be noted."""
    squares = [float(param.double().square().sum()) for param in params]
    count = sum(param.numel() for param in params)
    whole = (math.sqrt(sum(squares) / count) if count else 0.0) or 1.0
    far = trust.far * whole
    reach = [
        _reach(param, math.sqrt(square / param.numel()))
        for param, square in zip(params, squares, strict=True)
        if param.dim() > 1
    ]
    if not reach:  # vectors alone: by how much they themselves change
        return far, (trust.foreign_change - 1) * whole, (trust.notable - 1) * whole
    changes = (trust.change, min(trust.change, trust.foreign_change), trust.notable)
    limit, careful, notable = (_within(reach, math.log(change), far) for change in changes)
    return limit, careful, notable


def _within(reach: list[float], change: float, longest: float) -> float:
    """The largest size for which sum log(1 + size * reach) is at most `change`, by halving."""
    low, high = 0.0, longest
    if not math.isfinite(longest):
        return longest
    for _ in range(60):
        middle = (low + high) / 2
        fits = sum(math.log1p(middle * one) for one in reach) <= change
        low, high = (middle, high) if fits else (low, middle)
    return high


def _reach(param: Tensor, size: float) -> float:
    """What a step of root mean square 1 does to a matrix's largest singular value, over it."""
    rows, columns = len(param), param[0].numel()
    size = size or 1 / math.sqrt(3 * columns)  # PyTorch's usual start, for one from zero
    return math.sqrt(rows * columns) / (size * (math.sqrt(rows) + math.sqrt(columns)))


def _outlier(param: Tensor) -> float:
    """A matrix's largest singular value, over that of random numbers of its size; 0 for others."""
    if param.dim() < 2:
        return 0.0
    matrix = param.reshape(len(param), -1).float()
    rows, columns = matrix.shape
    usual = float(matrix.square().mean().sqrt()) * (math.sqrt(rows) + math.sqrt(columns))
    if min(rows, columns) < 2 or not 0 < usual < math.inf:
        return 0.0
    vector = torch.randn(columns, generator=torch.Generator().manual_seed(0)).to(matrix)
    for _ in range(ROUNDS):
        vector = matrix.T @ (matrix @ (vector / vector.norm()))
        if not float(vector.norm()) > 0:
            return 0.0
    return math.sqrt(float(vector.norm())) / usual
