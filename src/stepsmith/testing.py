"""The contract suite every rule passes, public for users' own rules.

    from stepsmith.testing import check_rule
    check_rule(MyRule())

Each check raises AssertionError with one line: what was expected, and what came.

Shape letters: N = coordinates, C = copies, F = features, O = outputs, T = steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

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


def _gradients(
    n: int, steps: int = STEPS, seed: int = 1, dtype: torch.dtype = torch.float64
) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randn(n, generator=generator, dtype=dtype)


def _cast(weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.detach().to(dtype) for key, value in weights.items()}


def _step(
    rule: Rule, weights: Weights, grad_N: Tensor, param_N: Tensor, state: State, carry: Carry,
    shape: tuple[int, ...],
) -> tuple[Tensor, State, Carry]:  # fmt: skip
    features, scale, state = rule.features(grad_N, param_N, state, shape)
    output, carry = rule.network(weights, features, carry)
    return rule.step(output, scale), state, carry


def _roll(rule: Rule, weights: Weights, grads: list[Tensor], param_N: Tensor) -> list[Tensor]:
    """The steps a rule makes on recorded gradients of one tensor."""
    state = rule.init_state(param_N)
    carry = rule.init_carry(len(param_N), dtype=param_N.dtype)
    shape = SHAPE if len(param_N) == math.prod(SHAPE) else (len(param_N),)
    deltas = []
    for grad_N in grads:
        delta_N, state, carry = _step(rule, weights, grad_N, param_N, state, carry, shape)
        deltas.append(delta_N)
    return deltas


def _require(truth: bool, rule: Rule, message: str) -> None:
    if not truth:
        raise AssertionError(f"{type(rule).__name__}: {message}")


def check_shapes(rule: Rule, weights: Weights) -> None:
    """Shapes and dtypes of state, carry, features, output and step, in float32 and float64."""
    n = math.prod(SHAPE)
    for dtype in (torch.float32, torch.float64):
        param_N = torch.ones(n, dtype=dtype)
        state, carry = rule.init_state(param_N), rule.init_carry(n, dtype=dtype)
        _require(
            "step" in rule.per_tensor and "step" in state, rule, "state must count its `step`s"
        )
        for key, value in state.items():
            want = () if key in rule.per_tensor else (n,)
            _require(
                value.shape == want, rule, f"state {key!r}: shape {want}, got {tuple(value.shape)}"
            )
        for key, value in carry.items():
            _require(
                value.dim() == 2 and value.shape[1] == n and value.dtype == dtype, rule,
                f"carry {key!r}: (K, {n}) of {dtype}, got {tuple(value.shape)} {value.dtype}",
            )  # fmt: skip
        grad_N = next(_gradients(n, dtype=dtype))
        features, scale, moved = rule.features(grad_N, param_N, state, SHAPE)
        output, carried = rule.network(_cast(weights, dtype), features, carry)
        delta_N = rule.step(output, scale)
        _require(
            features.dim() == 2 and features.shape[1] == n, rule,
            f"features must be (F, {n}), got {tuple(features.shape)}",
        )  # fmt: skip
        _require(
            output.dim() == 2 and output.shape[1] == n, rule,
            f"output must be (O, {n}), got {tuple(output.shape)}",
        )  # fmt: skip
        _require(delta_N.shape == (n,), rule, f"step must be ({n},), got {tuple(delta_N.shape)}")
        _require(delta_N.dtype == dtype, rule, f"step must be {dtype}, got {delta_N.dtype}")
        for name, before, after in (("state", state, moved), ("carry", carry, carried)):
            _require(before.keys() == after.keys(), rule, f"{name} keys changed: {sorted(after)}")
            for key in before:
                _require(
                    before[key].shape == after[key].shape and before[key].dtype == after[key].dtype,
                    rule, f"{name} {key!r} changed its shape or dtype",
                )  # fmt: skip
        _require(float(moved["step"]) == 1, rule, "`step` must be 1 after one step")


def check_pure(rule: Rule, weights: Weights) -> None:
    """Nothing is written to, nothing is random, and the same arguments give the same result."""
    n = math.prod(SHAPE)
    weights = _cast(weights, torch.float64)
    param_N = torch.ones(n, dtype=torch.float64)
    state, carry = rule.init_state(param_N), rule.init_carry(n, dtype=torch.float64)
    results, random = [], torch.random.get_rng_state()
    for grad_N in [next(_gradients(n))] * 2:
        before = [t.clone() for t in (grad_N, param_N, *state.values(), *carry.values())]
        own = {key: value.clone() for key, value in weights.items()}
        delta_N, _, _ = _step(rule, weights, grad_N, param_N, dict(state), dict(carry), SHAPE)
        after = (grad_N, param_N, *state.values(), *carry.values())
        _require(
            all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            and all(torch.equal(own[key], weights[key]) for key in own),
            rule, "an argument was written to; return new tensors",
        )  # fmt: skip
        results.append(delta_N.clone())
    _require(torch.equal(*results), rule, "the same arguments gave different steps")
    _require(
        torch.equal(random, torch.random.get_rng_state()), rule,
        "torch's global random numbers were used; take a Generator",
    )  # fmt: skip


def check_coordinatewise(rule: Rule, weights: Weights) -> None:
    """What the rule declares of its coupling is true, by permuting and stacking coordinates."""
    n = math.prod(SHAPE)
    weights = _cast(weights, torch.float64)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    param_N = torch.linspace(-1, 1, n, dtype=torch.float64)
    if rule.coupling == "none":
        grads = list(_gradients(n))
        whole = _roll(rule, weights, grads, param_N)
        some = order[: n // 2]
        part = _roll(rule, weights, [g[some] for g in grads], param_N[some])
        _require(
            all(torch.allclose(w[some], p, rtol=1e-9) for w, p in zip(whole, part, strict=True)),
            rule, 'coupling is "none" but a step depends on other coordinates; declare it',
        )  # fmt: skip
        _check_stacked(rule, grads, param_N)
    if rule.coupling != "network":
        carry = rule.init_carry(n, dtype=torch.float64)
        features, scale, _ = rule.features(
            next(_gradients(n)), param_N, rule.init_state(param_N), SHAPE
        )
        output, _ = rule.network(weights, features, carry)
        mixed, _ = rule.network(
            weights, features[:, order], {k: v[:, order] for k, v in carry.items()}
        )
        one = rule.step(output, scale)[order]
        two = rule.step(mixed, None if scale is None else scale[order])
        half, _ = rule.network(
            weights, features[:, : n // 2], {k: v[:, : n // 2] for k, v in carry.items()}
        )
        first = rule.step(half, None if scale is None else scale[: n // 2])
        _require(
            torch.allclose(one, two, rtol=1e-9)
            and torch.allclose(first, rule.step(output, scale)[: n // 2], rtol=1e-9),
            rule, 'network and step mix coordinates; declare coupling = "network"',
        )  # fmt: skip


def _check_stacked(rule: Rule, grads: list[Tensor], param_N: Tensor) -> None:
    """Features of C copies at once, per-tensor statistics as (C, 1), equal those of each copy."""
    copies = 3
    params = torch.stack([param_N * (c + 1) for c in range(copies)])
    fresh = rule.init_state(params)
    stacked = {
        key: value.expand(copies, 1) if key in rule.per_tensor else value
        for key, value in fresh.items()
    }
    singles = [rule.init_state(param) for param in params]
    for grad_N in grads:
        grad_CN = torch.stack([grad_N * (c + 1) for c in range(copies)])
        features, scale, stacked = rule.features(grad_CN, params, stacked, SHAPE)
        for c in range(copies):
            want, want_scale, singles[c] = rule.features(grad_CN[c], params[c], singles[c], SHAPE)
            same = torch.allclose(features[:, c], want, rtol=1e-9)
            if scale is not None and want_scale is not None:
                same = same and torch.allclose(scale[c], want_scale, rtol=1e-9)
            _require(
                same, rule, 'coupling is "none", so features must be elementwise: leading '
                "dimensions changed them (per-tensor statistics come as (C, 1))",
            )  # fmt: skip


def check_untouched(rule: Rule, weights: Weights) -> None:
    """A coordinate whose gradient has always been zero does not move (weight decay apart)."""
    n = math.prod(SHAPE)
    grads = [g * (torch.arange(n) % 2) for g in _gradients(n)]
    for t, delta_N in enumerate(
        _roll(rule, _cast(weights, torch.float64), grads, torch.zeros(n, dtype=torch.float64))
    ):
        drift = float(delta_N[::2].abs().max())
        _require(
            drift == 0, rule,
            f"a coordinate whose gradient was always zero moved by {drift:.3g} at step {t}; hold "
            "it still (FeatureSet frames) or pass faithful=True",
        )  # fmt: skip


def check_finite(rule: Rule, weights: Weights) -> None:
    """Zero, tiny (1e-30) and huge (1e30) gradients give finite steps, then and afterwards."""
    weights = _cast(weights, torch.float32)
    for odd in (0.0, 1e-30, -1e-30, 1e30, -1e30):
        if not rule.learned and abs(odd) > 1:
            continue  # the classic optimizers overflow as torch.optim's do
        usual = [g.float() for g in _gradients(8)]
        grads = [*usual[:2], torch.full((8,), odd), *usual[2:]]
        for t, delta_N in enumerate(_roll(rule, weights, grads, torch.ones(8))):
            _require(
                bool(delta_N.isfinite().all()), rule,
                f"step {t} is not finite after a gradient of {odd:g} at step 2; clamp before "
                "squaring, guard logarithms and quotients",
            )  # fmt: skip


def check_differentiable(rule: Rule, weights: Weights) -> None:
    """Every weight gets a finite gradient through network and step."""
    leaves = {key: value.requires_grad_() for key, value in _cast(weights, torch.float64).items()}
    deltas = _roll(rule, leaves, list(_gradients(8)), torch.ones(8, dtype=torch.float64))
    gradients = torch.autograd.grad(
        torch.stack(deltas).square().sum(), list(leaves.values()), allow_unused=True
    )
    for key, gradient in zip(leaves, gradients, strict=True):
        _require(gradient is not None, rule, f"weight {key!r} has no part in the steps")
        assert gradient is not None
        _require(bool(gradient.isfinite().all()), rule, f"the gradient of {key!r} is not finite")
        _require(bool((gradient != 0).any()), rule, f"the gradient of {key!r} is zero")


def check_kernel(rule: Rule, weights: Weights) -> None:
    """The automatic backend agrees with the reference: 1e-5 over 100 float32 steps of one recorded
    sequence of gradients (zero, tiny and huge ones among them), 1e-9 in its gradients."""
    n, device = 33, torch.device("cpu")
    state, features = rule.init_state(torch.ones(n)), []
    for t, grad_N in enumerate(_gradients(n, 100, dtype=torch.float32)):
        odd = {7: 0.0, 8: 1e-30, 9: 1e15}.get(t)
        if odd is not None:
            grad_N = torch.full_like(grad_N, odd)
        feature_FN, _, state = rule.features(grad_N, torch.ones(n), state, (n,))
        features.append(feature_FN)
    carries = [rule.init_carry(n) for _ in range(2)]
    runs = [
        kernels.step_function(rule, weights, torch.float32, device, backend)
        for backend in ("auto", "reference")
    ]
    for t, feature_FN in enumerate(features):
        fast, slow = runs[0](feature_FN, carries[0]), runs[1](feature_FN, carries[1])
        _require(
            torch.allclose(fast, slow, rtol=1e-5, atol=1e-5 * float(slow.abs().max())), rule,
            f"the fused step leaves the reference by {float((fast - slow).abs().max()):.2g} "
            f"at step {t}",
        )  # fmt: skip
    if not rule.learned:
        return
    leaves = {key: value.requires_grad_() for key, value in _cast(weights, torch.float64).items()}
    stacked = torch.stack(features).double()
    carry = rule.init_carry(n, dtype=torch.float64)
    factors = torch.randn(stacked.shape[0], 1, n, generator=torch.Generator().manual_seed(3))
    gradients = []
    for backend in ("auto", "reference"):
        outputs = kernels.sequence(rule, leaves, stacked, carry, backend)
        gradients.append(torch.autograd.grad((outputs * factors).sum(), list(leaves.values())))
    for key, fast, slow in zip(leaves, *gradients, strict=True):
        _require(
            torch.allclose(fast, slow, rtol=1e-9, atol=1e-9 * float(slow.abs().max())), rule,
            f"the fused gradient of {key!r} is not the reference's",
        )  # fmt: skip


def check_round_trip(rule: Rule) -> None:
    """The configuration is JSON-able and rebuilds an equal rule; `@register` a rule of your own."""
    config = json.loads(json.dumps(rule.config()))
    try:
        rebuilt = rule_from_config(type(rule).__name__, config)
    except ValueError as error:
        raise AssertionError(
            f"{type(rule).__name__}: cannot be rebuilt from its configuration ({error}); decorate "
            "its class with @stepsmith.register"
        ) from None
    _require(rebuilt == rule, rule, "rebuilding from its configuration gave another rule")
