"""The fused LSTM against its reference: random shapes, chunk boundaries, gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.kernels.rolls import CPU, drawn

from stepsmith import kernels
from stepsmith.kernels import lstm, plain
from stepsmith.rules import make_rule
from stepsmith.rules.lstm import LSTMRule
from stepsmith.testing import fresh_weights

RULES = [LSTMRule(1, 1, "raw"), LSTMRule(8, 1), LSTMRule(5, 3, "adam", bias=False),
         make_rule("l2o_dm")]  # fmt: skip


@pytest.mark.parametrize("chunk", [7, 8192])
@pytest.mark.parametrize("n", [1, 6, 7, 8, 50])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.hidden}x{r.layers}")
def test_step(rule, n, chunk, monkeypatch):
    monkeypatch.setattr(lstm, "CHUNK", chunk)
    features, carry = drawn(rule, 4, n, torch.float64)
    weights, other = fresh_weights(rule), {k: v.clone() for k, v in carry.items()}
    fast = plain.network_step(rule, weights, torch.float64, CPU, "chunked")
    slow = plain.network_step(rule, weights, torch.float64, CPU, "reference")
    for feature_FN in features:
        torch.testing.assert_close(fast(feature_FN, carry), slow(feature_FN, other))
        torch.testing.assert_close(carry, other)


@pytest.mark.parametrize("output", ["tanh", "linear"])
@pytest.mark.parametrize("n", [1, 9])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.hidden}x{r.layers}")
def test_replay(rule, n, output, monkeypatch):
    monkeypatch.setattr(kernels, "REPLAY_WIDTH", 4)
    rule = replace(rule, output=output)
    features, carry = drawn(rule, 6, n, torch.float64)
    weights = fresh_weights(rule)
    adjoint, scale = torch.randn(2, 6, n, dtype=torch.float64)
    for scales in (None, scale):
        fast, slow = (
            kernels.replay(rule, weights, features, carry, adjoint, scales, backend)
            for backend in ("chunked", "reference")
        )
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_step_on_random_shapes_in_float32(seed, monkeypatch):
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(1, high, (), generator=generator))

    rule = LSTMRule(draw(24), draw(4), ("raw", "log_sign", "adam", "joined")[seed % 4],
                    bias=seed % 2 == 0)  # fmt: skip
    monkeypatch.setattr(lstm, "CHUNK", draw(40))
    features, carry = drawn(rule, 5, draw(200), torch.float32)
    weights, other = fresh_weights(rule, seed), {k: v.clone() for k, v in carry.items()}
    fast = plain.network_step(rule, weights, torch.float32, CPU, "chunked")
    slow = plain.network_step(rule, weights, torch.float32, CPU, "reference")
    for feature_FN in features:
        kept = feature_FN.clone()
        torch.testing.assert_close(
            fast(feature_FN, carry), slow(feature_FN, other), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(carry, other, rtol=1e-5, atol=1e-5)
        assert torch.equal(feature_FN, kept)


def test_no_coordinates_make_no_steps():
    rule = LSTMRule(3, 2)
    features, carry = drawn(rule, 1, 0, torch.float32)
    step = plain.network_step(rule, fresh_weights(rule), torch.float32, CPU, "chunked")
    assert step(features[0], carry).shape == (1, 0)


def test_replay_differentiates_the_steps():
    rule = LSTMRule(4, 2)
    features, carry = drawn(rule, 6, 5, torch.float64)
    weights = {k: v.double() for k, v in fresh_weights(rule).items()}
    adjoint, scale = torch.randn(2, 6, 5, dtype=torch.float64)
    gradients = kernels.replay(rule, weights, features, carry, adjoint, scale)

    def objective() -> float:
        own = {key: value.clone() for key, value in carry.items()}
        step = plain.network_step(rule, weights, torch.float64, CPU, "chunked")
        deltas = [rule.step(step(f, own), s) for f, s in zip(features, scale, strict=True)]
        return float((adjoint * torch.stack(deltas)).sum())

    for key, weight in weights.items():
        base, small = weight[0].clone(), 1e-5
        weight[0] = base + small
        high = objective()
        weight[0] = base - small
        low = objective()
        weight[0] = base
        expected = gradients[key][0].sum()
        torch.testing.assert_close((high - low) / 2 / small, float(expected), rtol=1e-5, atol=1e-8)


def test_backends_by_name():
    joined, adam = make_rule("joined"), make_rule("adam")
    assert kernels.resolve(joined, "auto", torch.float64, CPU) == "chunked"
    assert kernels.resolve(adam, "auto", torch.float32, CPU) == "reference"
    with pytest.raises(ValueError, match="unknown backend 'chunky'; known: auto, chunked"):
        kernels.require_form(joined, "chunky")
    with pytest.raises(ValueError, match="no form of Adam"):
        kernels.require_form(adam, "chunked")


def test_a_network_of_ones_own_is_never_replaced():
    class Halved(LSTMRule):
        def network(self, weights, features_FN, carry):
            output_ON, carry = super().network(weights, features_FN, carry)
            return output_ON / 2, carry

    assert kernels.resolve(Halved(), "auto", torch.float32, CPU) == "reference"
    with pytest.raises(ValueError, match="no form of Halved"):
        kernels.require_form(Halved(), "native")
