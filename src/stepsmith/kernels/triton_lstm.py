"""The LSTM rules' whole step on a GPU, in one launch for all tensors of a group, by Triton.

Mirrors `stepsmith.rules.lstm.LSTMRule`, its reference: features, every layer's gates, state, carry
and the step, each number read once and written once. Sizes that differ between optimizees are
ordinary arguments, on which nothing is specialised (but for the alignment of addresses), so that
one compilation serves every shape; the step count and the weights are read on the device, so that a
launch can be captured in a CUDA graph.

Needs the `triton` package (it comes with PyTorch's CUDA builds); importing this module without it
fails. With `TRITON_INTERPRET=1` it runs on the CPU, slowly, for tests.

Shape letters: N = coordinates of one copy, C = copies, F = features, H = hidden units, U = H
rounded up to a power of two, B = coordinates of a program, K = channels.
"""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# pyright: reportReturnType=false
from __future__ import annotations

import math
import os
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepsmith.kernels.lstm import require_weights
from stepsmith.rules.base import Carry, State, Weights
from stepsmith.rules.features import FEATURE_SETS, FRAMES, LARGEST_GRADIENT, FeatureSet
from stepsmith.rules.lstm import LSTMRule

_RAW, _LOG_SIGN, _ADAM, _JOINED = (
    tl.constexpr(FEATURE_SETS.index(name)) for name in ("raw", "log_sign", "adam", "joined")
)
_HOLD, _MOMENTUM = (tl.constexpr(FRAMES.index(name)) for name in ("hold", "momentum"))
_LARGEST = tl.constexpr(LARGEST_GRADIENT)

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
"""Whether kernels run under Triton's interpreter: on the CPU, one operation at a time."""

SMALLEST_DOT = 16
"""Rows and columns that a product of Triton's must have."""


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def _clamp(x, size):
    # Comparisons with nan are false: it stays.
    x = tl.where(x > size, size, x)
    return tl.where(x < -size, -size, x)


@triton.jit
def _tanh(x):
    # exp(-2 |x|) cannot overflow; near zero 1 - exp(-2 |x|) loses digits that a series keeps.
    size = tl.abs(x)
    small = tl.exp(-2.0 * size)
    z = x * x
    series = size * (1.0 + z * (-1.0 / 3 + z * (2.0 / 15 - z * (17.0 / 315))))
    value = tl.where(size < 0.1, series, (1.0 - small) / (1.0 + small))
    return tl.where(x < 0, -value, tl.where(x == x, value, x))


@triton.jit
def _log(x, smallest, per):
    size = tl.abs(x)
    size = tl.where(size < smallest, smallest, size)
    value = tl.log(size) * per
    return tl.where(value < -1.0, -1.0, value)


@triton.jit
def _add_feature(gates, feature, weight_at, row, column, columns: tl.constexpr):
    """gates (B, 4U) + the outer product of a feature (B,) and a row of the weight."""
    weight = tl.load(weight_at + row * columns + column)
    return gates + feature[:, None] * weight[None, :]


@triton.jit
def _sigmoid(x):
    # An exponential that overflows gives 1 / inf, the zero it should.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _cell(gates, cell, B: tl.constexpr, U: tl.constexpr):
    """Gates (B, 4U), a unit's four side by side: enter, forget, leave, candidate."""
    evens, odds = tl.split(tl.reshape(gates, (B, U, 2, 2)))
    enter, leave = tl.split(evens)
    forget, candidate = tl.split(odds)
    # tanh(x) = 2 sigmoid(2x) - 1: its rounding is of numbers near 1, as all of a gate's are.
    cell = _sigmoid(forget) * cell + _sigmoid(enter) * (2.0 * _sigmoid(2.0 * candidate) - 1.0)
    return _sigmoid(leave) * (2.0 * _sigmoid(2.0 * cell) - 1.0), cell


@triton.jit(do_not_specialize=["size", "total"])
def _step(
    grad_at, first_at, second_at, steps_at, carries_at, weights_at, delta_at,
    size, total, beta1_log, beta2_log, beta2, take1, take2, eps, per, smallest, largest, factor,
    SET: tl.constexpr, FRAME: tl.constexpr, INPUTS: tl.constexpr, UNITS: tl.constexpr,
    LAYERS: tl.constexpr, BOUNDED: tl.constexpr, CARRY: tl.constexpr, PRECISION: tl.constexpr,
    B: tl.constexpr, U: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = place < total
    g = _clamp(tl.load(grad_at + place, inside, other=0.0), _LARGEST)
    scale = tl.full((B,), 1.0, tl.float32)
    column = tl.arange(0, 4 * U)
    columns: tl.constexpr = 4 * U
    # A layer's numbers: see `packed_weights`.
    gates = tl.zeros((B, 4 * U), tl.float32) + tl.load(weights_at + column)[None, :]
    weight_at = weights_at + columns
    if SET == _RAW:
        if FRAME == _MOMENTUM:
            scale = _sign(g)
        gates = _add_feature(gates, g * scale, weight_at, 0, column, columns)
    elif SET == _LOG_SIGN:
        if FRAME == _MOMENTUM:
            scale = _sign(g)
        sign = _clamp(g * largest, 1.0) * scale
        gates = _add_feature(gates, sign, weight_at, 0, column, columns)
        gates = _add_feature(gates, _log(g, smallest, per), weight_at, 1, column, columns)
    else:
        count = tl.load(steps_at + place // size, inside, other=1.0)
        mean = tl.load(first_at + place, inside, other=0.0)
        mean = mean + take1 * (g - mean)
        square = tl.load(second_at + place, inside, other=0.0) * beta2 + take2 * g * g
        tl.debug_barrier()  # several threads may hold one coordinate: all have read the old ones
        tl.store(first_at + place, mean, inside)
        tl.store(second_at + place, square, inside)
        mean = mean / (1.0 - tl.exp(count * beta1_log))
        inverse = 1.0 / (tl.sqrt(square / (1.0 - tl.exp(count * beta2_log))) + eps)
        sign = tl.full((B,), 1.0, tl.float32)
        if FRAME == _MOMENTUM:
            sign = _sign(mean)
            scale = sign
        elif FRAME == _HOLD:
            scale = tl.where(mean != 0, 1.0, 0.0)
        gates = _add_feature(gates, mean * inverse * sign, weight_at, 0, column, columns)
        gates = _add_feature(gates, g * inverse * sign, weight_at, 1, column, columns)
        if SET == _JOINED:
            odd = _clamp(g * largest, 1.0) * sign
            gates = _add_feature(gates, odd, weight_at, 2, column, columns)
            odd = _clamp(mean * largest, 1.0) * sign
            gates = _add_feature(gates, odd, weight_at, 3, column, columns)
            gates = _add_feature(gates, _log(g, smallest, per), weight_at, 4, column, columns)
            gates = _add_feature(gates, _log(mean, smallest, per), weight_at, 5, column, columns)
    if FRAME == _HOLD and SET < _ADAM:
        touched = tl.load(first_at + place, inside, other=0.0)
        touched = tl.where(g != 0, 1.0, touched)
        tl.debug_barrier()
        tl.store(first_at + place, touched, inside)
        scale = touched
    weight_at += INPUTS * columns

    unit = tl.arange(0, U)
    row = tl.arange(0, K)
    read = inside[:, None] & (unit < UNITS)[None, :]
    hidden = tl.zeros((B, U), tl.float32)
    for layer in tl.static_range(LAYERS):
        hidden_at = tl.load(carries_at + 4 * layer).to(tl.pointer_type(CARRY))
        hidden_apart = tl.load(carries_at + 4 * layer + 1)
        cell_at = tl.load(carries_at + 4 * layer + 2).to(tl.pointer_type(CARRY))
        cell_apart = tl.load(carries_at + 4 * layer + 3)
        if layer > 0:
            gates = tl.zeros((B, 4 * U), tl.float32) + tl.load(weight_at + column)[None, :]
            weight_at += columns
            # The layer below's new hidden state: as a product, or unit by unit where too narrow.
            below = tl.load(weight_at + row[:, None] * columns + column[None, :])
            weight_at += K * columns
            if K == U:
                gates = tl.dot(hidden, below, gates, input_precision=PRECISION)
            else:
                for k in tl.static_range(UNITS):
                    one = tl.sum(tl.where((unit == k)[None, :], hidden, 0.0), axis=1)
                    weight = tl.sum(tl.where((row == k)[:, None], below, 0.0), axis=0)
                    gates += one[:, None] * weight[None, :]
        known = inside[:, None] & (row < UNITS)[None, :]
        before = hidden_at + row[None, :] * hidden_apart + place[:, None]
        earlier = tl.load(before, known, other=0.0).to(tl.float32)
        weight = tl.load(weight_at + row[:, None] * columns + column[None, :])
        weight_at += K * columns
        gates = tl.dot(earlier, weight, gates, input_precision=PRECISION)
        cells = cell_at + unit[None, :] * cell_apart + place[:, None]
        hidden, cell = _cell(gates, tl.load(cells, read, other=0.0).to(tl.float32), B, U)
        tl.debug_barrier()  # every thread has read the old hidden state
        tl.store(cells, cell.to(CARRY), read)
        tl.store(hidden_at + unit[None, :] * hidden_apart + place[:, None], hidden.to(CARRY), read)
    head = tl.load(weight_at + unit)
    value = tl.sum(hidden * head[None, :], axis=1) + tl.load(weight_at + U)
    if BOUNDED:
        value = _tanh(value)
    tl.store(delta_at + place, value * factor * scale, inside)


def packed_weights(rule: LSTMRule, weights: Weights) -> Tensor:
    """All numbers of the network, padded with zeros, a layer's bias (4U,), inputs (F or K, 4U) and
    hidden state (K, 4U) after the other, then the head (U,) and its bias; a unit's four gates side
    by side."""
    require_weights(rule, weights)
    units, high, rows = rule.hidden, unit_columns(rule), dot_rows(rule)
    parts = []

    def columns(part: Tensor, height: int) -> Tensor:
        """(4H, I) to (height, 4U)."""
        out = part.new_zeros(height, high, 4)
        gates = part.view(4, units, -1).permute(2, 1, 0)
        out[: part.shape[1], :units] = gates
        return out.reshape(height, 4 * high)

    for layer in range(rule.layers):
        weight = weights[f"lstm{layer}.weight"].detach().float().cpu()
        inputs = rule.feature_set.count if layer == 0 else units
        bias = weights[f"lstm{layer}.bias"].detach().float().cpu()
        parts.append(columns(bias[:, None], 1))
        parts.append(columns(weight[:, :inputs], inputs if layer == 0 else rows))
        parts.append(columns(weight[:, inputs:], rows))
    head = torch.zeros(high + 1, dtype=torch.float32)
    head[:units] = weights["head.weight"][0].detach().float().cpu()
    if rule.bias:
        head[high] = weights["head.bias"].detach().float().cpu()[0]
    return torch.cat([part.reshape(-1) for part in [*parts, head]])


def unit_columns(rule: LSTMRule) -> int:
    """U."""
    return triton.next_power_of_2(rule.hidden)


def dot_rows(rule: LSTMRule) -> int:
    """K, rows of a product."""
    return max(SMALLEST_DOT, unit_columns(rule))


def usual_tile(rule: LSTMRule) -> tuple[int, int]:
    """Coordinates of a program, and its warps: the fastest tried on an H100."""
    return (64, 2) if rule.hidden <= 8 else (32, 4)


class TritonAdvance:
    """One step of a rule for all coordinates; see `stepsmith.kernels.Advance`.

    Args:
        rule: the rule.
        weights: its weights; read now, so make a new one when they change.
        device: a CUDA device, or the CPU under the interpreter.
        precision: of the products: `"ieee"` (float32), `"tf32x3"` (three products on matrix units,
            nearly float32) or `"tf32"`; None takes `ieee` for up to 8 units, where the products
            cost less than the memory, and `tf32x3` above.
        tile: coordinates of a program, a power of two, and its warps; `usual_tile` by default.
    """

    def __init__(
        self,
        rule: LSTMRule,
        weights: Weights,
        device: torch.device,
        precision: str | None = None,
        tile: tuple[int, int] | None = None,
    ):
        self._rule, self._device = rule, device
        self._tile = tile or usual_tile(rule)
        self._set: FeatureSet = rule.feature_set
        self._weights = packed_weights(rule, weights).to(device)
        self._precision = precision or ("ieee" if rule.hidden <= 8 else "tf32x3")
        self._tables: dict[tuple[int, ...], Tensor] = {}
        self._on_gpu = device.type == "cuda"
        self._statistics = ["touched"] if self._set.frame == "hold" else []
        if self._set.has_moments:
            self._statistics = ["exp_avg", "exp_avg_sq"]

    def _carry_table(self, carry: Carry) -> Tensor:
        """Addresses and row strides of every layer's tensors, on the device."""
        tensors = [carry[key] for key in self._rule.carry_keys]
        numbers = tuple(n for t in tensors for n in (t.data_ptr(), t.stride(0)))
        # Kept: a captured CUDA graph reads its table at every replay, and may not copy it anew.
        if numbers not in self._tables:
            self._tables[numbers] = torch.tensor(numbers, dtype=torch.int64).to(self._device)
        return self._tables[numbers]

    def _require(self, grad_CN: Tensor, state: State, carry: Carry) -> None:
        """Check every tensor whose address the kernel is given, as it cannot look for itself."""
        shape, wide = grad_CN.shape, (self._rule.hidden, grad_CN.numel())
        kind = carry["h0"].dtype
        if kind is not torch.bfloat16:
            kind = torch.float32
        if grad_CN.dtype is not torch.float32 or grad_CN.is_cuda != self._on_gpu:
            raise self._misfit("the gradient", grad_CN, tuple(shape), torch.float32)
        for key in self._statistics:
            value = state[key]
            fits = value.shape == shape and value.is_contiguous()
            if not fits or value.dtype is not torch.float32 or value.is_cuda != self._on_gpu:
                raise self._misfit(f"the state's {key!r}", value, tuple(shape), torch.float32)
        steps = state["step"]
        fits = steps.shape == (shape[0], 1) and steps.is_contiguous()
        if not fits or steps.dtype is not torch.float32 or steps.is_cuda != self._on_gpu:
            raise self._misfit("the state's 'step'", steps, (shape[0], 1), torch.float32)
        for key in self._rule.carry_keys:
            value = carry[key]  # its rows may lie apart
            fits = value.shape == wide and (value.stride(1) == 1 or wide[1] == 1)
            if not fits or value.dtype is not kind or value.is_cuda != self._on_gpu:
                raise self._misfit(f"carry {key!r}", value, wide, kind)

    def _misfit(
        self, what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> ValueError:
        return ValueError(
            f"backend 'triton': {what} should be contiguous, {shape}, in {dtype} on "
            f"{self._device.type}, is {tuple(tensor.shape)} with strides {tensor.stride()} in "
            f"{tensor.dtype} on {tensor.device}; give all tensors of one step for as many "
            "coordinates"
        )

    def __call__(self, grad_CN: Tensor, param_CN: Tensor, state: State, carry: Carry) -> Tensor:
        """Advance `state` (float32) and `carry` (float32 or bfloat16); returns the steps (C, N).

        Raises:
            ValueError: a tensor of another dtype, device or shape, or one whose numbers lie apart;
                nothing has changed.
        """
        grad_CN = grad_CN.contiguous()
        delta_CN = torch.empty_like(grad_CN)
        total = grad_CN.numel()
        if total == 0:
            state["step"] += 1
            return delta_CN
        self._require(grad_CN, state, carry)
        state["step"] += 1
        rule, moments = self._rule, self._set.moments
        first = state.get("exp_avg", state.get("touched", delta_CN))
        second = state.get("exp_avg_sq", delta_CN)
        block, warps = self._tile
        kind = tl.bfloat16 if carry["h0"].dtype == torch.bfloat16 else tl.float32
        # Triton launches on the current device, whatever the tensors' own is.
        with torch.cuda.device(self._device) if self._on_gpu else nullcontext():
            _step[(triton.cdiv(total, block),)](
                grad_CN, first, second, state["step"], self._carry_table(carry), self._weights,
                delta_CN, grad_CN.shape[1], total, _log_of(moments.beta1), _log_of(moments.beta2),
                moments.beta2, 1 - moments.beta1, 1 - moments.beta2, moments.eps, 1 / self._set.p,
                math.exp(-self._set.p), math.exp(self._set.p), -rule.step_scale,
                SET=FEATURE_SETS.index(self._set.name), FRAME=FRAMES.index(self._set.frame),
                INPUTS=self._set.count, UNITS=rule.hidden, LAYERS=rule.layers,
                BOUNDED=rule.output == "tanh", CARRY=kind, PRECISION=self._precision,
                B=block, U=unit_columns(rule), K=dot_rows(rule), num_warps=warps,
            )  # fmt: skip
        return delta_CN


def _log_of(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
