"""The feature sets of `stepsmith.rules.features`, their reference, for a block of coordinates.

Shape letters: N = coordinates, F = features, C = copies (rows) that count their steps apart, T =
steps, S = sampled coordinates of all copies, B = coordinates of a block.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from stepsmith.kernels.native import team
from stepsmith.kernels.native.maths import ONE, entry, jit, log, next_piece, numbers
from stepsmith.rules.base import State
from stepsmith.rules.features import FEATURE_SETS, FRAMES, LARGEST_GRADIENT, FeatureSet
from stepsmith.rules.lstm import LSTMRule

RAW, LOG_SIGN, ADAM, JOINED = map(FEATURE_SETS.index, ("raw", "log_sign", "adam", "joined"))
NONE, HOLD, MOMENTUM = map(FRAMES.index, ("none", "hold", "momentum"))

FIELDS: list[tuple[str, Any]] = [
    ("set", np.int64), ("frame", np.int64),
    ("first", np.int64), ("second", np.int64), ("corrections", np.int64),
    ("beta2", np.float32), ("take1", np.float32), ("take2", np.float32), ("eps", np.float32),
    ("per", np.float32), ("smallest", np.float32), ("largest", np.float32),
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
    record["per"] = 1 / features.p
    record["smallest"], record["largest"] = math.exp(-features.p), math.exp(features.p)


def statistics(features: FeatureSet) -> list[str]:
    """The state's coordinate statistics in the record's order: none, `touched`, or the moments."""
    if features.has_moments:
        return ["exp_avg", "exp_avg_sq"]
    return ["touched"] if features.frame == "hold" else []


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
            value = log(size) * a.per
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
            value = log(a.smallest if size < a.smallest else size) * a.per
            grad_log_row[b] = -ONE if value < -ONE else value
            size = abs(mean)
            value = log(a.smallest if size < a.smallest else size) * a.per
            mean_log_row[b] = -ONE if value < -ONE else value


RECORD = np.dtype(
    [
        ("counter", np.int64), ("steps", np.int64), ("copies", np.int64), ("size", np.int64),
        ("grads", np.int64), ("features", np.int64), ("scale", np.int64), ("count", np.int64),
        *FIELDS,
    ],
    align=True,
)  # fmt: skip
"""Arguments of `sample_features`; `count` is F."""

SPAN = 128
"""Coordinates whose features of all steps are computed by one thread at a time."""


@jit
def _work(a):
    """Features of all steps, a span of a copy's coordinates at a time."""
    size = a.size
    sampled = a.copies * size
    spans = (size + SPAN - 1) // SPAN
    grads = carray(numbers(a.grads), (a.steps, sampled))
    out = carray(numbers(a.features), (a.steps, a.count, sampled))
    scales = carray(numbers(a.scale), (a.steps, sampled))
    corrections = carray(numbers(a.corrections), (a.steps, a.copies, 2))
    first = carray(numbers(a.first), (sampled if a.first else 0,))
    second = carray(numbers(a.second), (sampled if a.second else 0,))
    spare = np.empty(SPAN, np.float32)
    while True:
        piece = next_piece(a.counter)
        if piece >= a.copies * spans:
            return
        copy = piece // spans
        start = copy * size + piece % spans * SPAN
        end = min(start + SPAN, (copy + 1) * size)
        one = first[start:end] if len(first) else spare
        two = second[start:end] if len(second) else spare
        for t in range(a.steps):
            compute(
                a, grads[t, start:end], one, two, corrections[t, copy], out[t], scales[t], start
            )


def _make_entry(stamp: int) -> Any:
    def sample_features(raw):
        if stamp:
            _work(carray(raw, (1,), RECORD)[0])

    return sample_features


@cache
def _entry() -> int:
    return entry(_make_entry)


def sample_features(
    rule: LSTMRule, grads_TCS: Tensor, state: State
) -> tuple[Tensor, Tensor | None]:
    """Features of a sequence of gradients.

    Args:
        rule: the rule.
        grads_TCS: (T, C, S / C) float32 gradients.
        state: (C, S / C) statistics before the first, and `step`, (C, 1); not written to.

    Returns:
        (T, F, S) features, and (T, S) factors on the step where the rule's frame has some.

    Raises:
        ValueError: a tensor of another dtype, device or shape.
    """
    chosen = rule.feature_set
    steps, copies, size = grads_TCS.shape
    grads_TCS = grads_TCS.contiguous()
    out = grads_TCS.new_empty(steps, chosen.count, copies * size)
    scale = grads_TCS.new_ones(steps, copies * size)
    record = np.zeros(1, RECORD)
    describe(record[0], chosen)
    if tuple(state["step"].shape) != (copies, 1):
        raise ValueError(
            f"backend 'native': the state's 'step' should have shape {(copies, 1)}, has "
            f"{tuple(state['step'].shape)}; give one number of steps a copy"
        )
    kept = {
        key: state[key].clone(memory_format=torch.contiguous_format) for key in statistics(chosen)
    }
    ages = state["step"].reshape(-1).double().numpy()
    corrected = corrections(chosen, ages + np.arange(1, steps + 1)[:, None])
    counter = np.zeros(1, np.int64)
    values = {
        "counter": counter.ctypes.data, "steps": steps, "copies": copies, "size": size,
        "grads": team.whole_address(grads_TCS, "the gradients", (steps, copies, size)),
        "features": out.data_ptr(), "scale": scale.data_ptr(), "count": chosen.count,
        "corrections": corrected.ctypes.data,
    }  # fmt: skip
    for name, (key, tensor) in zip(("first", "second"), kept.items(), strict=False):
        values[name] = team.whole_address(tensor, f"the state's {key!r}", (copies, size))
    for name, value in values.items():
        record[0][name] = value
    team.run(_entry(), record, copies * -(-size // SPAN))
    return out, None if chosen.frame == "none" else scale
