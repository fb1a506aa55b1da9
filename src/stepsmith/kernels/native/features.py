"""The feature sets of `stepsmith.rules.features`, their reference, for a block of coordinates.

Shape letters: N = coordinates, F = features, C = copies (rows) that count their steps apart,
B = coordinates of a block.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from stepsmith.kernels.native.maths import ONE, jit, log
from stepsmith.rules.base import State
from stepsmith.rules.features import FEATURE_SETS, FRAMES, LARGEST_GRADIENT, FeatureSet

RAW, LOG_SIGN, ADAM, JOINED = map(FEATURE_SETS.index, ("raw", "log_sign", "adam", "joined"))
NONE, HOLD, MOMENTUM = map(FRAMES.index, ("none", "hold", "momentum"))

FIELDS: list[tuple[str, Any]] = [
    ("set", np.int64), ("frame", np.int64),
    ("first", np.int64), ("second", np.int64), ("corrections", np.int64),
    ("beta2", np.float32), ("take1", np.float32), ("take2", np.float32), ("eps", np.float32),
    ("p", np.float32), ("smallest", np.float32), ("largest", np.float32),
]  # fmt: skip
"""Of the kernels' argument records: `first` and `second` are the addresses of exp_avg and
exp_avg_sq, or of `touched`; `corrections` that of (C, 2) bias corrections."""

_ZERO = np.float32(0)
_LARGEST = np.float32(LARGEST_GRADIENT)


def describe(record: np.ndarray, features: FeatureSet) -> None:
    """Write a feature set's constants into a kernel's argument record."""
    moments = features.moments
    record["set"], record["frame"] = FEATURE_SETS.index(features.name), FRAMES.index(features.frame)
    record["beta2"], record["eps"] = moments.beta2, moments.eps
    # As the reference does: subtracted in double precision, then rounded.
    record["take1"], record["take2"] = 1 - moments.beta1, 1 - moments.beta2
    record["p"] = 1 / features.p
    record["smallest"], record["largest"] = math.exp(-features.p), math.exp(features.p)


def statistics(features: FeatureSet, state: State) -> list[Tensor]:
    """The state's coordinate statistics in the record's order: none, `touched`, or the moments."""
    if features.has_moments:
        return [state["exp_avg"], state["exp_avg_sq"]]
    return [state["touched"]] if features.frame == "hold" else []


def corrections(features: FeatureSet, steps: np.ndarray) -> np.ndarray:
    """1 / (1 - beta^t) of both moments for steps t (from 1 on): a last dimension of 2, float32."""
    betas = np.array([features.moments.beta1, features.moments.beta2])
    return (1 / (1 - betas ** steps[..., None])).astype(np.float32)


@jit
def compute(a, grad, first, second, correction, rows, scales, at):
    """Features of n coordinates of one copy, into places `at` to `at + n` of `rows` (at least F)
    and of `scales`.

    Args:
        a: a record with `FIELDS`.
        grad: (n,) gradient.
        first, second: (n,) statistics, overwritten.
        correction: (2,) bias corrections.
        rows, scales: overwritten there.
        at: where.
    """
    n = grad.shape[0]
    scale = scales[at : at + n]
    if a.set == RAW:
        row = rows[0, at : at + n]
        for b in range(n):
            g = grad[b]
            g = _LARGEST if g > _LARGEST else g
            row[b] = -_LARGEST if g < -_LARGEST else g
    elif a.set == LOG_SIGN:
        sign_row, log_row = rows[0, at : at + n], rows[1, at : at + n]
        for b in range(n):
            g = grad[b]
            g = _LARGEST if g > _LARGEST else g
            g = -_LARGEST if g < -_LARGEST else g
            size = abs(g)
            size = a.smallest if size < a.smallest else size
            value = log(size) * a.p
            log_row[b] = -ONE if value < -ONE else value
            sign = g * a.largest
            sign = ONE if sign > ONE else sign
            sign_row[b] = -ONE if sign < -ONE else sign
    else:
        _moments(a, grad, first, second, correction, rows, scale, at)
        return
    if a.frame == HOLD:
        for b in range(n):
            touched = ONE if grad[b] != _ZERO else first[b]
            first[b] = touched
            scale[b] = touched
    elif a.frame == MOMENTUM:
        row = rows[0, at : at + n]
        for b in range(n):
            g = grad[b]
            sign = ONE if g > _ZERO else (-ONE if g < _ZERO else g)
            scale[b] = sign
            row[b] *= sign


@jit
def _moments(a, grad, first, second, correction, rows, scale, at):
    n = grad.shape[0]
    keep2, take1, take2 = a.beta2, a.take1, a.take2
    correct1, correct2 = correction[0], correction[1]
    joined = a.set == JOINED
    m_row, g_row = rows[0, at : at + n], rows[1, at : at + n]
    last = 5 if joined else 0
    grad_sign_row, mean_sign_row = rows[min(2, last), at : at + n], rows[min(3, last), at : at + n]
    grad_log_row, mean_log_row = rows[min(4, last), at : at + n], rows[last, at : at + n]
    for b in range(n):
        g = grad[b]
        g = _LARGEST if g > _LARGEST else g
        g = -_LARGEST if g < -_LARGEST else g
        mean = first[b] + take1 * (g - first[b])
        square = second[b] * keep2 + take2 * g * g
        first[b] = mean
        second[b] = square
        mean *= correct1
        inverse = ONE / (np.sqrt(square * correct2) + a.eps)
        sign = ONE
        if a.frame == MOMENTUM:
            sign = ONE if mean > _ZERO else (-ONE if mean < _ZERO else mean)
            scale[b] = sign
        elif a.frame == HOLD:
            scale[b] = ONE if mean != _ZERO else _ZERO
        m_row[b] = mean * inverse * sign
        g_row[b] = g * inverse * sign
        if joined:
            grad_sign = g * a.largest
            grad_sign = ONE if grad_sign > ONE else grad_sign
            grad_sign = -ONE if grad_sign < -ONE else grad_sign
            mean_sign = mean * a.largest
            mean_sign = ONE if mean_sign > ONE else mean_sign
            mean_sign = -ONE if mean_sign < -ONE else mean_sign
            grad_sign_row[b] = grad_sign * sign
            mean_sign_row[b] = mean_sign * sign
            size = abs(g)
            value = log(a.smallest if size < a.smallest else size) * a.p
            grad_log_row[b] = -ONE if value < -ONE else value
            size = abs(mean)
            value = log(a.smallest if size < a.smallest else size) * a.p
            mean_log_row[b] = -ONE if value < -ONE else value
