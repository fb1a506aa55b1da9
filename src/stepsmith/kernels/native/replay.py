"""The rule's network over a whole window of sampled coordinates, forward and backward.

Mirrors `stepsmith.rules.lstm.LSTMRule`; see `step.py` for the form of the weights and the blocks.

Shape letters: T = steps, C = copies, S = sampled coordinates (of all copies, as many of each), F =
features, H = hidden units, I = inputs of a layer, K = I + H rounded up to a multiple of 4, B =
coordinates of a block, G = numbers in the packed weights and the head's bias.
"""

# pyright: reportIndexIssue=false, reportCallIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from stepsmith.kernels.native import team
from stepsmith.kernels.native.maths import (
    ONE,
    entry,
    integers,
    jit,
    next_piece,
    numbers,
    sigmoid,
    tanh,
)
from stepsmith.kernels.native.step import (
    BLOCK,
    NETWORK_FIELDS,
    describe_network,
    layer_offset,
    layer_weight,
    padded,
)
from stepsmith.kernels.native.tiles import TILE, add_products, affine
from stepsmith.rules.base import Carry, Weights
from stepsmith.rules.lstm import LSTMRule

BUFFER = 1 << 22
"""Bytes a thread may fill with what a replay keeps of one block; long windows take short blocks."""

PARTS = 64
"""Most parts a replay is cut into; set by the sample's size alone, so that the sum over parts is
the same for any number of threads."""

RECORD = np.dtype(
    [
        ("counter", np.int64), ("steps", np.int64), ("sampled", np.int64), ("block", np.int64),
        ("width", np.int64), ("features", np.int64), ("carries", np.int64), ("adjoint", np.int64),
        ("scale", np.int64), ("sums", np.int64), ("backward", np.int64), *NETWORK_FIELDS,
    ],
    align=True,
)  # fmt: skip
"""`width` coordinates make a part; `sums` is the address of (parts, G) gradients; `scale` is 0
where there is none; `backward` that of the transposed columns a gradient flows back through: for
the first layer (H, 4H) of the hidden state, for the others (2H, 4H), each padded to even rows."""

_ZERO = np.float32(0)

_padded = padded.py_func
"""For Python's own use: calling the compiled form would compile it a second time, alone."""


@jit
def _work(a):
    """Forward and backward over all steps, part by part."""
    layers, units, steps, block = a.layers, a.units, a.steps, a.block
    parts = (a.sampled + a.width - 1) // a.width
    wide0, wide1 = padded(a.inputs, units), padded(units, units)
    top = layers - 1
    numbers_of_layer0 = (steps + 1) * wide0 * block
    kept = np.zeros(numbers_of_layer0 + top * (steps + 1) * wide1 * block, np.float32)
    gates = np.zeros((layers, steps, 4 * units, block), np.float32)
    cells = np.empty((layers, steps + 1, units, block), np.float32)
    tanhs = np.empty((layers, steps, units, block), np.float32)
    output = np.empty(block, np.float32)
    push = np.empty((2 * units + 1, block), np.float32)
    silent = np.zeros(2 * units + 1, np.float32)
    dh = np.empty((layers, units, block), np.float32)
    dc = np.empty((layers, units, block), np.float32)
    total = layer_offset(a.inputs, units, layers) + units + 1
    while True:
        part = next_piece(a.counter)
        if part >= parts:
            return
        sums = carray(numbers(a.sums + 4 * part * total), (total,))
        for start in range(part * a.width, min((part + 1) * a.width, a.sampled), block):
            n = min(block, a.sampled - start)
            _forward(a, kept, gates, cells, tanhs, start, n)
            dh[:] = 0
            dc[:] = 0
            for t in range(steps - 1, -1, -1):
                _head_backward(a, kept, output, push[0], sums, dh[top], t, start, n)
                for layer in range(top, -1, -1):
                    rows = _rows(a, kept, layer, block)[t]
                    _cell_backward(
                        gates[layer, t], cells[layer, t], tanhs[layer, t], dh[layer], dc[layer], n
                    )
                    place = layer_offset(a.inputs, units, layer)
                    _add_weight_gradients(gates[layer, t], rows, sums, place, n)
                    if t > 0 or layer > 0:
                        _push_back(a, gates[layer, t], silent, push, dh, layer, n)


@jit
def _rows(a, kept, layer, block):
    """A layer's inputs and hidden states, (T + 1, K, B)."""
    first = (a.steps + 1) * padded(a.inputs, a.units) * block
    if layer == 0:
        return kept[:first].reshape(a.steps + 1, padded(a.inputs, a.units), block)
    wide = padded(a.units, a.units)
    size = (a.steps + 1) * wide * block
    start = first + (layer - 1) * size
    return kept[start : start + size].reshape(a.steps + 1, wide, block)


@jit
def _forward(a, kept, gates, cells, tanhs, start, n):
    layers, units, steps, block = a.layers, a.units, a.steps, a.block
    source = carray(numbers(a.features), (steps, a.inputs, a.sampled))
    places = carray(integers(a.carries), (layers, 2))
    for layer in range(layers):
        rows = _rows(a, kept, layer, block)
        rows[:, :, n:] = 0  # an earlier block may have left nan there
        count = a.inputs if layer == 0 else units
        hidden = carray(numbers(places[layer, 0]), (units, a.sampled))
        cell = carray(numbers(places[layer, 1]), (units, a.sampled))
        for j in range(units):
            rows[0, count + j, :n] = hidden[j, start : start + n]
            cells[layer, 0, j, :n] = cell[j, start : start + n]
    first = _rows(a, kept, 0, block)
    for t in range(steps):
        for k in range(a.inputs):
            first[t, k, :n] = source[t, k, start : start + n]
        for layer in range(layers):
            rows = _rows(a, kept, layer, block)
            count = a.inputs if layer == 0 else units
            weight, bias = layer_weight(a, layer)
            affine(weight, bias, rows[t], gates[layer, t], n)
            for j in range(units):
                enter, forget = gates[layer, t, j], gates[layer, t, units + j]
                leave, candidate = gates[layer, t, 2 * units + j], gates[layer, t, 3 * units + j]
                old, new = cells[layer, t, j], cells[layer, t + 1, j]
                tanh_row, value = tanhs[layer, t, j], rows[t + 1, count + j]
                for b in range(n):
                    i, f = sigmoid(enter[b]), sigmoid(forget[b])
                    o, g = sigmoid(leave[b]), tanh(candidate[b])
                    c = f * old[b] + i * g
                    u = tanh(c)
                    enter[b] = i
                    forget[b] = f
                    leave[b] = o
                    candidate[b] = g
                    new[b] = c
                    tanh_row[b] = u
                    value[b] = o * u
            if layer + 1 < layers:
                upper = _rows(a, kept, layer + 1, block)[t]
                for j in range(units):
                    upper[j, :n] = rows[t + 1, count + j, :n]


@jit
def _head_backward(a, kept, output, raw, sums, dh, t, start, n):
    """The output's gradient, and what the head passes on to the top layer's hidden state."""
    layers, units = a.layers, a.units
    rows = _rows(a, kept, layers - 1, a.block)
    above = a.inputs if layers == 1 else units  # where the top layer's hidden rows start
    place = layer_offset(a.inputs, units, layers)
    head = carray(numbers(a.weights + 4 * place), (units,))
    adjoint = carray(numbers(a.adjoint), (a.steps, a.sampled))[t, start : start + n]
    for b in range(n):
        output[b] = adjoint[b] * a.factor
    if a.scale:
        scale = carray(numbers(a.scale), (a.steps, a.sampled))[t, start : start + n]
        for b in range(n):
            output[b] *= scale[b]
    if a.bounded:
        for b in range(n):
            raw[b] = a.head_bias
        for j in range(units):
            w, row = head[j], rows[t + 1, above + j]
            for b in range(n):
                raw[b] += w * row[b]
        for b in range(n):
            u = tanh(raw[b])
            output[b] *= ONE - u * u
    total = _ZERO
    for b in range(n):
        total += output[b]
    sums[place + units] += total
    for j in range(units):
        w, row, grad = head[j], rows[t + 1, above + j], dh[j]
        total = _ZERO
        for b in range(n):
            total += output[b] * row[b]
            grad[b] += w * output[b]
        sums[place + j] += total


@jit
def _cell_backward(gates, cells, tanhs, dh, dc, n):
    """Turn the gates into their gradients, before the nonlinearity, and step the cell's back."""
    units = dh.shape[0]
    for j in range(units):
        enter, forget = gates[j], gates[units + j]
        leave, candidate = gates[2 * units + j], gates[3 * units + j]
        old, tanh_row, grad_h, grad_c = cells[j], tanhs[j], dh[j], dc[j]
        for b in range(n):
            i, f, o, g = enter[b], forget[b], leave[b], candidate[b]
            u = tanh_row[b]
            h = grad_h[b]
            c = grad_c[b] + h * o * (ONE - u * u)
            grad_c[b] = c * f
            enter[b] = c * g * i * (ONE - i)
            forget[b] = c * old[b] * f * (ONE - f)
            leave[b] = h * u * o * (ONE - o)
            candidate[b] = c * i * (ONE - g * g)


@jit
def _add_weight_gradients(deltas, rows, sums, place, n):
    """Add deltas @ rows^T, then the deltas' own sums, to `sums` from `place` on."""
    gates, count = deltas.shape[0], rows.shape[0]
    end = min(deltas.shape[1], n + TILE)
    for g in range(gates):
        deltas[g, n:end] = 0
    add_products(deltas, rows, sums[place : place + gates * count].reshape(gates, count), n)
    for g in range(gates):
        delta, total = deltas[g], _ZERO
        for b in range(n):
            total += delta[b]
        sums[place + gates * count + g] += total


@jit
def _push_back(a, deltas, silent, push, dh, layer, n):
    """The gates' gradients to the hidden state before, and to the layer below."""
    units = a.units
    even = (units + 1) // 2 * 2
    if layer == 0:
        back = carray(numbers(a.backward), (even, 4 * units))
    else:
        at = a.backward + 16 * units * (even + (layer - 1) * 2 * units)
        back = carray(numbers(at), (2 * units, 4 * units))
    affine(back, silent, deltas, push, n)
    below = 0 if layer == 0 else units
    for j in range(units):
        source, grad = push[below + j], dh[layer, j]
        for b in range(n):
            grad[b] = source[b]
        if layer > 0:
            source, grad = push[j], dh[layer - 1, j]
            for b in range(n):
                grad[b] += source[b]


def _make_replay(stamp: int) -> Any:
    def replay(raw):
        if stamp:
            _work(carray(raw, (1,), RECORD)[0])

    return replay


@cache
def _entry() -> int:
    return entry(_make_replay)


def replay(
    rule: LSTMRule,
    weights: Weights,
    features_TFS: Tensor,
    carry: Carry,
    adjoint_TS: Tensor,
    scale_TS: Tensor | None,
) -> dict[str, Tensor]:
    """Gradients of sum adjoint * step with respect to the weights.

    Args:
        rule: the rule.
        weights: its weights.
        features_TFS: (T, F, S) features, constants.
        carry: (H, S) tensors at the window's start, constants.
        adjoint_TS: (T, S) adjoint of the steps.
        scale_TS: (T, S) factor on the steps, or none.

    Returns:
        float32 gradients by weight name.

    Raises:
        ValueError: a tensor of another dtype, device or shape.
    """
    steps, _, sampled = features_TFS.shape
    record = np.zeros(1, RECORD)
    packed = describe_network(record[0], rule, weights)
    block = replay_block(rule, steps)
    blocks = -(-sampled // block)
    width = max(1, -(-blocks // PARTS)) * block
    parts = -(-sampled // width)
    sums = np.zeros((max(parts, 1), len(packed) + 1), np.float32)
    backward, counter = _transposed(rule, weights), np.zeros(1, np.int64)
    held = [features_TFS.contiguous(), adjoint_TS.contiguous()]
    states = {key: carry[key].contiguous() for key in rule.carry_keys}
    wide = (rule.hidden, sampled)
    places = np.array(
        [team.whole_address(t, f"carry {key!r}", wide) for key, t in states.items()], np.int64
    )
    count = rule.feature_set.count
    values = {
        "counter": counter.ctypes.data, "steps": steps, "sampled": sampled, "block": block,
        "width": width, "carries": places.ctypes.data,
        "features": team.whole_address(held[0], "the features", (steps, count, sampled)),
        "adjoint": team.whole_address(held[1], "the adjoint", (steps, sampled)),
        "sums": sums.ctypes.data, "backward": backward.ctypes.data,
    }  # fmt: skip
    if scale_TS is not None:
        held.append(scale_TS.contiguous())
        values["scale"] = team.whole_address(held[2], "the scale", (steps, sampled))
    for name, value in values.items():
        record[0][name] = value
    team.run(_entry(), record, parts)
    return _unpacked(rule, sums.sum(0, dtype=np.float64).astype(np.float32))


def replay_block(rule: LSTMRule, steps: int) -> int:
    """B of a replay: `BLOCK`, or less where the window is long."""
    rows = _padded(rule.feature_set.count, rule.hidden)
    rows += (rule.layers - 1) * _padded(rule.hidden, rule.hidden)
    fitting = BUFFER // (4 * steps * (rows + 6 * rule.layers * rule.hidden)) // TILE * TILE
    return min(BLOCK, max(TILE, fitting))


def _transposed(rule: LSTMRule, weights: Weights) -> np.ndarray:
    parts = []
    for layer in range(rule.layers):
        weight = weights[f"lstm{layer}.weight"].detach().to("cpu", torch.float32).numpy()
        columns = weight[:, rule.feature_set.count :] if layer == 0 else weight
        parts.append(np.pad(columns.T, ((0, columns.shape[1] % 2), (0, 0))).reshape(-1))
    return np.ascontiguousarray(np.concatenate(parts), np.float32)


def _unpacked(rule: LSTMRule, sums: np.ndarray) -> dict[str, Tensor]:
    gradients, place, inputs = {}, 0, rule.feature_set.count
    for layer in range(rule.layers):
        rows, columns = 4 * rule.hidden, _padded(inputs, rule.hidden)
        end = place + rows * columns
        full = torch.from_numpy(sums[place:end].reshape(rows, columns))
        gradients[f"lstm{layer}.weight"] = full[:, : inputs + rule.hidden].clone()
        place = end + rows
        gradients[f"lstm{layer}.bias"] = torch.from_numpy(sums[end:place].copy())
        inputs = rule.hidden
    gradients["head.weight"] = torch.from_numpy(sums[place : place + rule.hidden].copy())[None]
    if rule.bias:
        gradients["head.bias"] = torch.from_numpy(sums[-1:].copy())
    return gradients
