"""The residual block compiled by numba: float32, three channels, kernels of 3x3 and 5x5.

A channel is copied into a buffer with a border of zeros, its rows end to end, so that a shift by
rows and columns is one offset and one loop runs over all pixels; the few numbers it makes beyond
each row's end are never looked at.

Shape letters: B = batch, X = image channels, C = 3 channels, K = kernel, N = pixels of a channel,
with the borders at its rows' ends; P = numbers of a channel with its whole border.
"""

# pyright: reportIndexIssue=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

_FAST = {"contract", "reassoc", "nsz", "arcp"}
"""Fast mathematics, but nan stays nan and infinity infinity."""

_ZERO, _ONE = np.float32(0), np.float32(1)


def _compiled(function: Callable[..., Any]) -> Any:
    options = {"nogil": True, "error_model": "numpy", "fastmath": _FAST}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # a read-only installation and no home
        return njit(**options)(function)


@_compiled
def _fill(channels, border, padded_CP):
    """Copy (channels, height, width) into the buffer's inner part."""
    _, high, wide = channels.shape
    row = wide + 2 * border
    for c in range(len(channels)):
        for y in range(high):
            at = (y + border) * row + border
            padded_CP[c, at : at + wide] = channels[c, y]


@_compiled
def _add_row(sums_N, taps_K, source_N, count):
    """Add the products with one row of a kernel."""
    if len(taps_K) == 3:
        a, b, c = taps_K[0], taps_K[1], taps_K[2]
        for i in range(count):
            sums_N[i] += a * source_N[i] + b * source_N[i + 1] + c * source_N[i + 2]
    else:
        a, b, c, d, e = taps_K[0], taps_K[1], taps_K[2], taps_K[3], taps_K[4]
        for i in range(count):
            sums_N[i] += (
                a * source_N[i] + b * source_N[i + 1] + c * source_N[i + 2]
                + d * source_N[i + 3] + e * source_N[i + 4]
            )  # fmt: skip


@_compiled
def _add_products(sums_K, grad_N, source_N, count):
    """Add one image's part in the gradient by one row of a kernel."""
    a = b = c = d = e = _ZERO
    if len(sums_K) == 3:
        for i in range(count):
            a += grad_N[i] * source_N[i]
            b += grad_N[i] * source_N[i + 1]
            c += grad_N[i] * source_N[i + 2]
    else:
        for i in range(count):
            a += grad_N[i] * source_N[i]
            b += grad_N[i] * source_N[i + 1]
            c += grad_N[i] * source_N[i + 2]
            d += grad_N[i] * source_N[i + 3]
            e += grad_N[i] * source_N[i + 4]
        sums_K[3] += d
        sums_K[4] += e
    sums_K[0] += a
    sums_K[1] += b
    sums_K[2] += c


@_compiled
def _convolve(padded_CP, weight_CKK, row, count, sums_N):
    """Add one output channel to `sums_N`."""
    for c in range(len(weight_CKK)):
        for k in range(weight_CKK.shape[1]):
            _add_row(sums_N, weight_CKK[c, k], padded_CP[c, k * row :], count)


@_compiled
def _activate(values_N, sigmoid):
    # Comparisons that nan fails, so that it passes through.
    if sigmoid:
        for i in range(len(values_N)):
            values_N[i] = _ONE / (_ONE + np.exp(-values_N[i]))
    else:
        for i in range(len(values_N)):
            values_N[i] = _ZERO if values_N[i] < _ZERO else values_N[i]


@_compiled
def _slope(value, sigmoid):
    """The activation's derivative where its value is this."""
    if sigmoid:
        return value * (_ONE - value)
    return _ONE if value > _ZERO else _ZERO


@_compiled
def _pool(sums_N, row, sigmoid, pooled, places):
    """Activate and take the largest of each 2x2; rows and columns left over are dropped."""
    for y in range(pooled.shape[0]):
        for x in range(pooled.shape[1]):
            at = 2 * y * row + 2 * x
            best, place = sums_N[at], 0
            for other in range(1, 4):
                value = sums_N[at + (other // 2) * row + other % 2]
                if value > best or value != value:
                    best, place = value, other
            pooled[y, x] = best
            places[y, x] = place
        _activate(pooled[y], sigmoid)


@_compiled
def _run_forward(images, first, first_bias, second, second_bias, sigmoid, pooled, hidden, places):
    _, inputs, high, wide = images.shape
    channels, border = len(first), first.shape[-1] // 2
    row = wide + 2 * border
    count = high * row - 2 * border
    image_XP = np.zeros((inputs, (high + 2 * border) * row), np.float32)
    hidden_CP = np.zeros((channels, (high + 2 * border) * row), np.float32)
    sums_N = np.zeros(high * row, np.float32)
    for b in range(len(images)):
        _fill(images[b], border, image_XP)
        for c in range(channels):
            sums_N[:] = first_bias[c]
            _convolve(image_XP, first[c], row, count, sums_N)
            _activate(sums_N, sigmoid)
            for y in range(high):
                hidden[b, c, y] = sums_N[y * row : y * row + wide]
        _fill(hidden[b], border, hidden_CP)
        for c in range(channels):
            sums_N[:] = second_bias[c]
            _convolve(hidden_CP, second[c], row, count, sums_N)
            shortcut = images[b, c if inputs > 1 else 0]
            for y in range(high):
                for x in range(wide):
                    sums_N[y * row + x] += shortcut[y, x]
            _pool(sums_N, row, sigmoid, pooled[b, c], places[b, c])


@_compiled
def _run_backward(
    grad, images, flipped, pooled, hidden, places, sigmoid,
    by_first, by_first_bias, by_second, by_second_bias,
):  # fmt: skip
    _, inputs, high, wide = images.shape
    channels, border = hidden.shape[1], flipped.shape[-1] // 2
    row = wide + 2 * border
    count = high * row - 2 * border
    inner = border * row + border
    image_XP = np.zeros((inputs, (high + 2 * border) * row), np.float32)
    hidden_CP = np.zeros((channels, (high + 2 * border) * row), np.float32)
    grad_CP = np.zeros((channels, (high + 2 * border) * row), np.float32)
    sums_N = np.zeros(high * row, np.float32)
    for b in range(len(images)):
        _fill(images[b], border, image_XP)
        _fill(hidden[b], border, hidden_CP)
        grad_CP[:] = _ZERO
        for c in range(channels):
            total = _ZERO
            for y in range(pooled.shape[2]):
                for x in range(pooled.shape[3]):
                    value = grad[b, c, y, x] * _slope(pooled[b, c, y, x], sigmoid)
                    place = places[b, c, y, x]
                    at = inner + (2 * y + place // 2) * row + 2 * x + place % 2
                    grad_CP[c, at] = value
                    total += value
            by_second_bias[c] += total
            for h in range(channels):
                for k in range(flipped.shape[-1]):
                    source = hidden_CP[h, k * row :]
                    _add_products(by_second[c, h, k], grad_CP[c, inner:], source, count)
        for c in range(channels):
            sums_N[:] = _ZERO
            _convolve(grad_CP, flipped[c], row, count, sums_N)
            total = _ZERO
            for y in range(high):
                for x in range(wide):
                    at = y * row + x
                    sums_N[at] *= _slope(hidden[b, c, y, x], sigmoid)
                    total += sums_N[at]
                # Beyond the row's end there are no pixels.
                sums_N[y * row + wide : (y + 1) * row] = _ZERO
            by_first_bias[c] += total
            for x in range(inputs):
                for k in range(flipped.shape[-1]):
                    _add_products(by_first[c, x, k], sums_N, image_XP[x, k * row :], count)


def forward(
    images_BXHW: Tensor, weights: tuple[Tensor, ...], sigmoid: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The block on a batch.

    Args:
        images_BXHW: (B, X, height, width).
        weights: both convolutions' weights and biases.
        sigmoid: the activation; ReLU otherwise.

    Returns:
        (B, C, height // 2, width // 2) results, (B, C, height, width) hidden activations, and
        uint8 places of the largest of each 2x2, shaped like the results.
    """
    batch, _, high, wide = images_BXHW.shape
    channels = len(weights[0])
    pooled = images_BXHW.new_empty(batch, channels, high // 2, wide // 2)
    hidden = images_BXHW.new_empty(batch, channels, high, wide)
    places = pooled.byte()
    _run_forward(*map(_array, (images_BXHW, *weights)), sigmoid,
                 *map(_array, (pooled, hidden, places)))  # fmt: skip
    return pooled, hidden, places


def backward(
    grad: Tensor,
    images_BXHW: Tensor,
    second_CCKK: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    places: Tensor,
    sigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by both convolutions' weights and biases.

    Args:
        grad: by the results.
        images_BXHW, second_CCKK: given to `forward`.
        pooled, hidden, places: what it returned.
        sigmoid: the activation; ReLU otherwise.
    """
    channels, kernel = len(second_CCKK), second_CCKK.shape[-1]
    flipped = second_CCKK.flip(2, 3).transpose(0, 1)
    found = (
        grad.new_zeros(channels, images_BXHW.shape[1], kernel, kernel), grad.new_zeros(channels),
        grad.new_zeros(channels, channels, kernel, kernel), grad.new_zeros(channels),
    )  # fmt: skip
    given = map(_array, (grad, images_BXHW, flipped, pooled, hidden, places))
    _run_backward(*given, sigmoid, *map(_array, found))
    return found


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()
