"""Features by their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from stepsmith.rules import LSTMRule, make_rule, rule_from_config
from stepsmith.rules.features import FeatureSet, Moments, log_sign
from stepsmith.testing import fresh_weights


@pytest.mark.parametrize("p", [1.0, 10.0])
@pytest.mark.parametrize("g", [0.0, 1e-30, -3e-5, 1.0, -1e4, math.exp(-10)])
def test_log_sign_follows_the_paper(g, p):
    large = abs(g) >= math.exp(-p)
    want = (math.log(abs(g)) / p, math.copysign(1, g)) if large else (-1.0, math.exp(p) * g)
    got = log_sign(torch.tensor([g], dtype=torch.float64), p)
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, torch.tensor([two], dtype=torch.float64))


def test_log_sign_needs_a_positive_cutoff():
    with pytest.raises(ValueError, match="p must be > 0"):
        log_sign(torch.ones(1), 0.0)


def test_moments_are_adams_bias_corrected():
    moments = Moments(0.9, 0.99)
    state = moments.init(torch.zeros(3, dtype=torch.float64))
    grads = torch.randn(7, 3, dtype=torch.float64)
    mean = square = torch.zeros(3, dtype=torch.float64)
    for t, grad in enumerate(grads, 1):
        mean, square = 0.9 * mean + 0.1 * grad, 0.99 * square + 0.01 * grad**2
        root = (square / (1 - 0.99**t)).sqrt() + 1e-8
        have_mean, m, g, state = moments.update(grad, state)
        torch.testing.assert_close(have_mean, mean / (1 - 0.9**t))
        torch.testing.assert_close(m, mean / (1 - 0.9**t) / root)
        torch.testing.assert_close(g, grad / root)


def deltas(rule: LSTMRule, grads: torch.Tensor) -> torch.Tensor:
    weights = {k: v.double() for k, v in fresh_weights(rule).items()}
    n = grads.shape[1]
    zeros = torch.zeros(n, dtype=torch.float64)
    state, carry, steps = rule.init_state(zeros), rule.init_carry(n, dtype=torch.float64), []
    for grad in grads:
        features, scale, state = rule.features(grad, zeros, state, (n,))
        output, carry = rule.network(weights, features, carry)
        steps.append(rule.step(output, scale))
    return torch.stack(steps)


@pytest.mark.parametrize("inputs", ["raw", "log_sign", "adam", "joined"])
def test_the_momentum_frame_is_odd(inputs):
    rule = LSTMRule(3, 1, inputs, "tanh", 0.1, "momentum")
    grads = torch.randn(9, 6, dtype=torch.float64)
    torch.testing.assert_close(deltas(rule, -grads), -deltas(rule, grads), rtol=1e-12, atol=0)


@pytest.mark.parametrize("inputs", ["raw", "log_sign", "adam", "joined"])
def test_hold_releases_a_coordinate_at_its_first_gradient(inputs):
    rule = LSTMRule(3, 1, inputs, "tanh", 0.1, "hold")
    grads = torch.zeros(6, 1, dtype=torch.float64)
    grads[3] = 0.5
    moved = deltas(rule, grads)[:, 0] != 0
    assert moved.tolist() == [False, False, False, True, True, True]


def test_published_rules_have_their_published_sizes():
    dm = make_rule("l2o_dm").init()
    assert {k: tuple(v.shape) for k, v in dm.items()} == {
        "lstm0.weight": (80, 22), "lstm0.bias": (80,), "lstm1.weight": (80, 40),
        "lstm1.bias": (80,), "head.weight": (1, 20), "head.bias": (1,),
    }  # fmt: skip
    sl2o = make_rule("rnnprop").init()
    assert tuple(sl2o["lstm0.weight"].shape) == (32, 10)
    assert "head.bias" not in sl2o


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: make_rule("joind"), "Did you mean 'joined'"),
        (lambda: make_rule("joined", hiden=3), "hiden"),
        (lambda: make_rule("joined", hidden=0), "hidden"),
        (lambda: make_rule("joined", hidden=2.5), "hidden"),
        (lambda: make_rule("joined", step_scale=-0.1), "step_scale"),
        (lambda: make_rule("joined", inputs="grad"), "raw, log_sign, adam, joined"),
        (lambda: LSTMRule(output="relu"), "linear, tanh"),
        (lambda: FeatureSet("raw", "sign"), "none, hold, momentum"),
        (lambda: Moments(beta1=1.0), "beta1"),
        (lambda: LSTMRule(beta2=-0.1), "beta2"),
        (lambda: rule_from_config("Nothing", {}), "unknown rule class"),
        (lambda: rule_from_config("LSTMRule", {"colour": 3}), "no field colour"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()
