"""The GPU kernel against the reference, under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.rolls import Roll, assert_near, gradients

from stepsmith import LearnedOptimizer, kernels, load
from stepsmith.rules import make_rule
from stepsmith.rules.lstm import LSTMRule
from stepsmith.testing import fresh_weights

triton_lstm = pytest.importorskip("stepsmith.kernels.triton_lstm", reason="Triton is missing")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
"""The interpreter computes with numpy, which speaks of what the kernel relies on."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    LSTMRule(8, 1, "joined", frame="momentum"), LSTMRule(20, 2, "log_sign", "linear", frame="hold"),
    LSTMRule(8, 1, "adam", frame="hold", bias=False), LSTMRule(5, 3, "raw", frame="momentum"),
    LSTMRule(3, 2, "joined", frame="none"), LSTMRule(16, 2, "raw", frame="hold"),
]  # fmt: skip


def name(rule: LSTMRule) -> str:
    return f"{rule.hidden}x{rule.layers}-{rule.inputs}-{rule.frame}"


@pytest.mark.parametrize("rule", CASES, ids=name)
@pytest.mark.parametrize(("copies", "n"), [(1, 1), (2, 67)])
def test_a_sequence_of_steps(rule, copies, n):
    fast, slow = (Roll(rule, backend, copies, n, DEVICE) for backend in ("triton", "reference"))
    grads = gradients(20, copies, n).to(DEVICE)
    assert_near(*(torch.stack([roll(grad) for grad in grads]) for roll in (fast, slow)))
    for one, two in ((fast.state, slow.state), (fast.carry, slow.carry)):
        for key in one:
            assert_near(one[key], two[key])


@pytest.mark.slow
@pytest.mark.parametrize("rule", CASES[:3], ids=name)
def test_a_hundred_steps(rule):
    fast, slow = (Roll(rule, backend, 3, 100, DEVICE) for backend in ("triton", "reference"))
    grads = gradients(100, 3, 100).to(DEVICE)
    one, two = (torch.stack([roll(grad) for grad in grads]) for roll in (fast, slow))
    # As a whole: the interpreter rounds a product before it is added, where torch and a GPU do not,
    # and the logarithm of a momentum that cancels to almost nothing magnifies that.
    assert (one - two).norm() < 1e-5 * two.norm()
    assert (one - two).abs().max() < 1e-4 * two.abs().max()


@pytest.mark.parametrize("odd", [0.0, 1e-30, 1e30])
def test_zero_tiny_and_huge_gradients(odd):
    rule = make_rule("joined")
    fast, slow = (Roll(rule, backend, 1, 9, DEVICE) for backend in ("triton", "reference"))
    grads = gradients(8, 1, 9).to(DEVICE)
    grads[3] = odd
    one, two = (torch.stack([roll(grad) for grad in grads]) for roll in (fast, slow))
    assert one.isfinite().all()
    assert_near(one, two)


def test_nan_stays_with_its_coordinate():
    roll = Roll(make_rule("joined"), "triton", 1, 40, DEVICE)
    (grad,) = gradients(1, 1, 40).to(DEVICE)
    grad[0, 11] = float("nan")
    assert (roll(grad)[0].isnan().cpu() == (torch.arange(40) == 11)).all()


def test_a_carry_in_bfloat16_is_the_reference_rounded_at_every_step():
    rule = make_rule("joined")
    fast, slow = (
        Roll(rule, backend, 1, 50, DEVICE, torch.bfloat16) for backend in ("triton", "reference")
    )
    for grad in gradients(5, 1, 50).to(DEVICE):
        one, two = fast(grad), slow(grad)
        assert fast.carry["h0"].dtype == torch.bfloat16
        # A number may round the other way: by one bit of eight.
        torch.testing.assert_close(one, two, rtol=0, atol=0.01 * rule.step_scale)


@pytest.mark.parametrize("inputs", ["adam", "raw"])
def test_a_roll_repeats_itself_to_the_bit(inputs):
    # On a GPU several threads may hold one coordinate: none may read what another has written.
    rule = LSTMRule(8, 1, inputs, frame="hold")
    n = 5000 if DEVICE.type == "cuda" else 70
    one, two = (Roll(rule, "triton", 1, n, DEVICE) for _ in range(2))
    for grad in gradients(4, 1, n).to(DEVICE):
        assert torch.equal(one(grad), two(grad))
    for key, value in one.state.items():
        assert torch.equal(value, two.state[key]), key


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r.state.update(exp_avg=torch.zeros(2, 39)), "'exp_avg' should be contiguous"),
        (lambda r: r.state.update(exp_avg_sq=torch.zeros(9, 2).t()), "'exp_avg_sq' should be"),
        (lambda r: r.state.update(exp_avg=torch.zeros(2, 9).double()), "in torch.float64 on"),
        (lambda r: r.state.update(step=torch.zeros(1, 1)), r"'step' should .*, \(2, 1\)"),
        (lambda r: r.carry.update(h0=torch.zeros(8, 17)), r"carry 'h0' .* is \(8, 17\)"),
        (lambda r: r.carry.update(c0=torch.zeros(7, 18)), r"carry 'c0' .* is \(7, 18\)"),
        (lambda r: r.carry.update(c0=torch.zeros(8, 18).bfloat16()), "carry 'c0' .*bfloat16"),
        (lambda r: r.carry.update(h0=torch.zeros(8, 18).half()), "float32 on .* in torch.float16"),
        (lambda r: r.carry.update(h0=torch.zeros(8, 36)[:, ::2]), r"strides \(36, 2\)"),
    ],
)  # fmt: skip
def test_a_memory_of_another_form_is_refused_before_anything_changes(change, match):
    roll = Roll(make_rule("joined"), "triton", 2, 9, DEVICE)
    change(roll)
    for memory in (roll.state, roll.carry):
        for key, value in memory.items():
            if not value.is_contiguous():
                continue  # a copy would be
            memory[key] = value.to(DEVICE)
    step = roll.state["step"].clone()
    with pytest.raises(ValueError, match=match):
        roll(torch.zeros(2, 9, device=DEVICE))
    assert torch.equal(roll.state["step"], step)


def test_weights_of_another_rule_are_refused():
    rule = make_rule("joined")
    weights = {**fresh_weights(rule), "lstm0.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"'lstm0.bias' should have shape \(32,\), has \(3,\)"):
        kernels.advance_function(rule, weights, torch.float32, DEVICE, "triton")


def test_the_optimizer_runs_on_it():
    results = []
    for backend in ("triton", "reference"):
        model = torch.nn.Linear(3, 2, device=DEVICE)
        torch.nn.init.ones_(model.weight)
        torch.nn.init.zeros_(model.bias)
        optimizer = LearnedOptimizer(model.parameters(), load("mlp-mnist"), backend=backend)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.ones(4, 3, device=DEVICE)).square().mean().backward()
            optimizer.step()
        results.append(model.weight.detach())
    assert_near(*results)


@pytest.mark.parametrize("output", ["tanh", "linear"])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_platforms_lstm_has_the_references_gradients(layers, output):
    from stepsmith.kernels import lstm

    rule = LSTMRule(5, layers, "adam", output)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 2, 11, generator=generator, dtype=torch.float64)
    carry = {
        key: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for key, value in rule.init_carry(11).items()
    }
    leaves = {k: v.double().requires_grad_() for k, v in fresh_weights(rule).items()}
    one = lstm.platform_sequence(rule, leaves, features, carry)
    outputs, moved = [], carry
    for feature in features:
        output, moved = rule.network(leaves, feature, moved)
        outputs.append(output)
    two = torch.stack(outputs)
    torch.testing.assert_close(one, two)
    adjoint = torch.randn(two.shape, generator=generator, dtype=torch.float64)
    gradients_of = [
        torch.autograd.grad((value * adjoint).sum(), list(leaves.values())) for value in (one, two)
    ]
    torch.testing.assert_close(*gradients_of)


def test_where_it_runs():
    rule, cpu = make_rule("joined"), torch.device("cpu")
    assert "triton" not in kernels.available(rule, torch.float32, cpu)
    with pytest.raises(ValueError, match=r"in float32, not in torch.float64"):
        kernels.resolve(rule, "triton", torch.float64, DEVICE)
    with pytest.raises(ValueError, match="no form of Adam"):
        kernels.require_form(make_rule("adam"), "triton")


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(triton_lstm, "INTERPRETED", False)
    with pytest.raises(ValueError, match="runs on CUDA devices, not on cpu"):
        kernels.resolve(make_rule("joined"), "triton", torch.float32, torch.device("cpu"))
