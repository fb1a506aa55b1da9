"""The compiled kernels against the reference: random shapes, blocks, threads, odd numbers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.kernels.rolls import CPU, Roll, assert_near, drawn, gradients

from stepsmith import kernels
from stepsmith.rules import make_rule
from stepsmith.rules.lstm import LSTMRule
from stepsmith.testing import fresh_weights

pytest.importorskip("numba", reason="numba is not installed")

from stepsmith.kernels.native import team, tiles
from stepsmith.kernels.native.maths import jit, log
from stepsmith.kernels.native.replay import BUFFER, replay_block
from stepsmith.kernels.native.step import BLOCK

RULES = [LSTMRule(1, 1, "raw"), LSTMRule(8, 1), LSTMRule(5, 3, "adam", bias=False),
         make_rule("l2o_dm")]  # fmt: skip


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("frame", ["none", "hold", "momentum"])
@pytest.mark.parametrize("inputs", ["raw", "log_sign", "adam", "joined"])
@pytest.mark.parametrize(("copies", "n"), [(1, 1), (1, 300), (5, 33), (3, 128)])
def test_a_hundred_steps(inputs, frame, copies, n):
    rule = LSTMRule(4, 2, inputs, frame=frame)
    fast, slow = Roll(rule, "native", copies, n), Roll(rule, "reference", copies, n)
    grads = gradients(100, copies, n)
    kept = grads.clone()
    assert_near(*(torch.stack([roll(grad) for grad in grads]) for roll in (fast, slow)))
    assert torch.equal(grads, kept)
    for one, two in ((fast.state, slow.state), (fast.carry, slow.carry)):
        assert one.keys() == two.keys()
        for key in one:
            assert_near(one[key], two[key])


@pytest.mark.parametrize("seed", range(8))
def test_random_rules_and_shapes(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(1, high, (), generator=generator))

    rule = LSTMRule(draw(24), draw(4), ("raw", "log_sign", "adam", "joined")[seed % 4],
                    ("tanh", "linear")[seed % 2], bias=seed % 3 > 0)  # fmt: skip
    copies, n = draw(5), draw(200)
    fast, slow = Roll(rule, "native", copies, n), Roll(rule, "reference", copies, n)
    grads = gradients(100, copies, n)
    assert_near(*(torch.stack([roll(grad) for grad in grads]) for roll in (fast, slow)))


@pytest.mark.parametrize("odd", [0.0, 1e-38, 1e-30, 1e30, -1e38])
@pytest.mark.parametrize("name", ["joined", "l2o_dm", "rnnprop"])
def test_zero_tiny_and_huge_gradients(name, odd):
    rule = make_rule(name)
    fast, slow = Roll(rule, "native", 1, 40), Roll(rule, "reference", 1, 40)
    grads = gradients(20, 1, 40)
    grads[5] = odd
    one, two = (torch.stack([roll(grad) for grad in grads]) for roll in (fast, slow))
    assert one.isfinite().all()
    assert_near(one, two)


def test_a_step_on_a_slice_of_a_longer_carry():
    rule = LSTMRule(3, 2)
    fast, slow = Roll(rule, "native", 1, 33), Roll(rule, "reference", 1, 33)
    _, longer = drawn(rule, 1, 50)
    before = {key: value.clone() for key, value in longer.items()}
    slow.carry = {key: value[:, 7:40].clone() for key, value in longer.items()}
    fast.carry = {key: value[:, 7:40] for key, value in longer.items()}
    (grad,) = gradients(1, 1, 33)
    assert_near(fast(grad), slow(grad))
    for key, value in longer.items():
        assert_near(value[:, 7:40], slow.carry[key])
        assert torch.equal(value[:, :7], before[key][:, :7])
        assert torch.equal(value[:, 40:], before[key][:, 40:])


@pytest.mark.parametrize("openmp", [True, False])
def test_a_step_is_the_same_for_any_number_of_threads(two_threads, openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(team, "_parallel", lambda: None)
    rule = LSTMRule(4, 2)
    shared, alone = Roll(rule, "native", 3, 1000), Roll(rule, "native", 3, 1000)
    for grad in gradients(5, 3, 1000):
        torch.set_num_threads(2)
        step = shared(grad)
        torch.set_num_threads(1)
        assert torch.equal(step, alone(grad))
    assert all(torch.equal(shared.carry[key], alone.carry[key]) for key in alone.carry)


def test_every_thread_takes_part(two_threads):
    import os

    from numba import carray

    from stepsmith.kernels.native.maths import entry, integers, next_piece

    if team._parallel() is None or (os.cpu_count() or 1) < 2:
        pytest.skip("needs torch's OpenMP library and two cores")

    def make(stamp):
        def wait_for_two(raw):
            if stamp:
                counter = carray(raw, (1,), np.int64)
                next_piece(counter.ctypes.data)
                for _ in range(2_000_000_000):
                    if carray(integers(counter.ctypes.data), (1,))[0] >= 2:
                        return

        return wait_for_two

    counter = np.zeros(1, np.int64)
    team.run(entry(make), counter, 2)
    assert counter[0] == 2


def test_the_logarithm():
    @jit
    def logs(x, out):
        for i in range(len(x)):
            out[i] = log(x[i])

    x = np.concatenate([np.logspace(-37, 38, 5001), np.linspace(0.5, 2, 5001)]).astype(np.float32)
    out = np.empty_like(x)
    logs(x, out)
    exact = np.log(x.astype(np.float64))
    assert np.max(np.abs(out - exact) / np.maximum(np.abs(exact), 1e-3)) < 1e-6
    logs(np.full(1, np.nan, np.float32), out)
    assert np.isnan(out[0])


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
    rule = make_rule("l2o_dm")
    numbers = 24 + 40 + 2 * 6 * 20
    lengths = (1, 20, 100, 200, 400)
    widths = [replay_block(rule, steps) for steps in lengths]
    assert widths[0] == BLOCK
    assert sorted(widths, reverse=True) == widths
    for steps, width in zip(lengths, widths, strict=True):
        assert width % tiles.TILE == 0
        assert width == tiles.TILE or 4 * steps * numbers * width <= BUFFER


def test_replay_is_the_same_for_any_number_of_threads(two_threads):
    rule = LSTMRule(4, 1)
    features, carry = drawn(rule, 5, 2000)
    weights, adjoint = fresh_weights(rule), torch.randn(5, 2000)
    shared = kernels.replay(rule, weights, features, carry, adjoint, None, "native")
    torch.set_num_threads(1)
    alone = kernels.replay(rule, weights, features, carry, adjoint, None, "native")
    assert all(torch.equal(shared[key], alone[key]) for key in alone)


@pytest.mark.parametrize("name", ["joined", "l2o_dm", "rnnprop"])
def test_nan_stays_with_its_coordinate(name):
    roll = Roll(make_rule(name), "native", 1, 40)
    (grad,) = gradients(1, 1, 40)
    grad[0, 11] = float("nan")
    step = roll(grad)[0]
    bad = torch.arange(40) == 11
    assert step[bad].isnan().all()
    assert step[~bad].isfinite().all()


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
    step = kernels.advance_function(rule, weights, torch.float32, CPU, "native")
    state = {"step": torch.zeros(1, 1)}
    step(torch.full((1, 4), -1e30), torch.zeros(1, 4), state, carry)
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
        "chunked", "chunked", "backend 'native' needs numba: pip install numba"
    ]  # fmt: skip
    assert done.stderr.count("numba cannot be used") == 1
    assert len(done.stderr.splitlines()) == 1


def test_what_compiled_code_cannot_see_is_refused():
    roll = Roll(make_rule("joined"), "native", 1, 40)
    with pytest.raises(ValueError, match=r"float32 tensors on the CPU, got torch.float64"):
        roll(torch.zeros(1, 40, dtype=torch.float64))
    roll.state["exp_avg"] = roll.state["exp_avg"].to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"got torch.bfloat16"):
        roll(torch.zeros(1, 40))
    roll = Roll(make_rule("joined"), "native", 1, 40)
    roll.carry = {key: value.repeat(1, 2)[:, ::2] for key, value in roll.carry.items()}
    with pytest.raises(ValueError, match="last dimension contiguous"):
        roll(torch.zeros(1, 40))


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("n", [39, 41, 4000])
def test_gradients_of_another_size_than_the_memory_are_refused(copies, n):
    roll = Roll(make_rule("joined"), "native", copies, 40)
    before = {key: value.clone() for key, value in {**roll.state, **roll.carry}.items()}
    with pytest.raises(ValueError, match=r"'exp_avg' should have shape \(\d, \d+\), has"):
        roll(torch.zeros(copies, n))
    assert all(torch.equal(v, before[k]) for k, v in {**roll.state, **roll.carry}.items())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r.state.update(exp_avg_sq=torch.zeros(2, 39)), r"'exp_avg_sq' should have"),
        (lambda r: r.state.update(exp_avg=torch.zeros(80)), r"\(2, 40\), has \(80,\)"),
        (lambda r: r.state.update(exp_avg=torch.zeros(2, 80)[:, :40]), "contiguous, got strides"),
        (lambda r: r.state.update(exp_avg=torch.zeros(40, 2).t()), "contiguous, got strides"),
        (lambda r: r.state.update(step=torch.ones(1, 1)), r"'step' should have shape \(2, 1\)"),
        (lambda r: r.state.update(step=torch.ones(3, 1)), r"'step' should have shape \(2, 1\)"),
        (lambda r: r.state.update(step=torch.ones(2)), r"'step' should have shape \(2, 1\)"),
        (lambda r: r.carry.update(h0=torch.zeros(8, 79)), r"'h0' should have shape \(8, 80\)"),
        (lambda r: r.carry.update(c0=torch.zeros(7, 80)), r"'c0' should have shape \(8, 80\)"),
        (lambda r: r.carry.update(c0=torch.zeros(640)), r"'c0' should have shape \(8, 80\)"),
    ],
)  # fmt: skip
def test_a_memory_of_another_form_is_refused_before_anything_changes(change, match):
    roll = Roll(make_rule("joined"), "native", 2, 40)
    change(roll)
    step = roll.state["step"].clone()
    with pytest.raises(ValueError, match=match):
        roll(torch.zeros(2, 40))
    assert torch.equal(roll.state["step"], step)


def test_rows_of_a_carry_may_lie_apart():
    grads = gradients(3, 1, 40)
    rolls = [Roll(make_rule("joined"), "native", 1, 40) for _ in range(2)]
    wide = {key: torch.zeros(len(value), 100) for key, value in rolls[1].carry.items()}
    rolls[1].carry = {key: value[:, 30:70] for key, value in wide.items()}
    for grad in grads:
        assert torch.equal(*(roll(grad) for roll in rolls))
    assert not wide["h0"][:, :30].any()
    assert not wide["h0"][:, 70:].any()


@pytest.mark.parametrize("name", ["lstm0.weight", "lstm0.bias", "lstm1.weight", "head.weight"])
def test_weights_of_another_rule_are_refused(name):
    rule = LSTMRule(4, 2)
    weights = dict(fresh_weights(rule))
    weights[name] = weights[name][..., :-1]
    features, carry = drawn(rule, 5, 40)
    calls = (
        lambda: kernels.advance_function(rule, weights, torch.float32, CPU, "native"),
        lambda: kernels.replay(rule, weights, features, carry, torch.ones(5, 40), None, "native"),
    )
    for call in calls:
        with pytest.raises(ValueError, match=rf"weights do not fit LSTMRule: '{name}' should have"):
            call()
    del weights[name]
    with pytest.raises(ValueError, match=r"has None; give the weights of this rule"):
        calls[0]()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"features_TFS": torch.zeros(5, 5, 40)}, r"the features should have shape \(5, 6, 40\)"),
        ({"adjoint_TS": torch.zeros(5, 39)}, r"the adjoint should have shape \(5, 40\)"),
        ({"adjoint_TS": torch.zeros(4, 40)}, r"the adjoint should have shape \(5, 40\)"),
        ({"scale_TS": torch.zeros(5, 1)}, r"the scale should have shape \(5, 40\)"),
        ({"carry": {"h0": torch.zeros(8, 40), "c0": torch.zeros(8, 1)}}, "carry 'c0' should have"),
    ],
)
def test_a_replay_of_another_form_is_refused(change, match):
    rule = make_rule("joined")
    features, carry = drawn(rule, 5, 40)
    given = {
        "features_TFS": features, "carry": carry, "adjoint_TS": torch.ones(5, 40),
        "scale_TS": None, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=match):
        kernels.replay(rule, fresh_weights(rule), backend="native", **given)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"exp_avg": torch.zeros(2, 29)}, r"'exp_avg' should have shape \(2, 30\)"),
        ({"step": torch.zeros(1, 1)}, r"'step' should have shape \(2, 1\)"),
    ],
)
def test_features_of_a_state_of_another_form_are_refused(change, match):
    rule, grads = make_rule("joined"), gradients(4, 2, 30)
    state = {**kernels.init_state(rule, torch.zeros(2, 30)), **change}
    with pytest.raises(ValueError, match=match):
        kernels.sample_features(rule, grads, grads, state, "native")


def test_features_of_a_state_whose_rows_lie_apart():
    rule, grads = make_rule("joined"), gradients(4, 2, 30)
    state = kernels.init_state(rule, torch.zeros(2, 30))
    state["exp_avg"] = torch.randn(2, 30)
    apart = {**state, "exp_avg": state["exp_avg"].t().contiguous().t()}
    one, two = (
        kernels.sample_features(rule, grads, grads, own, "native")[0] for own in (state, apart)
    )
    assert torch.equal(one, two)


def test_a_copied_roll_goes_its_own_way():
    import copy

    grads = gradients(3, 2, 50)
    first = Roll(make_rule("joined"), "native", 2, 50)
    first(grads[0])
    second = copy.deepcopy(first)
    assert torch.equal(first(grads[1]), second(grads[1]))
    assert not torch.equal(first(grads[2]), second(-grads[2]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype):
    rule, grads = make_rule("joined"), gradients(4, 2, 30)
    state = kernels.init_state(rule, torch.zeros(2, 30))
    usual = kernels.sample_features(rule, grads, grads, state, "native")
    try:
        torch.set_default_dtype(dtype)
        odd = kernels.sample_features(rule, grads, grads, state, "native")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, two) for one, two in zip(usual, odd, strict=True))


@pytest.mark.parametrize("backend", ["native", "chunked", "reference"])
def test_a_replay_widens_a_narrow_carry(backend):
    rule = make_rule("joined")
    features, carry = drawn(rule, 5, 40)
    narrow = {key: value.to(torch.bfloat16) for key, value in carry.items()}
    wide = {key: value.float() for key, value in narrow.items()}
    one, two = (
        kernels.replay(rule, fresh_weights(rule), features, kept, torch.ones(5, 40), None, backend)
        for kept in (narrow, wide)
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
