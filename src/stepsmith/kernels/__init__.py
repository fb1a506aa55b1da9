"""How a rule's steps are made and replayed: by the reference, or by a fused form that mirrors it.

A backend is an explicit choice, never a side effect of an import:

- `"reference"`: the rule's own functions, for every rule;
- `"chunked"`: the LSTM rules' network by PyTorch operations over chunks that stay in the cache;
- `"native"`: the LSTM rules, features and all, compiled for the CPU by numba, in float32;
- `"triton"`: the same for NVIDIA GPUs, the carry in float32 or bfloat16; replays go to cuDNN;
- `"auto"`: the fastest of these that has a form of the rule for the dtype and device at hand.

Shape letters: C = copies, N = coordinates of one copy, S = sampled coordinates, T = steps, F =
features, K = channels of one carried tensor.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from stepsmith.kernels import lstm, plain
from stepsmith.names import unknown
from stepsmith.rules.base import Carry, Rule, State, Weights
from stepsmith.rules.features import FeatureSet
from stepsmith.rules.lstm import LSTMRule

BACKENDS = ("auto", "reference", "chunked", "native", "triton")

REPLAY_WIDTH = 1024
"""Coordinates replayed at once by PyTorch on a CPU: enough to drown the overhead of single
operations, few enough that the backward pass finds what the forward pass wrote in the cache."""

REPLAY_WIDTH_GPU = 1 << 17
"""The same on a GPU, where it only bounds memory."""


class Advance(Protocol):
    """One step of a rule that couples no coordinates, for all coordinates of some copies."""

    def __call__(self, grad_CN: Tensor, param_CN: Tensor, state: State, carry: Carry) -> Tensor:
        """Move the rule's memory on by one gradient.

        Args:
            grad_CN: (C, N) gradients.
            param_CN: (C, N) parameters; anything of that shape where the rule does not read them.
            state: overwritten: (C, N) statistics, and (C, 1) numbers for `Rule.per_tensor`.
            carry: overwritten: (K, C * N) tensors, coordinates contiguous.

        Returns:
            (C, N) steps, not yet applied.
        """
        ...


_log = logging.getLogger("stepsmith")


@cache
def _say_once(message: str) -> None:
    _log.info(message)


@cache
def _native() -> ModuleType | None:
    """The compiled kernels, or None where numba is missing or unusable."""
    try:
        from stepsmith.kernels import native
    except ImportError as error:
        # Missing, or one that does not fit the installed numpy.
        _log.warning(
            f"numba cannot be used ({str(error).splitlines()[0]}): rules run by PyTorch "
            "operations, two to five times slower on a CPU; pip install numba"
        )
        return None
    return native


@cache
def _triton() -> ModuleType | None:
    """The GPU kernels, or None where Triton is missing."""
    try:
        from stepsmith.kernels import triton_lstm
    except ImportError as error:
        _log.warning(
            f"Triton cannot be used ({str(error).splitlines()[0]}): on a GPU rules run by PyTorch "
            "operations, many times slower; pip install triton"
        )
        return None
    return triton_lstm


def resolve(rule: Rule, backend: str, dtype: torch.dtype, device: torch.device) -> str:
    """The backend that `backend` means for this rule; says once what `auto` picked.

    Args:
        rule: the rule.
        backend: one of `BACKENDS`.
        dtype: of the statistics.
        device: where the coordinates are.

    Raises:
        ValueError: unknown backend, or one that has no form of this rule.
    """
    require_form(rule, backend)
    if backend == "native":
        if not _suits_native(dtype, device):
            raise ValueError(
                f"backend 'native' computes in float32 on a CPU, not in {dtype} on {device}; use "
                "'auto'"
            )
        if _native() is None:
            raise ValueError("backend 'native' needs numba: pip install numba")
    if backend == "triton":
        if dtype != torch.float32:
            raise ValueError(f"backend 'triton' computes in float32, not in {dtype}; use 'auto'")
        triton = _triton()
        if triton is None:
            raise ValueError("backend 'triton' needs Triton: pip install triton")
        if device.type != "cuda" and not triton.INTERPRETED:
            raise ValueError(
                f"backend 'triton' runs on CUDA devices, not on {device}; use 'auto' (or set "
                "TRITON_INTERPRET=1 to run it on the CPU, slowly)"
            )
    if backend != "auto":
        return backend
    picked = available(rule, dtype, device)[0]
    _say_once(f"backend 'auto' runs {type(rule).__name__} by {picked!r}")
    return picked


def available(rule: Rule, dtype: torch.dtype, device: torch.device) -> list[str]:
    """The backends that can run this rule here, the fastest first."""
    if not _has_fused_form(rule):
        return ["reference"]
    if _suits_native(dtype, device) and _native() is not None:
        return ["native", "chunked", "reference"]
    # ROCm's devices are called cuda too; the kernel is untested there.
    nvidia = device.type == "cuda" and torch.version.hip is None
    if dtype == torch.float32 and nvidia and _triton() is not None:
        return ["triton", "chunked", "reference"]
    return ["chunked", "reference"]


def require_carry(rule: Rule, carry_dtype: torch.dtype | None) -> None:
    """Check the dtype a carry is to be kept in.

    Raises:
        ValueError: neither float32 nor bfloat16, or a rule that couples coordinates.
    """
    if carry_dtype is None:
        return
    if carry_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            "carry_dtype must be torch.float32, torch.bfloat16 or None (as the statistics), got "
            f"{carry_dtype!r}"
        )
    if rule.coupling != "none":
        raise ValueError(
            f"carry_dtype is for rules that couple no coordinates; {type(rule).__name__} does"
        )


def init_state(rule: Rule, param_CN: Tensor) -> State:
    """Fresh statistics of C copies, for a rule that couples no coordinates: (C, N) tensors, and (C,
    1) numbers for `Rule.per_tensor`."""
    return {
        key: value.repeat(len(param_CN), 1) if key in rule.per_tensor else value
        for key, value in rule.init_state(param_CN).items()
    }


def _suits_native(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.float32 and device.type == "cpu"


def require_form(rule: Rule, backend: str) -> None:
    """Check what can be checked before dtype and device are known.

    Raises:
        ValueError: unknown backend, or one that has no form of this rule.
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if backend in ("chunked", "native", "triton") and not _has_fused_form(rule):
        raise ValueError(
            f"backend {backend!r} has no form of {type(rule).__name__}; use 'auto' or 'reference'"
        )


def _has_fused_form(rule: Rule) -> bool:
    """Whether this is an LSTM rule whose parts are the ones that the fused forms mirror."""
    return (
        isinstance(rule, LSTMRule)
        and type(rule.feature_set) is FeatureSet
        and all(
            getattr(type(rule), part) is getattr(LSTMRule, part)
            for part in ("features", "network", "step", "init_state", "init_carry")
        )
    )


def advance_function(
    rule: Rule,
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device,
    backend: str = "auto",
    carry_dtype: torch.dtype | None = None,
) -> Advance:
    """The step of a rule that couples no coordinates.

    Args:
        rule: the rule.
        weights: its weights; read now, so make a new function when they change.
        dtype: of the statistics.
        device: where the coordinates are.
        backend: one of `BACKENDS`.
        carry_dtype: of the carry, where it is not the statistics'.

    Raises:
        ValueError: as `resolve`.
    """
    picked = resolve(rule, backend, dtype, device)
    if picked == "triton":
        triton = _triton()
        assert triton is not None
        assert isinstance(rule, LSTMRule)
        return triton.TritonAdvance(rule, weights, device)
    if picked == "native":
        native = _native()
        assert native is not None
        advance = native.NativeAdvance(rule, weights)
    else:
        network = plain.network_step(rule, weights, dtype, device, picked)
        advance = plain.PlainAdvance(rule, network)
    if carry_dtype not in (None, dtype):
        return plain.Widened(advance, dtype)
    return advance


def network_function(
    rule: Rule, weights: Weights, dtype: torch.dtype, device: torch.device, backend: str = "auto"
) -> plain.NetworkStep:
    """The network's step alone, for rules that couple coordinates (the fused forms have none);
    arguments as `advance_function`."""
    picked = resolve(rule, backend, dtype, device)
    return plain.network_step(rule, weights, dtype, device, picked)


def sample_features(
    rule: Rule, grads_TCS: Tensor, params_TCS: Tensor, state: State, backend: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Features of a sequence of gradients of a rule that couples no coordinates.

    Args:
        rule: the rule.
        grads_TCS: (T, C, S) gradients of S sampled coordinates of each copy.
        params_TCS: the parameters; anything of that shape where the rule does not read them.
        state: before the first gradient: (C, S) statistics, and (C, 1) numbers; not written to.
        backend: one of `BACKENDS`.

    Returns:
        (T, F, C * S) features, and (T, C * S) scales as `Rule.features` returns them, or None.

    Raises:
        ValueError: as `resolve`.
    """
    if resolve(rule, backend, grads_TCS.dtype, grads_TCS.device) == "native":
        native = _native()
        assert native is not None
        return native.sample_features(rule, grads_TCS, state)
    return plain.sample_features(rule, grads_TCS, params_TCS, state)


def replay(
    rule: Rule,
    weights: Weights,
    features_TFS: Tensor,
    carry: Carry,
    adjoint_TS: Tensor,
    scale_TS: Tensor | None,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Gradients of sum_ts adjoint * step with respect to the weights, over T steps.

    Args:
        rule: the rule.
        weights: its weights.
        features_TFS: (T, F, S) features, constants.
        carry: (K, S) tensors before the first step, constants; of any floating dtype.
        adjoint_TS: (T, S).
        scale_TS: (T, S) scales as `Rule.features` returned them, or None.
        backend: one of `BACKENDS`.

    Returns:
        gradients by weight name, in the features' dtype.

    Raises:
        ValueError: as `resolve`.
    """
    picked = resolve(rule, backend, features_TFS.dtype, features_TFS.device)
    carry = {key: value.to(features_TFS.dtype) for key, value in carry.items()}
    if picked == "native":
        native = _native()
        assert native is not None
        return native.replay(rule, weights, features_TFS, carry, adjoint_TS, scale_TS)
    device, dtype = features_TFS.device, features_TFS.dtype
    leaves = {
        key: value.detach().to(device=device, dtype=dtype).requires_grad_()
        for key, value in weights.items()
    }
    total = {key: torch.zeros_like(value) for key, value in leaves.items()}
    sampled = adjoint_TS.shape[1]
    width = REPLAY_WIDTH if device.type == "cpu" else REPLAY_WIDTH_GPU
    if rule.coupling == "network":
        width = max(sampled, 1)
    for start in range(0, sampled, width):
        span = slice(start, min(start + width, sampled))
        own = {key: value[:, span] for key, value in carry.items()}
        scales_TS = None if scale_TS is None else scale_TS[:, span]
        with torch.enable_grad():
            outputs_TOS = _sequence(rule, leaves, features_TFS[..., span].contiguous(), own, picked)
            objective = (adjoint_TS[:, span] * _steps(rule, outputs_TOS, scales_TS)).sum()
            gradients = torch.autograd.grad(objective, list(leaves.values()))
        for key, gradient in zip(total, gradients, strict=True):
            total[key] += gradient
    return total


def _sequence(
    rule: Rule, weights: Weights, features_TFS: Tensor, carry: Carry, picked: str
) -> Tensor:
    """The network over T steps, differentiable by the weights: (T, F, S) to (T, O, S)."""
    if picked in ("chunked", "triton"):
        assert isinstance(rule, LSTMRule)
        fused = lstm.sequence if picked == "chunked" else lstm.platform_sequence
        return fused(rule, weights, features_TFS, carry)
    outputs = []
    for features_FS in features_TFS:
        output_OS, carry = rule.network(weights, features_FS, carry)
        outputs.append(output_OS)
    return torch.stack(outputs)


def _steps(rule: Rule, outputs_TOS: Tensor, scale_TS: Tensor | None) -> Tensor:
    """The steps (T, S) that the outputs mean."""
    if rule.coupling != "network":
        # The step is coordinatewise: all T steps at once, as T * S coordinates.
        scale = None if scale_TS is None else scale_TS.reshape(-1)
        flat_O = outputs_TOS.transpose(0, 1).flatten(1)
        return rule.step(flat_O, scale).view(len(outputs_TOS), -1)
    scales = [None] * len(outputs_TOS) if scale_TS is None else scale_TS
    return torch.stack([rule.step(o, s) for o, s in zip(outputs_TOS, scales, strict=True)])
