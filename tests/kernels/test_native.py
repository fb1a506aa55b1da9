"""The compiled kernels against the reference: random shapes, blocks, threads, odd numbers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from stepsmith import kernels
from stepsmith.rules import make_rule
from stepsmith.rules.lstm import LSTMRule
from stepsmith.testing import fresh_weights

native = pytest.importorskip("stepsmith.kernels.native", reason="numba is not installed")

CPU = torch.device("cpu")
RULES = [LSTMRule(1, 1, "raw"), LSTMRule(8, 1), LSTMRule(5, 3, "adam", bias=False),
         make_rule("l2o_dm")]  # fmt: skip


def drawn(rule: LSTMRule, steps: int, n: int):
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(steps, rule.feature_set.count, n, generator=generator)
    carry = {
        key: torch.randn(value.shape, generator=generator)
        for key, value in rule.init_carry(n).items()
    }
    return features, carry


def both(rule: LSTMRule, weights) -> list[kernels.StepFunction]:
    return [
        kernels.step_function(rule, weights, torch.float32, CPU, backend)
        for backend in ("native", "reference")
    ]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 128, 129, 300])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.hidden}x{r.layers}")
def test_step(rule, n):
    features, carry = drawn(rule, 4, n)
    other = {k: v.clone() for k, v in carry.items()}
    fast, slow = both(rule, fresh_weights(rule))
    for feature_FN in features:
        kept = feature_FN.clone()
        torch.testing.assert_close(
            fast(feature_FN, carry), slow(feature_FN, other), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(carry, other, rtol=1e-5, atol=1e-6)
        assert torch.equal(feature_FN, kept)


def test_step_on_a_slice_of_a_longer_carry():
    rule = LSTMRule(3, 2)
    features, carry = drawn(rule, 1, 50)
    before = {k: v.clone() for k, v in carry.items()}
    fast, slow = both(rule, fresh_weights(rule))
    span = slice(7, 40)
    other = {k: v[:, span].clone() for k, v in carry.items()}
    part = features[0][:, span]
    torch.testing.assert_close(
        fast(part, {k: v[:, span] for k, v in carry.items()}), slow(part, other)
    )
    for key, value in carry.items():
        torch.testing.assert_close(value[:, span], other[key])
        assert torch.equal(value[:, :7], before[key][:, :7])
        assert torch.equal(value[:, 40:], before[key][:, 40:])


def test_step_is_the_same_for_any_number_of_threads(two_threads, monkeypatch):
    monkeypatch.setattr(native, "PARALLEL", 1)
    rule = LSTMRule(4, 2)
    features, carry = drawn(rule, 1, 1000)
    step = both(rule, fresh_weights(rule))[0]
    one, two = ({k: v.clone() for k, v in carry.items()} for _ in range(2))
    shared = step(features[0], one)
    torch.set_num_threads(1)
    assert torch.equal(shared, step(features[0], two))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("output", ["tanh", "linear"])
@pytest.mark.parametrize("n", [1, 33, 300])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.hidden}x{r.layers}")
def test_replay(rule, n, output):
    rule = replace(rule, output=output)
    features, carry = drawn(rule, 6, n)
    weights = fresh_weights(rule)
    adjoint, scale = torch.randn(2, 6, n)
    for scales in (None, scale):
        fast = kernels.replay(rule, weights, features, carry, adjoint, scales, "native")
        slow = kernels.replay(
            rule, weights, features.double(), {k: v.double() for k, v in carry.items()},
            adjoint.double(), None if scales is None else scales.double(), "reference",
        )  # fmt: skip
        assert fast.keys() == slow.keys()
        for key, expected in slow.items():
            assert fast[key].shape == expected.shape
            error = (fast[key] - expected).abs().max()
            assert float(error) < 2e-5 * float(expected.abs().max()) + 1e-6, key


@pytest.mark.parametrize("steps", [1, 400])
def test_replay_of_windows_short_and_long(steps):
    rule = LSTMRule(6, 2)
    features, carry = drawn(rule, steps, 40)
    weights, adjoint = fresh_weights(rule), torch.randn(steps, 40)
    fast, slow = (
        kernels.replay(rule, weights, features, carry, adjoint, None, backend)
        for backend in ("native", "reference")
    )
    for key, expected in slow.items():
        assert float((fast[key] - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_a_replay_keeps_to_its_buffer():
    padded = (28, 40)
    numbers = sum(rows + 6 * 20 for rows in padded)
    widths = [native._replay_block(steps, 20, padded) for steps in (1, 20, 100, 200, 400)]
    assert widths[0] == native.BLOCK
    assert sorted(widths, reverse=True) == widths
    for steps, width in zip((1, 20, 100, 200, 400), widths, strict=True):
        assert width % native.TILE == 0
        assert width == native.TILE or 4 * steps * numbers * width <= native.REPLAY_BUFFER


def test_replay_is_the_same_for_any_number_of_threads(two_threads):
    rule = LSTMRule(4, 1)
    features, carry = drawn(rule, 5, 2000)
    weights, adjoint = fresh_weights(rule), torch.randn(5, 2000)
    shared = kernels.replay(rule, weights, features, carry, adjoint, None, "native")
    torch.set_num_threads(1)
    alone = kernels.replay(rule, weights, features, carry, adjoint, None, "native")
    assert all(torch.equal(shared[key], alone[key]) for key in alone)


def test_nan_stays_with_its_coordinate():
    rule = LSTMRule(3, 2)
    features, carry = drawn(rule, 1, 40)
    features[0][:, 11] = float("nan")
    output = both(rule, fresh_weights(rule))[0](features[0], carry)[0]
    bad = torch.arange(40) == 11
    assert output[bad].isnan().all()
    assert output[~bad].isfinite().all()
    assert carry["c1"][:, bad].isnan().all()


def test_nan_of_an_earlier_replay_is_forgotten():
    rule = LSTMRule(3, 1)
    features, carry = drawn(rule, 4, 40)
    weights, adjoint = fresh_weights(rule), torch.randn(4, 40)

    def replay(count: int, poison: float):
        return kernels.replay(
            rule, weights, features[..., :count] + poison,
            {k: v[:, :count] for k, v in carry.items()}, adjoint[:, :count], None, "native",
        )  # fmt: skip

    before = replay(5, 0.0)
    assert replay(40, float("nan"))["lstm0.weight"].isnan().any()
    after = replay(5, 0.0)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_saturated_gates_are_exact_and_have_no_gradient():
    rule = LSTMRule(2, 1, "raw", frame="none")
    weights = {k: torch.ones_like(v) for k, v in fresh_weights(rule).items()}
    features, carry = torch.full((1, 1, 4), 1e30), rule.init_carry(4)
    gradients = kernels.replay(rule, weights, features, carry, torch.ones(1, 4), None, "native")
    assert not gradients["lstm0.weight"].any()
    step = both(rule, weights)[0]
    step(-features[0], carry)
    assert not carry["h0"].any()


def test_named_backends():
    rule = make_rule("joined")
    assert kernels.resolve(rule, "auto", torch.float32, CPU) == "native"
    assert kernels.resolve(rule, "auto", torch.float64, CPU) == "chunked"
    with pytest.raises(ValueError, match="computes in float32 on a CPU, not in"):
        kernels.resolve(rule, "native", torch.float64, CPU)


def test_without_numba_one_line_says_so_and_everything_runs():
    program = """
import sys, torch
sys.modules["numba"] = None
import stepsmith
from stepsmith import kernels
rule, cpu = stepsmith.make_rule("joined"), torch.device("cpu")
for _ in range(2):
    print(kernels.resolve(rule, "auto", torch.float32, cpu))
parameter = torch.nn.Parameter(torch.ones(3))
optimizer = stepsmith.LearnedOptimizer([parameter], "mlp-mnist")
parameter.sum().backward()
optimizer.step()
try:
    kernels.resolve(rule, "native", torch.float32, cpu)
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "chunked", "chunked", "backend 'native' needs numba: pip install 'stepsmith[fast]'"
    ]  # fmt: skip
    assert done.stderr.count("numba is not installed") == 1
    assert len(done.stderr.splitlines()) == 1
