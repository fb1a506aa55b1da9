"""The contract suite every rule passes, public for users' own rules.

    from stepsmith.testing import check_rule
    check_rule(MyRule())

Each check raises AssertionError with one line: who, what was expected, and what came.

Shape letters: N = coordinates, C = copies, F = features, O = outputs, T = steps.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stepsmith import kernels
from stepsmith.rules import Rule, Weights, rule_from_config
from stepsmith.rules.base import Carry, State

SHAPE = (5, 4)
STEPS = 6


def check_rule(rule: Rule, weights: Weights | None = None, *, faithful: bool = False) -> None:
    """Run every check.

    Args:
        rule: the rule.
        weights: its weights; by default freshly drawn, moved off any special value.
        faithful: the rule reproduces a published weakness: a coordinate whose gradient has always
            been zero may move.

    Raises:
        AssertionError: a check failed.
    """
    weights = fresh_weights(rule) if weights is None else weights
    check_shapes(rule, weights)
    check_pure(rule, weights)
    check_coordinatewise(rule, weights)
    check_finite(rule, weights)
    if not faithful:
        check_untouched(rule, weights)
    if rule.learned:
        check_differentiable(rule, weights)
    check_kernel(rule, weights)
    check_round_trip(rule)


def fresh_weights(rule: Rule, seed: int = 0) -> dict[str, Tensor]:
    """Drawn weights with a little noise, so that none is zero by design."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value + 0.05 * torch.randn(value.shape, generator=generator)
        for key, value in rule.init(generator).items()
    }


def check_shapes(rule: Rule, weights: Weights) -> None:
    """Shapes and dtypes of state, carry, features, output and step, in float32 and float64, for a
    matrix, a vector of one number and a 0-d tensor."""
    for shape in (SHAPE, (1,), ()):
        for dtype in (torch.float32, torch.float64):
            _check_shapes(rule, _cast(weights, dtype), shape, dtype)


def _check_shapes(rule: Rule, weights: Weights, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n = math.prod(shape)
    where = f"(tensor of shape {shape}, {dtype})"
    param_N = torch.ones(n, dtype=dtype)
    state, carry = rule.init_state(param_N), rule.init_carry(n, dtype=dtype)
    _require("step" in rule.per_tensor and "step" in state, rule, "state must count its `step`s")
    for key, value in state.items():
        want = () if key in rule.per_tensor else (n,)
        _require(
            value.shape == want, rule,
            f"state {key!r} must have shape {want}, got {tuple(value.shape)} {where}",
        )  # fmt: skip
    for key, value in carry.items():
        _require(
            value.dim() == 2 and value.shape[1] == n and value.dtype == dtype, rule,
            f"carry {key!r} must be (K, {n}), got {tuple(value.shape)} {value.dtype} {where}",
        )  # fmt: skip
        _require(
            torch.equal(value, value[:, :1].expand_as(value)), rule,
            f"carry {key!r} must begin the same for every coordinate",
        )  # fmt: skip
    for key, value in rule.init_carry(n, device="meta").items():
        _require(value.is_meta, rule, f"carry {key!r} must be made on the device asked for")
    features, scale, moved = rule.features(torch.ones(n, dtype=dtype), param_N, state, shape)
    output, carried = rule.network(weights, features, carry)
    delta_N = rule.step(output, scale)
    for name, value in (("features", features), ("output", output)):
        _require(
            value.dim() == 2 and value.shape[1] == n and value.dtype == dtype, rule,
            f"{name} must be (channels, {n}), got {tuple(value.shape)} {value.dtype} {where}",
        )  # fmt: skip
    for name, value in (("scale", scale), ("step", delta_N)):
        _require(
            value is None or (value.shape == (n,) and value.dtype == dtype), rule,
            f"{name} must be ({n},), got {value is not None and tuple(value.shape)} {where}",
        )  # fmt: skip
    for name, before, after in (("state", state, moved), ("carry", carry, carried)):
        _require(before.keys() == after.keys(), rule, f"{name} keys changed: {sorted(after)}")
        for key, value in before.items():
            new = after[key]
            _require(
                value.shape == new.shape and value.dtype == new.dtype, rule,
                f"{name} {key!r} changed from {tuple(value.shape)} {value.dtype} to "
                f"{tuple(new.shape)} {new.dtype} {where}",
            )  # fmt: skip
    _require(float(moved["step"]) == 1, rule, "`step` must be 1 after one step")


def check_pure(rule: Rule, weights: Weights) -> None:
    """No part writes to an argument or uses global random numbers, and the same arguments give the
    same result."""
    n = math.prod(SHAPE)
    random = torch.random.get_rng_state()
    param_N = torch.ones(n, dtype=torch.float64)
    features, scale, _ = _twice(
        rule, "features", next(_gradients(n)), param_N, rule.init_state(param_N), SHAPE
    )
    carry = _carry(rule, n)
    output, _ = _twice(rule, "network", _cast(weights, torch.float64), features, carry)
    _twice(rule, "step", output, scale)
    _require(
        torch.equal(random, torch.random.get_rng_state()), rule,
        "torch's global random numbers were used; take a Generator",
    )  # fmt: skip


def _twice(rule: Rule, part: str, *arguments: Any) -> Any:
    before = copy.deepcopy(arguments)
    results = []
    for _ in range(2):
        results.append(copy.deepcopy(getattr(rule, part)(*arguments)))
        _require(
            _same(before, arguments), rule,
            f"{part}: an argument was written to; return new tensors",
        )  # fmt: skip
    _require(_same(*results), rule, f"{part}: the same arguments gave different results")
    return results[0]


def check_coordinatewise(rule: Rule, weights: Weights) -> None:
    """What the rule declares of its coupling is true, by permuting and stacking coordinates."""
    n = math.prod(SHAPE)
    weights = _cast(weights, torch.float64)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    some = order[: n // 2]
    param_N = torch.linspace(-1, 1, n, dtype=torch.float64)
    grads = list(_gradients(n))
    if rule.coupling == "none":
        whole = _roll(rule, weights, grads, param_N)
        part = _roll(rule, weights, [g[some] for g in grads], param_N[some])
        _require(
            all(torch.allclose(w[some], p, rtol=1e-9) for w, p in zip(whole, part, strict=True)),
            rule, 'coupling is "none" but a step depends on other coordinates; declare it',
        )  # fmt: skip
    _check_stacked(rule, grads, param_N)
    if rule.coupling == "network":
        return
    carry = _carry(rule, n)
    features, scale, _ = rule.features(grads[0], param_N, rule.init_state(param_N), SHAPE)
    output, carried = rule.network(weights, features, carry)
    delta_N = rule.step(output, scale)
    for chosen in (order, some):
        own = {key: value[:, chosen] for key, value in carry.items()}
        output, own = rule.network(weights, features[:, chosen], own)
        alone = rule.step(output, None if scale is None else scale[chosen])
        _require(
            torch.allclose(delta_N[chosen], alone, rtol=1e-9)
            and all(torch.allclose(carried[k][:, chosen], own[k], rtol=1e-9) for k in carried),
            rule, 'network and step mix coordinates; declare coupling = "network"',
        )  # fmt: skip


def _check_stacked(rule: Rule, grads: list[Tensor], param_N: Tensor) -> None:
    """Features of C copies at once equal those of each copy: under vmap, and, where nothing is
    coupled, by leading dimensions, per-tensor statistics as (C, 1)."""
    copies = 3
    factors = torch.arange(1.0, copies + 1, dtype=param_N.dtype)[:, None]
    params = factors * param_N
    singles = [rule.init_state(param) for param in params]
    mapped = {key: torch.stack([one[key] for one in singles]) for key in singles[0]}
    stacked = {k: v[:, None] if k in rule.per_tensor else v for k, v in mapped.items()}

    def features(grad_N: Tensor, param_N: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        features_FN, scale, state = rule.features(grad_N, param_N, state, SHAPE)
        return features_FN, features_FN[0] if scale is None else scale, state

    for grad_N in grads:
        grad_CN = factors * grad_N
        results = [features(g, p, s) for g, p, s in zip(grad_CN, params, singles, strict=True)]
        singles = [state for *_, state in results]
        want = [torch.stack(parts) for parts in zip(*(r[:2] for r in results), strict=True)]
        try:
            have, scale, mapped = torch.func.vmap(features)(grad_CN, params, mapped)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise AssertionError(
                f"{type(rule).__name__}: features must run under torch.func.vmap ({reason})"
            ) from None
        _require(
            torch.allclose(have, want[0], rtol=1e-9) and torch.allclose(scale, want[1], rtol=1e-9),
            rule, "features under torch.func.vmap are not those of each tensor alone",
        )  # fmt: skip
        if rule.coupling == "none":
            have, scale, stacked = features(grad_CN, params, stacked)
            _require(
                torch.allclose(have.transpose(0, 1), want[0], rtol=1e-9)
                and torch.allclose(scale, want[1], rtol=1e-9),
                rule, 'coupling is "none", so features must be elementwise: leading dimensions '
                "changed them (per-tensor statistics come as (C, 1))",
            )  # fmt: skip


def check_untouched(rule: Rule, weights: Weights) -> None:
    """A coordinate whose gradient has always been zero does not move (weight decay apart)."""
    n = math.prod(SHAPE)
    grads = [g * (torch.arange(n) % 2) for g in _gradients(n)]
    zeros = torch.zeros(n, dtype=torch.float64)
    for t, delta_N in enumerate(_roll(rule, _cast(weights, torch.float64), grads, zeros)):
        drift = float(delta_N[::2].abs().max())
        _require(
            drift == 0, rule,
            f"a coordinate whose gradient was always zero moved by {drift:.3g} at step {t}; hold "
            "it still (FeatureSet frames) or pass faithful=True",
        )  # fmt: skip


def check_finite(rule: Rule, weights: Weights) -> None:
    """Zero, tiny (1e-30) and huge (1e30) gradients give finite steps, and neither poison the
    statistics: afterwards the steps are finite still, and not stuck at zero."""
    weights = _cast(weights, torch.float32)
    for odd in (0.0, 1e-30, -1e-30, 1e30, -1e30):
        if not rule.learned and abs(odd) > 1:
            continue  # the classic optimizers overflow as torch.optim's do
        usual = [g.float() for g in _gradients(8)]
        grads = [*usual[:2], torch.full((8,), odd), *usual[2:]]
        deltas = _roll(rule, weights, grads, torch.ones(8))
        for t, delta_N in enumerate(deltas):
            _require(
                bool(delta_N.isfinite().all()), rule,
                f"step {t} is not finite after a gradient of {odd:g} at step 2; clamp before "
                "squaring, guard logarithms and quotients",
            )  # fmt: skip
        _require(
            bool(deltas[-1].any()), rule,
            f"steps stay zero after a gradient of {odd:g}; clamp before squaring",
        )  # fmt: skip
        state = rule.init_state(torch.ones(8))
        for grad_N in grads:
            _, _, state = rule.features(grad_N, torch.ones(8), state, (8,))
        for key, value in state.items():
            _require(
                bool(value.isfinite().all()), rule,
                f"state {key!r} is not finite after a gradient of {odd:g}; clamp before squaring",
            )  # fmt: skip


def check_differentiable(rule: Rule, weights: Weights) -> None:
    """Every weight gets a finite gradient through network and step."""
    leaves = {key: value.requires_grad_() for key, value in _cast(weights, torch.float64).items()}
    deltas = _roll(rule, leaves, list(_gradients(8)), torch.ones(8, dtype=torch.float64))
    total = torch.stack(deltas).square().sum()
    _require(total.requires_grad, rule, "no weight has a part in the steps")
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for key, gradient in zip(leaves, gradients, strict=True):
        _require(gradient is not None, rule, f"weight {key!r} has no part in the steps")
        _require(bool(gradient.isfinite().all()), rule, f"the gradient of {key!r} is not finite")
        _require(bool(gradient.any()), rule, f"the gradient of {key!r} is zero")


def check_kernel(rule: Rule, weights: Weights) -> None:
    """Every backend that runs the rule agrees with the reference: 1e-5 over 100 float32 steps of
    one recorded sequence of gradients (zero, tiny and huge ones among them), 1e-10 in gradients in
    float64, 1e-3 in float32. Fresh memory is poisoned, so that nothing is read before it is
    written."""
    copies, n, device = 3, 33, torch.device("cpu")
    grads = []
    for t, grad in enumerate(_gradients(copies * n, 100, dtype=torch.float32)):
        odd = {7: 0.0, 8: 1e-30, 9: 1e30 if rule.learned else 1e15}.get(t)
        grads.append(torch.full((copies, n), odd) if odd is not None else grad.view(copies, n))
    with poisoned_memory():
        if rule.coupling == "none":
            for backend in kernels.available(rule, torch.float32, device):
                _check_steps(rule, weights, grads, backend)
                _check_features(rule, grads, backend)
        if not rule.learned:
            return
        features, scales = _features(rule, [grad[0] for grad in grads])
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
            for backend in kernels.available(rule, dtype, device):
                _check_replay(rule, weights, features, scales, backend, dtype, tolerance)


def _features(rule: Rule, grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Features and scales of a sequence of (N,) gradients."""
    param_N = torch.ones_like(grads[0])
    state, features, scales = rule.init_state(param_N), [], []
    for grad_N in grads:
        feature_FN, scale_N, state = rule.features(grad_N, param_N, state, tuple(param_N.shape))
        features.append(feature_FN)
        if scale_N is not None:
            scales.append(scale_N)
    return features, scales


def _aged_state(rule: Rule, param_CN: Tensor) -> State:
    """A fresh state of copies that have made 0, 1, 2, ... steps."""
    state = kernels.init_state(rule, param_CN)
    state["step"] += torch.arange(float(len(param_CN)))[:, None]
    return state


def _check_steps(rule: Rule, weights: Weights, grads: list[Tensor], backend: str) -> None:
    param_CN, device = torch.ones_like(grads[0]), torch.device("cpu")
    states = [_aged_state(rule, param_CN) for _ in range(2)]
    carries = [rule.init_carry(param_CN.numel()) for _ in range(2)]
    fused, plain = (
        kernels.advance_function(rule, weights, torch.float32, device, name)
        for name in (backend, "reference")
    )
    for t, grad_CN in enumerate(grads):
        kept = grad_CN.clone()
        one = fused(grad_CN, param_CN, states[0], carries[0])
        two = plain(grad_CN, param_CN, states[1], carries[1])
        _require(_same(kept, grad_CN), rule, f"backend {backend!r} writes to the gradient")
        pairs = {"step": (one, two)}
        pairs |= {f"state {key!r}": (states[0][key], states[1][key]) for key in states[0]}
        pairs |= {f"carry {key!r}": (carries[0][key], carries[1][key]) for key in carries[0]}
        for name, (fast, slow) in pairs.items():
            _require(
                _close(fast, slow, 1e-5), rule,
                f"backend {backend!r}: the {name} leaves the reference by "
                f"{float((fast - slow).abs().max()):.2g} at step {t}",
            )  # fmt: skip


def _check_features(rule: Rule, grads: list[Tensor], backend: str) -> None:
    """A sample's features are those of the roll, each copy at its own age."""
    param_CN = torch.ones_like(grads[0])
    state = _aged_state(rule, param_CN)
    before = {key: value.clone() for key, value in state.items()}
    stacked = torch.stack(grads)
    features, scale = kernels.sample_features(
        rule, stacked, torch.ones_like(stacked), state, backend
    )
    _require(_same(before, state), rule, f"backend {backend!r} writes to the sample's state")
    for t, grad_CN in enumerate(grads):
        feature_FCN, scale_CN, state = rule.features(
            grad_CN, param_CN, state, tuple(param_CN.shape[1:])
        )
        same = _close(features[t], feature_FCN.flatten(1), 1e-5)
        _require(same, rule, f"backend {backend!r}: features leave the rule's at step {t}")
        _require((scale is None) == (scale_CN is None), rule, f"backend {backend!r}: scales appear")
        if scale is not None and scale_CN is not None:
            same = _close(scale[t], scale_CN.reshape(-1), 1e-5)
            _require(same, rule, f"backend {backend!r}: scales leave the rule's at step {t}")


def _check_replay(
    rule: Rule, weights: Weights, features: list[Tensor], scales: list[Tensor], backend: str,
    dtype: torch.dtype, tolerance: float,
) -> None:  # fmt: skip
    steps, n = len(features), features[0].shape[1]
    fast, slow = (
        kernels.replay(
            rule,
            _cast(weights, kind),
            torch.stack(features).to(kind),
            {key: value.to(kind) for key, value in _carry(rule, n).items()},
            torch.stack(list(_gradients(n, steps))).to(kind),
            torch.stack(scales).to(kind) if scales else None,
            name,
        )
        for name, kind in ((backend, dtype), ("reference", torch.float64))
    )
    for key, expected in slow.items():
        _require(
            _close(fast[key].double(), expected, tolerance), rule,
            f"backend {backend!r}: the gradient of {key!r} in {dtype} is not the reference's",
        )  # fmt: skip


def check_round_trip(rule: Rule) -> None:
    """The configuration is JSON-able and rebuilds an equal rule; `@register` a rule of your own."""
    try:
        rebuilt = rule_from_config(type(rule).__name__, json.loads(json.dumps(rule.config())))
    except (TypeError, ValueError) as error:
        raise AssertionError(
            f"{type(rule).__name__}: cannot be rebuilt from its configuration ({error}); decorate "
            "its class with @stepsmith.register, and keep fields to numbers, strings and lists"
        ) from None
    _require(rebuilt == rule, rule, "rebuilding from its configuration gave another rule")


def _require(truth: bool, rule: Rule, message: str) -> None:
    if not truth:
        raise AssertionError(f"{type(rule).__name__}: {message}")


def _gradients(
    n: int, steps: int = STEPS, seed: int = 1, dtype: torch.dtype = torch.float64
) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randn(n, generator=generator, dtype=dtype)


def _cast(weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.detach().to(dtype) for key, value in weights.items()}


def _carry(rule: Rule, n: int) -> Carry:
    """A carry as after some steps: nothing is zero, so that nothing hides."""
    generator = torch.Generator().manual_seed(4)
    carry = rule.init_carry(n, dtype=torch.float64)
    return {k: torch.rand(v.shape, generator=generator, dtype=v.dtype) for k, v in carry.items()}


def _roll(rule: Rule, weights: Weights, grads: list[Tensor], param_N: Tensor) -> list[Tensor]:
    """The steps a rule makes on recorded gradients of one tensor."""
    state = rule.init_state(param_N)
    carry = rule.init_carry(len(param_N), dtype=param_N.dtype)
    shape = SHAPE if len(param_N) == math.prod(SHAPE) else (len(param_N),)
    deltas = []
    for grad_N in grads:
        features, scale, state = rule.features(grad_N, param_N, state, shape)
        output, carry = rule.network(weights, features, carry)
        deltas.append(rule.step(output, scale))
    return deltas


def _same(one: Any, two: Any) -> bool:
    """Bitwise equality of tensors in tuples and dictionaries."""
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, tuple):
        return all(_same(a, b) for a, b in zip(one, two, strict=True))
    return one == two


def _close(one: Tensor, two: Tensor, tolerance: float) -> bool:
    """Relative to the largest number, since a sum's rounding is."""
    scale = float(two.abs().max())
    return torch.allclose(one, two, rtol=tolerance, atol=tolerance * scale)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin give nan, as they do by default in deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
