"""A whole step of an LSTM rule in one pass: features, gates, state, carry and the step itself.

Mirrors `stepsmith.rules.lstm.LSTMRule`. Coordinates are handled in blocks that stay in the
first-level cache through every layer; along a block each loop is one the compiler turns into vector
instructions.

Shape letters: N = coordinates of one copy, C = copies, F = features, H = hidden units, I = inputs
of a layer, K = I + H rounded up to a multiple of 4, B = coordinates of a block.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from stepsmith.kernels.lstm import require_weights
from stepsmith.kernels.native import features, team
from stepsmith.kernels.native.maths import entry, integers, jit, next_piece, numbers, sigmoid, tanh
from stepsmith.kernels.native.tiles import affine
from stepsmith.rules.base import Carry, State, Weights
from stepsmith.rules.lstm import LSTMRule

BLOCK = 128
"""B: a multiple of `tiles.TILE`."""

NETWORK_FIELDS: list[tuple[str, Any]] = [
    ("inputs", np.int64), ("units", np.int64), ("layers", np.int64), ("bounded", np.int64),
    ("weights", np.int64), ("factor", np.float32), ("head_bias", np.float32),
]  # fmt: skip
"""Of the kernels' argument records: the network's sizes, the address of its packed weights, and the
factor on its output."""

RECORD = np.dtype(
    [
        ("counter", np.int64), ("copies", np.int64), ("size", np.int64), ("grad", np.int64),
        ("carries", np.int64), ("delta", np.int64),
        *features.FIELDS, *NETWORK_FIELDS,
    ],
    align=True,
)  # fmt: skip
"""Arguments of the step: `carries` is the address of (layers, 4) numbers: address and row stride of
a layer's hidden, then of its cell state."""


@jit
def padded(inputs, units):
    """K."""
    return (inputs + units + 3) // 4 * 4


@jit
def layer_offset(inputs, units, layer):
    """Where a layer's weight (4H, K) and bias (4H,) begin among the packed weights."""
    if layer == 0:
        return 0
    first = 4 * units * (padded(inputs, units) + 1)
    return first + (layer - 1) * 4 * units * (padded(units, units) + 1)


@jit
def layer_weight(a, layer):
    """A layer's weight (4H, K) and bias (4H,)."""
    wide = padded(a.inputs if layer == 0 else a.units, a.units)
    at = a.weights + 4 * layer_offset(a.inputs, a.units, layer)
    weight = carray(numbers(at), (4 * a.units, wide))
    return weight, carray(numbers(at + 16 * a.units * wide), (4 * a.units,))


def packed_weights(rule: LSTMRule, weights: Weights) -> np.ndarray:
    """All weights one after the other: each layer's weight, padded with zero columns to K, and
    bias; then the head (H,). Read now, so pack again when they change."""
    require_weights(rule, weights)
    plain = {key: value.detach().to("cpu", torch.float32).numpy() for key, value in weights.items()}
    parts = []
    for layer in range(rule.layers):
        weight = plain[f"lstm{layer}.weight"]
        parts.append(np.pad(weight, ((0, 0), (0, -weight.shape[1] % 4))).reshape(-1))
        parts.append(plain[f"lstm{layer}.bias"])
    return np.ascontiguousarray(np.concatenate([*parts, plain["head.weight"][0]]), np.float32)


def describe_network(record: np.ndarray, rule: LSTMRule, weights: Weights) -> np.ndarray:
    """Write a rule's network into a record; returns the packed weights, which must outlive it."""
    packed = packed_weights(rule, weights)
    record["inputs"], record["units"] = rule.feature_set.count, rule.hidden
    record["layers"], record["bounded"] = rule.layers, rule.output == "tanh"
    record["factor"] = -rule.step_scale
    record["head_bias"] = weights["head.bias"].item() if rule.bias else 0.0
    record["weights"] = packed.ctypes.data
    return packed


@jit
def _work(a):
    units, layers = a.units, a.layers
    widest = padded(a.inputs, units)
    if layers > 1:
        widest = max(widest, padded(units, units))
    rows = np.zeros((widest, BLOCK), np.float32)
    gates = np.empty((4 * units, BLOCK), np.float32)
    scale = np.ones(BLOCK, np.float32)
    total = a.copies * a.size
    grad = carray(numbers(a.grad), (total,))
    moments = a.set >= features.ADAM
    first = carray(numbers(a.first), (total if moments or a.frame == features.HOLD else 0,))
    second = carray(numbers(a.second), (total if moments else 0,))
    correction = carray(numbers(a.corrections), (a.copies, 2))
    delta = carray(numbers(a.delta), (total,))
    pieces = (total + BLOCK - 1) // BLOCK
    while True:
        start = next_piece(a.counter) * BLOCK
        if start >= pieces * BLOCK:
            return
        n = min(BLOCK, total - start)
        done = 0
        while done < n:  # a block may span the end of a copy, whose step count is its own
            copy = (start + done) // a.size
            end = min(n, (copy + 1) * a.size - start)
            span = slice(start + done, start + end)
            correct = correction[copy]
            # What a set does not keep has no memory behind it: hand over something of the type.
            one = first[span] if len(first) else scale
            two = second[span] if len(second) else scale
            features.compute(a, grad[span], one, two, correct, rows, scale, done)
            done = end
        _network(a, rows, gates, start, n)
        result = delta[start : start + n]
        for b in range(n):
            result[b] = a.head_bias
        head = carray(numbers(a.weights + 4 * layer_offset(a.inputs, units, layers)), (units,))
        for j in range(units):
            weight, row = head[j], rows[j]
            for b in range(n):
                result[b] += weight * row[b]
        if a.bounded:
            for b in range(n):
                result[b] = tanh(result[b])
        for b in range(n):
            result[b] *= a.factor * scale[b]


@jit
def _network(a, rows, gates, start, n):
    """All layers for one block whose inputs are in `rows`; leaves the last hidden state there."""
    units, count = a.units, a.inputs
    places = carray(integers(a.carries), (a.layers, 4))
    for layer in range(a.layers):
        weight, bias = layer_weight(a, layer)
        wide = weight.shape[1]
        hidden_at, hidden_apart = places[layer, 0] + 4 * start, 4 * places[layer, 1]
        cell_at, cell_apart = places[layer, 2] + 4 * start, 4 * places[layer, 3]
        for j in range(units):
            row = rows[count + j]
            source = carray(numbers(hidden_at + j * hidden_apart), (n,))
            for b in range(n):
                row[b] = source[b]
        for k in range(count + units, wide):
            rows[k, :] = 0
        affine(weight, bias, rows[:wide], gates, n)
        for j in range(units):
            enter, forget = gates[j], gates[units + j]
            leave, candidate = gates[2 * units + j], gates[3 * units + j]
            c = carray(numbers(cell_at + j * cell_apart), (n,))
            h = carray(numbers(hidden_at + j * hidden_apart), (n,))
            row = rows[j]  # the next layer's input
            for b in range(n):
                new = sigmoid(forget[b]) * c[b] + sigmoid(enter[b]) * tanh(candidate[b])
                c[b] = new
                value = sigmoid(leave[b]) * tanh(new)
                h[b] = value
                row[b] = value
        count = units


def _make_entry(stamp: int) -> Any:
    def step(raw):
        if stamp:
            _work(carray(raw, (1,), RECORD)[0])

    return step


@cache
def _entry() -> int:
    return entry(_make_entry)


class NativeAdvance:
    """One step of a rule for all coordinates; see `stepsmith.kernels.Advance`.

    Args:
        rule: the rule.
        weights: its weights; read now, so make a new one when they change.
    """

    def __init__(self, rule: LSTMRule, weights: Weights):
        self._set = rule.feature_set
        self._units = rule.hidden
        # With their names in errors, made once: a step on a small tensor is short.
        kept = zip(("first", "second"), features.statistics(self._set), strict=False)
        self._kept = [(field, key, f"the state's {key!r}") for field, key in kept]
        self._carried = [(key, f"carry {key!r}") for key in rule.carry_keys]
        self._record = np.zeros(1, RECORD)
        self._counter = np.zeros(1, np.int64)
        features.describe(self._record[0], self._set)
        self._weights = describe_network(self._record[0], rule, weights)

    def __call__(self, grad_CN: Tensor, param_CN: Tensor, state: State, carry: Carry) -> Tensor:
        """Advance `state` and `carry` in place, all float32; returns the steps (C, N).

        Raises:
            ValueError: a tensor of another dtype, device or shape, or one whose numbers lie apart;
                nothing has changed.
        """
        grad_CN, steps = grad_CN.contiguous(), state["step"]
        delta_CN = torch.empty_like(grad_CN)
        if grad_CN.numel() == 0:
            steps += 1
            return delta_CN
        record, shape = self._record[0], tuple(grad_CN.shape)
        record["copies"], record["size"] = shape
        if tuple(steps.shape) != (shape[0], 1):
            raise ValueError(
                f"backend 'native': the state's 'step' should have shape {(shape[0], 1)}, has "
                f"{tuple(steps.shape)}; give one number of steps a copy"
            )
        # Every address is written at every call: a copy of this object has arrays of its own.
        record["weights"] = self._weights.ctypes.data
        record["counter"] = self._counter.ctypes.data
        record["grad"] = team.whole_address(grad_CN, "the gradient", shape)
        record["delta"] = delta_CN.data_ptr()
        for field, key, what in self._kept:
            record[field] = team.whole_address(state[key], what, shape)
        wide = (self._units, grad_CN.numel())
        places = []
        for key, what in self._carried:
            places += [team.address(carry[key], what, wide), carry[key].stride(0)]
        carries = np.array(places, np.int64)
        record["carries"] = carries.ctypes.data
        steps += 1
        # One number is the usual case, and its array functions cost more than it.
        counts = np.array([steps.item()]) if steps.numel() == 1 else steps.double().numpy()[:, 0]
        corrections = features.corrections(self._set, counts)
        record["corrections"] = corrections.ctypes.data
        self._counter[0] = 0
        team.run(_entry(), self._record, -(-grad_CN.numel() // BLOCK))
        return delta_CN
