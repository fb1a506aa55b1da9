"""A rule's step by PyTorch operations, block by block; for every rule, dtype and device.

Shape letters: C = copies, N = coordinates of one copy, T = steps, F = features, O = outputs, K =
channels of one carried tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from stepsmith.kernels import lstm
from stepsmith.rules.base import Carry, Rule, State, Weights
from stepsmith.rules.lstm import LSTMRule

BLOCK = 1 << 16
"""Coordinates handled at once on a CPU, so that temporaries stay small and in the cache."""

NetworkStep = Callable[[Tensor, Carry], Tensor]
"""(F, N) features and the carry, which is updated in place, to (O, N) output."""


def network_step(
    rule: Rule, weights: Weights, dtype: torch.dtype, device: torch.device, backend: str
) -> NetworkStep:
    """One step of the rule's network, without gradients.

    Args:
        rule: the rule.
        weights: its weights; read now, so make a new function when they change.
        dtype: of the statistics.
        device: where the coordinates are.
        backend: `reference` or `chunked`.
    """
    if backend == "chunked":
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


class PlainAdvance:
    """One step of a rule that couples no coordinates; see `stepsmith.kernels.Advance`."""

    def __init__(self, rule: Rule, network: NetworkStep):
        self._rule, self._network = rule, network

    @torch.no_grad()
    def __call__(self, grad_CN: Tensor, param_CN: Tensor, state: State, carry: Carry) -> Tensor:
        """Advance `state` and `carry` in place; returns the steps (C, N)."""
        copies, size = grad_CN.shape
        delta_CN = torch.empty_like(grad_CN)
        block = BLOCK if grad_CN.device.type == "cpu" else max(grad_CN.numel(), 1)
        high, wide = max(1, block // max(size, 1)), max(1, min(size, block))
        for top in range(0, copies, high):
            rows = slice(top, min(top + high, copies))
            before = {key: state[key][rows] for key in self._rule.per_tensor}
            after: State = {}
            for left in range(0, max(size, 1), wide):
                columns = slice(left, min(left + wide, size))
                part = (rows, columns)
                own = {key: state[key][part] for key in state if key not in before}
                grad, param = grad_CN[part], param_CN[part]
                features, scale, after = self._rule.features(grad, param, own | before, (size,))
                for key, value in own.items():
                    value.copy_(after[key])
                # Whole rows, or a part of one: either way a view.
                carried = {
                    key: value.unflatten(1, (copies, size))[:, rows, columns].flatten(1)
                    for key, value in carry.items()
                }
                output_ON = self._network(features.flatten(1), carried)
                scale = None if scale is None else scale.reshape(-1)
                delta_CN[part] = self._rule.step(output_ON, scale).view(grad.shape)
            for key, value in before.items():
                value.copy_(after[key])
        return delta_CN


class Widened:
    """An advance whose carry is kept in fewer bits than it is computed in.

    Args:
        advance: computes in `dtype`.
        dtype: of the statistics.
    """

    def __init__(
        self, advance: Callable[[Tensor, Tensor, State, Carry], Tensor], dtype: torch.dtype
    ):
        self._advance, self._dtype = advance, dtype

    @torch.no_grad()
    def __call__(self, grad_CN: Tensor, param_CN: Tensor, state: State, carry: Carry) -> Tensor:
        """Advance `state` and `carry` in place; returns the steps (C, N)."""
        wide = {key: value.to(self._dtype, copy=True) for key, value in carry.items()}
        delta_CN = self._advance(grad_CN, param_CN, state, wide)
        for key, value in carry.items():
            value.copy_(wide[key])
        return delta_CN


def sample_features(
    rule: Rule, grads_TCS: Tensor, params_TCS: Tensor, state: State
) -> tuple[Tensor, Tensor | None]:
    """Features of a sequence of gradients of a rule that couples no coordinates.

    Returns:
        (T, F, C * S) features, and (T, C * S) scales where the rule has some.
    """
    features_TFS = scale_TS = None
    for t, (grad_CS, param_CS) in enumerate(zip(grads_TCS, params_TCS, strict=True)):
        feature_FCS, scale_CS, state = rule.features(grad_CS, param_CS, state, (grad_CS.shape[1],))
        if features_TFS is None:
            features_TFS = feature_FCS.new_empty(len(grads_TCS), len(feature_FCS), grad_CS.numel())
            if scale_CS is not None:
                scale_TS = scale_CS.new_empty(len(grads_TCS), grad_CS.numel())
        features_TFS[t] = feature_FCS.flatten(1)
        if scale_CS is not None and scale_TS is not None:
            scale_TS[t] = scale_CS.reshape(-1)
    assert features_TFS is not None
    return features_TFS, scale_TS
