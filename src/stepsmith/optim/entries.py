"""What `optimizer.state[p]` holds for a rule: names, shapes, and the values there may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from stepsmith.rules.base import Rule, State

_SQUARES = frozenset({"exp_avg_sq", "square_avg", "sum"})
"""Statistics of the bundled rules that are sums of squares."""


LAST = "last_step"
"""How far the last step moved each coordinate, parameter units; states from before there was trust
in a rule's steps lack it."""


class EntryForm:
    """The form of a parameter's entry.

    Args:
        rule: the rule.
    """

    def __init__(self, rule: Rule):
        fresh, carry = rule.init_state(torch.zeros(1, device="cpu")), rule.init_carry(1)
        measures: State = {} if rule.units is None else rule.units.init(1)
        # The shape that follows the parameter's own, of what has numbers for every coordinate.
        self._tails: dict[str, tuple[int, ...]] = {}
        self._tails |= {key: () for key in fresh if key not in rule.per_tensor}
        self._tails |= {key: (len(value),) for key, value in carry.items()}
        self._tails[LAST] = ()
        self._measures = frozenset(measures)
        self.names = (*self._tails, *sorted(rule.per_tensor), *measures)
        # A rule may start a statistic at infinity.
        start = fresh | carry | measures | {LAST: torch.zeros(1)}
        self._finite = {key for key in self.names if bool(start[key].isfinite().all())}

    def misfit(self, entry: Mapping[str, Any], shape: torch.Size) -> str:
        """What is wrong with the names, shapes and types of an entry; empty where nothing is.

        Args:
            entry: of a parameter; numbers of a whole tensor may be plain ones.
            shape: the parameter's.
        """
        for name in self.names:
            value, tail = entry.get(name), self._tails.get(name)
            if value is None and name == LAST:
                continue
            want = () if tail is None else (*shape, *tail)
            if not isinstance(value, Tensor):
                if tail is not None or not isinstance(value, Real):
                    have = "None" if value is None else f"a {type(value).__name__}"
                    return f"{name!r} should have shape {want}, has {have}"
            elif tuple(value.shape) != want:
                return f"{name!r} should have shape {want}, has {tuple(value.shape)}"
            # Steps may be counted in integers.
            elif not value.is_floating_point() and (
                tail is not None or value.is_complex() or value.dtype == torch.bool
            ):
                return f"{name!r} should hold floating-point numbers, holds {value.dtype}"
        return ""

    def unsound(self, entry: Mapping[str, Any]) -> str:
        """What is wrong with the values of an entry that fits; empty where nothing is."""
        for name in self.names:
            if name == LAST and name not in entry:
                continue
            value = torch.as_tensor(entry[name])
            if name in self._finite and not bool(value.isfinite().all()):
                return f"{name!r} should be finite, holds nan or infinity"
            least = math.inf
            if name == "step" or name in _SQUARES or name in self._measures:
                least = float(value.min()) if value.numel() else 0.0
                if least < 0:
                    return f"{name!r} should be >= 0, holds {least:g}"
            if name == "step" and least % 1:
                return f"{name!r} should be a whole number, is {least:g}"
        return ""
