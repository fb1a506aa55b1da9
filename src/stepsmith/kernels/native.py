"""The LSTM rules' step and replay compiled for the CPU by numba, in float32.

Mirrors `stepsmith.rules.lstm.LSTMRule`, its reference. Coordinates are handled in blocks that stay
in the first-level cache through every layer; along a block each loop is one the compiler turns into
vector instructions. tanh is a rational function (`scripts/fit_tanh.py`), relative error 3e-7, and
sigmoid(x) = (1 + tanh(x / 2)) / 2; nan stays nan.

Numba is optional (`pip install stepsmith[fast]`); importing this module without it fails. What it
compiles is cached on disk where there is a place to write.

Shape letters: N = coordinates, S = sampled coordinates, T = steps, F = features, H = hidden units,
I = inputs of a layer, K = I + H rounded up to a multiple of 4, B = coordinates of a block.
"""

# pyright: reportIndexIssue=false
from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from stepsmith.kernels.tiles import FLAGS, TILE, add_products, affine
from stepsmith.rules.base import Carry, Weights
from stepsmith.rules.lstm import LSTMRule

BLOCK = 128
"""B: a multiple of `tiles.TILE`."""

REPLAY_BUFFER = 1 << 24
"""Bytes a thread may fill with what a replay keeps of one block; long windows take short blocks."""

PARALLEL = 4096
"""Coordinates from which a step is shared between threads."""

PARTS = 64
"""Most parts a replay is cut into; set by the sample's size alone, so that the sum over parts is
the same for any number of threads."""


def _jit(function: Callable[..., Any]) -> Any:
    """Compile on first use, cached on disk where there is a place to write."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": FLAGS}
    try:
        return njit(**options, cache=True)(function)
    except RuntimeError:  # a read-only installation and no home
        return njit(**options)(function)


_inline = njit(error_model="numpy", fastmath=FLAGS, inline="always")
_f = np.float32
_TOP = _f(8.0)
_P0, _P1, _P2, _P3, _P4 = map(
    _f, (1.0, 1.344452202e-01, 3.571627196e-03, 2.189512452e-05, 1.523102888e-08)
)
_Q0, _Q1, _Q2, _Q3, _Q4 = map(
    _f, (1.0, 4.677785039e-01, 2.616455406e-02, 3.411338839e-04, 8.522703183e-07)
)
_HALF, _ONE = _f(0.5), _f(1.0)


@_inline
def _tanh(x):
    z = x * x
    p = (((_P4 * z + _P3) * z + _P2) * z + _P1) * z + _P0
    q = (((_Q4 * z + _Q3) * z + _Q2) * z + _Q1) * z + _Q0
    # Exactly 1 from _TOP on: a saturated gate passes nothing and has no gradient.
    return math.copysign(_ONE, x) if abs(x) > _TOP else x * p / q


@_inline
def _sigmoid(x):
    return _HALF + _HALF * _tanh(_HALF * x)


@_jit
def _step(weights, biases, head, head_bias, features, hidden, cell, strides, out, span):
    """One step of coordinates span[0] to span[1]; `hidden` and `cell` are flat, rows `strides`
    apart, since a carry may be a slice of a longer one."""
    layers, units = len(weights), head.shape[0]
    inputs = weights[0].shape[1]
    for layer in range(1, layers):
        inputs = max(inputs, weights[layer].shape[1])
    rows = np.zeros((inputs, BLOCK), np.float32)
    gates = np.empty((4 * units, BLOCK), np.float32)
    for start in range(span[0], span[1], BLOCK):
        n = min(BLOCK, span[1] - start)
        count = features.shape[0]
        for k in range(count):
            row, source = rows[k], features[k, start : start + n]
            for b in range(n):
                row[b] = source[b]
        for layer in range(layers):
            apart = strides[layer]
            for j in range(units):
                row = rows[count + j]
                source = hidden[layer][j * apart + start : j * apart + start + n]
                for b in range(n):
                    row[b] = source[b]
            for k in range(count + units, weights[layer].shape[1]):
                rows[k, :] = 0
            affine(weights[layer], biases[layer], rows, gates, n)
            for j in range(units):
                enter, forget = gates[j], gates[units + j]
                leave, candidate = gates[2 * units + j], gates[3 * units + j]
                c = cell[layer][j * apart + start : j * apart + start + n]
                h = hidden[layer][j * apart + start : j * apart + start + n]
                row = rows[j]  # the next layer's input
                for b in range(n):
                    new = _sigmoid(forget[b]) * c[b] + _sigmoid(enter[b]) * _tanh(candidate[b])
                    c[b] = new
                    value = _sigmoid(leave[b]) * _tanh(new)
                    h[b] = value
                    row[b] = value
            count = units
        result = out[start : start + n]
        for b in range(n):
            result[b] = head_bias
        for j in range(units):
            weight, row = head[j], rows[j]
            for b in range(n):
                result[b] += weight * row[b]


@_jit
def _replay(
    weights, biases, backward, head, head_bias, bounded, factor,
    features, hidden, cell, adjoint, scale, scaled, span, kept, gates, cells, tanhs, sums,
):  # fmt: skip
    """Forward and backward over all steps of the coordinates span[0] to span[1].

    `kept[l]` (T + 1, K, B), `gates[l]` (T, 4H, B), `cells[l]` (T + 1, H, B), `tanhs[l]` (T, H, B)
    are overwritten; `sums` collects the gradients: per layer its weight (4H, K) and bias, then the
    head and its bias, flat.
    """
    layers, units, steps = len(weights), head.shape[0], features.shape[0]
    block = gates[0].shape[2]
    output = np.empty(block, np.float32)
    push = np.empty((2 * units + 1, block), np.float32)
    silent = np.zeros(2 * units + 1, np.float32)
    dh = np.empty((layers, units, block), np.float32)
    dc = np.empty((layers, units, block), np.float32)
    for start in range(span[0], span[1], block):
        n = min(block, span[1] - start)
        for layer in range(layers):
            kept[layer][:, :, n:] = 0  # an earlier replay may have left nan there
            count = features.shape[1] if layer == 0 else units
            for j in range(units):
                kept[layer][0, count + j, :n] = hidden[layer][j, start : start + n]
                cells[layer][0, j, :n] = cell[layer][j, start : start + n]
        for t in range(steps):
            for k in range(features.shape[1]):
                kept[0][t, k, :n] = features[t, k, start : start + n]
            for layer in range(layers):
                count = features.shape[1] if layer == 0 else units
                affine(weights[layer], biases[layer], kept[layer][t], gates[layer][t], n)
                for j in range(units):
                    enter, forget = gates[layer][t, j], gates[layer][t, units + j]
                    leave = gates[layer][t, 2 * units + j]
                    candidate = gates[layer][t, 3 * units + j]
                    old, new = cells[layer][t, j], cells[layer][t + 1, j]
                    tanh, value = tanhs[layer][t, j], kept[layer][t + 1, count + j]
                    for b in range(n):
                        i, f = _sigmoid(enter[b]), _sigmoid(forget[b])
                        o, g = _sigmoid(leave[b]), _tanh(candidate[b])
                        c = f * old[b] + i * g
                        u = _tanh(c)
                        enter[b] = i
                        forget[b] = f
                        leave[b] = o
                        candidate[b] = g
                        new[b] = c
                        tanh[b] = u
                        value[b] = o * u
                    if layer + 1 < layers:
                        upper = kept[layer + 1][t, j]
                        for b in range(n):
                            upper[b] = value[b]
        dh[:] = 0
        dc[:] = 0
        top = layers - 1
        above = features.shape[1] if top == 0 else units  # where the top layer's hidden rows start
        end = sums.shape[0] - 1
        for t in range(steps - 1, -1, -1):
            weight_adjoint = adjoint[t, start : start + n]
            for b in range(n):
                output[b] = weight_adjoint[b] * factor
            if scaled:
                weight_scale = scale[t, start : start + n]
                for b in range(n):
                    output[b] *= weight_scale[b]
            if bounded:
                push0 = push[0]
                for b in range(n):
                    push0[b] = head_bias
                for j in range(units):
                    w, row = head[j], kept[top][t + 1, above + j]
                    for b in range(n):
                        push0[b] += w * row[b]
                for b in range(n):
                    u = _tanh(push0[b])
                    output[b] *= _ONE - u * u
            total = _f(0)
            for b in range(n):
                total += output[b]
            sums[end] += total
            for j in range(units):
                w, row, grad = head[j], kept[top][t + 1, above + j], dh[top, j]
                total = _f(0)
                for b in range(n):
                    total += output[b] * row[b]
                    grad[b] += w * output[b]
                sums[end - units + j] += total
            for layer in range(top, -1, -1):
                for j in range(units):
                    enter, forget = gates[layer][t, j], gates[layer][t, units + j]
                    leave = gates[layer][t, 2 * units + j]
                    candidate = gates[layer][t, 3 * units + j]
                    old, tanh = cells[layer][t, j], tanhs[layer][t, j]
                    grad_h, grad_c = dh[layer, j], dc[layer, j]
                    for b in range(n):
                        i, f, o, g = enter[b], forget[b], leave[b], candidate[b]
                        u = tanh[b]
                        h = grad_h[b]
                        c = grad_c[b] + h * o * (_ONE - u * u)
                        grad_c[b] = c * f
                        enter[b] = c * g * i * (_ONE - i)
                        forget[b] = c * old[b] * f * (_ONE - f)
                        leave[b] = h * u * o * (_ONE - o)
                        candidate[b] = c * i * (_ONE - g * g)
                _add_weight_gradients(
                    gates[layer][t], kept[layer][t], sums, _offset(weights, layer), n
                )
                below = 0 if layer == 0 else units
                if t > 0 or layer > 0:
                    affine(backward[layer], silent, gates[layer][t], push, n)
                    for j in range(units):
                        source, grad = push[below + j], dh[layer, j]
                        for b in range(n):
                            grad[b] = source[b]
                        if layer > 0:
                            source, grad = push[j], dh[layer - 1, j]
                            for b in range(n):
                                grad[b] += source[b]


@_jit
def _offset(weights, layer):
    place = 0
    for below in range(layer):
        place += weights[below].shape[0] * (weights[below].shape[1] + 1)
    return place


@_jit
def _add_weight_gradients(deltas, rows, sums, place, n):
    """Add deltas @ rows^T, then the deltas' own sums, to `sums` from `place` on."""
    gates, count = deltas.shape[0], rows.shape[0]
    end = min(deltas.shape[1], n + TILE)
    for g in range(gates):
        deltas[g, n:end] = 0
    add_products(deltas, rows, sums[place : place + gates * count].reshape(gates, count), n)
    for g in range(gates):
        delta, total = deltas[g], _f(0)
        for b in range(n):
            total += delta[b]
        sums[place + gates * count + g] += total


@dataclass(frozen=True)
class Packed:
    """A rule's weights as the compiled functions take them.

    Attributes:
        weights: a (4H, K) array a layer, padded with zero columns.
        biases: (4H,) a layer.
        backward: the transposed columns a gradient flows back through: (H, 4H) of the hidden state
            for the first layer, (2H, 4H) for the others; an even number of rows.
        head: (H,).
        head_bias: zero where the rule has none.
    """

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]
    backward: tuple[np.ndarray, ...]
    head: np.ndarray
    head_bias: np.float32


def pack(rule: LSTMRule, weights: Weights) -> Packed:
    """Copy and pad the weights; read now, so pack again when they change."""
    plain = {key: value.detach().to("cpu", torch.float32) for key, value in weights.items()}
    units, inputs = rule.hidden, rule.feature_set.count
    packed, biases, backward = [], [], []
    for layer in range(rule.layers):
        weight = plain[f"lstm{layer}.weight"]
        columns = weight[:, inputs:] if layer == 0 else weight
        packed.append(_padded(weight, 1, 4))
        backward.append(_padded(columns.t(), 0, 2))
        biases.append(plain[f"lstm{layer}.bias"].numpy().copy())
        inputs = units
    head_bias = np.float32(plain["head.bias"].item() if rule.bias else 0.0)
    head = plain["head.weight"][0].numpy().copy()
    return Packed(tuple(packed), tuple(biases), tuple(backward), head, head_bias)


def _padded(tensor: Tensor, dim: int, multiple: int) -> np.ndarray:
    shape = list(tensor.shape)
    shape[dim] += -shape[dim] % multiple
    array = np.zeros(shape, np.float32)
    array[: tensor.shape[0], : tensor.shape[1]] = tensor.numpy()
    return array


def step_(packed: Packed, features_FN: Tensor, carry: Carry) -> Tensor:
    """One step for all coordinates; the carry is updated in place.

    Args:
        packed: what `pack` returned.
        features_FN: (F, N) float32.
        carry: (H, N) float32 tensors with unit stride along N, overwritten.

    Returns:
        (1, N) output.
    """
    count = features_FN.shape[1]
    out_1N = torch.empty(1, count)
    if count == 0:
        return out_1N
    layers = range(len(packed.weights))
    run = partial(
        _step, packed.weights, packed.biases, packed.head, packed.head_bias,
        features_FN.contiguous().numpy(),
        tuple(_flat(carry[f"h{layer}"]) for layer in layers),
        tuple(_flat(carry[f"c{layer}"]) for layer in layers),
        tuple(carry[f"h{layer}"].stride(0) for layer in layers),
        out_1N.numpy()[0],
    )  # fmt: skip
    threads = torch.get_num_threads()
    if threads == 1 or count < PARALLEL:
        run((0, count))
        return out_1N
    _shared(run, _spans(count, 2 * threads, BLOCK))
    return out_1N


def _flat(tensor_HN: Tensor) -> np.ndarray:
    """The storage from the first number to the last, rows `stride(0)` apart."""
    length = (len(tensor_HN) - 1) * tensor_HN.stride(0) + tensor_HN.shape[1]
    return tensor_HN.as_strided((length,), (1,)).numpy()


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
    """
    packed = pack(rule, weights)
    sampled = features_TFS.shape[2]
    padded = tuple(weight.shape[1] for weight in packed.weights)
    steps = len(features_TFS)
    block = _replay_block(steps, rule.hidden, padded)
    spans = _spans(sampled, PARTS, block)
    sizes = [w.size + b.size for w, b in zip(packed.weights, packed.biases, strict=True)]
    sums = np.zeros((len(spans), sum(sizes) + rule.hidden + 1), np.float32)
    layers = range(rule.layers)
    adjoint = adjoint_TS.contiguous().numpy()
    run = partial(
        _replay, packed.weights, packed.biases, packed.backward, packed.head, packed.head_bias,
        rule.output == "tanh", np.float32(-rule.step_scale), features_TFS.contiguous().numpy(),
        tuple(carry[f"h{layer}"].contiguous().numpy() for layer in layers),
        tuple(carry[f"c{layer}"].contiguous().numpy() for layer in layers),
        adjoint,
        adjoint if scale_TS is None else scale_TS.contiguous().numpy(),
        scale_TS is not None,
    )  # fmt: skip

    def part(place: tuple[int, tuple[int, int]]) -> None:
        index, span = place
        run(span, *_workspace(steps, rule.hidden, padded, block), sums[index])

    if torch.get_num_threads() == 1 or len(spans) == 1:
        for place in enumerate(spans):
            part(place)
    else:
        _shared(part, list(enumerate(spans)))
    return _unpacked(rule, packed, sums.sum(0, dtype=np.float64).astype(np.float32))


def _unpacked(rule: LSTMRule, packed: Packed, sums: np.ndarray) -> dict[str, Tensor]:
    gradients, place, inputs = {}, 0, rule.feature_set.count
    for layer, weight in enumerate(packed.weights):
        end = place + weight.size
        full = torch.from_numpy(sums[place:end].reshape(weight.shape))
        gradients[f"lstm{layer}.weight"] = full[:, : inputs + rule.hidden].clone()
        place = end + len(weight)
        gradients[f"lstm{layer}.bias"] = torch.from_numpy(sums[end:place].copy())
        inputs = rule.hidden
    gradients["head.weight"] = torch.from_numpy(sums[place : place + rule.hidden].copy())[None]
    if rule.bias:
        gradients["head.bias"] = torch.from_numpy(sums[-1:].copy())
    return gradients


def _spans(count: int, parts: int, block: int) -> list[tuple[int, int]]:
    """Cut `count` coordinates into at most `parts` spans of whole blocks."""
    blocks = -(-count // block)
    width = max(1, -(-blocks // parts)) * block
    return [(start, min(start + width, count)) for start in range(0, count, width)]


_local = threading.local()


def _replay_block(steps: int, units: int, padded: tuple[int, ...]) -> int:
    """B of a replay: `BLOCK`, or less where the window is long."""
    numbers = steps * sum(rows + 6 * units for rows in padded)
    fitting = REPLAY_BUFFER // (4 * max(1, numbers)) // TILE * TILE
    return min(BLOCK, max(TILE, fitting))


def _workspace(steps: int, units: int, padded: tuple[int, ...], block: int) -> tuple[Any, ...]:
    """This thread's buffers for a replay: kept, gates, cells, tanhs, an array a layer each."""
    key = (steps, units, padded, block)
    if getattr(_local, "key", None) != key:
        _local.key = key
        _local.buffers = (
            tuple(np.zeros((steps + 1, rows, block), np.float32) for rows in padded),
            tuple(np.zeros((steps, 4 * units, block), np.float32) for _ in padded),
            tuple(np.empty((steps + 1, units, block), np.float32) for _ in padded),
            tuple(np.empty((steps, units, block), np.float32) for _ in padded),
        )
    return _local.buffers


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "stepsmith-native")


def _shared(run: Callable[[Any], None], parts: list[Any]) -> None:
    """Run the parts on as many threads as torch uses, this one among them."""
    waiting = iter(parts)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                part = next(waiting, None)
            if part is None:
                return
            run(part)

    helpers = min(torch.get_num_threads(), len(parts)) - 1
    others = [_pool(helpers).submit(work) for _ in range(helpers)]
    work()
    for other in others:
        other.result()
