"""How a rule's network is run: the reference, or a fused form that mirrors it.

A backend is an explicit choice, never a side effect of an import. `"auto"` takes the fused form
where the rule has one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from stepsmith.kernels import lstm
from stepsmith.names import unknown
from stepsmith.rules.base import Carry, Rule, Weights
from stepsmith.rules.lstm import LSTMRule

BACKENDS = ("auto", "reference", "chunked")

StepFunction = Callable[[Tensor, Carry], Tensor]
"""(F, N) features and the carry, which is updated in place, to (O, N) output."""

_log = logging.getLogger("stepsmith")


@cache
def _say_once(message: str) -> None:
    _log.info(message)


def resolve(rule: Rule, backend: str) -> str:
    """The backend that `backend` means for this rule; says once what `auto` picked.

    Raises:
        ValueError: unknown backend, or one that has no form of this rule.
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    fused = isinstance(rule, LSTMRule)
    if backend == "auto":
        picked = "chunked" if fused else "reference"
        _say_once(f"backend 'auto' runs {type(rule).__name__} by {picked!r}")
        return picked
    if backend == "chunked" and not fused:
        raise ValueError(
            f"backend 'chunked' has no form of {type(rule).__name__}; use 'auto' or 'reference'"
        )
    return backend


def step_function(
    rule: Rule, weights: Weights, dtype: torch.dtype, device: torch.device, backend: str = "auto"
) -> StepFunction:
    """One step of the rule's network, without gradients.

    Args:
        rule: the rule.
        weights: its weights; read now, so make a new function when they change.
        dtype: of the statistics.
        device: where the coordinates are.
        backend: one of `BACKENDS`.
    """
    if resolve(rule, backend) == "chunked":
        assert isinstance(rule, LSTMRule)
        return partial(lstm.step_, rule, lstm.pack(rule, weights, dtype, device))
    cast = {key: value.detach().to(device=device, dtype=dtype) for key, value in weights.items()}

    @torch.no_grad()
    def reference(features_FN: Tensor, carry: Carry) -> Tensor:
        output_ON, new = rule.network(cast, features_FN, carry)
        for key, value in new.items():
            carry[key].copy_(value)
        return output_ON

    return reference


def sequence(
    rule: Rule, weights: Weights, features_TFS: Tensor, carry: Carry, backend: str = "auto"
) -> Tensor:
    """The network over T steps with gradients for the weights: (T, F, S) to (T, O, S)."""
    if resolve(rule, backend) == "chunked":
        assert isinstance(rule, LSTMRule)
        return lstm.sequence(rule, weights, features_TFS, carry)
    outputs = []
    for features_FS in features_TFS:
        output_OS, carry = rule.network(weights, features_FS, carry)
        outputs.append(output_OS)
    return torch.stack(outputs)
