"""Every rule passes the contract suite, and the suite catches rules that break it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from stepsmith import register, testing
from stepsmith.rules import CLASSIC, LEARNED, Rule, make_rule
from stepsmith.rules.base import Coupling
from stepsmith.rules.features import FEATURE_SETS
from stepsmith.rules.lstm import LSTMRule

VARIANTS = [
    *[LSTMRule(3, 2, inputs, output, 0.1, frame) for inputs in FEATURE_SETS
      for output in ("linear", "tanh") for frame in ("none", "hold", "momentum")],
    LSTMRule(1, 1), LSTMRule(20, 1, bias=False),
]  # fmt: skip


@pytest.mark.parametrize("name", LEARNED)
def test_learned_rules(name):
    testing.check_rule(make_rule(name))


@pytest.mark.parametrize("name", ["l2o_dm", "rnnprop"])
def test_faithful_rules_drift_and_say_so(name):
    rule = make_rule(name, faithful=True)
    testing.check_rule(rule, faithful=True)
    with pytest.raises(AssertionError, match="always zero moved"):
        testing.check_rule(rule)


@pytest.mark.parametrize("rule", VARIANTS, ids=lambda r: f"{r.inputs}-{r.output}-{r.frame}")
def test_variants(rule):
    testing.check_rule(rule, faithful=rule.frame == "none")


@pytest.mark.parametrize("name", CLASSIC)
def test_classic_rules(name):
    testing.check_rule(make_rule(name))
    testing.check_rule(make_rule(name, lr=0.3, weight_decay=0.0))


@register
@dataclass(frozen=True)
class Toy(Rule):
    """Gradient descent with a learned rate and a leaky sum; the broken rules derive from it."""

    def init(self, generator=None):
        return {"rate": torch.full((1, 1), 0.1)}

    def init_state(self, param_N):
        return {"step": torch.zeros((), dtype=param_N.dtype)}

    def init_carry(self, n, *, dtype=torch.float32, device="cpu"):
        return {"sum": torch.zeros(1, n, dtype=dtype, device=device)}

    def features(self, grad_N, param_N, state, shape):
        return grad_N.clamp(-1e15, 1e15)[None], None, {"step": state["step"] + 1}

    def network(self, weights, features_FN, carry):
        total = 0.5 * carry["sum"] + features_FN
        return weights["rate"] @ total, {"sum": total}

    def step(self, output_ON, scale_N):
        return -output_ON[0]


def test_a_users_rule():
    testing.check_rule(Toy())


def test_a_rule_with_per_tensor_statistics():
    @register
    @dataclass(frozen=True)
    class PerTensor(Toy):
        coupling: ClassVar[Coupling] = "features"

        def features(self, grad_N, param_N, state, shape):
            grad_N = grad_N.clamp(-1e15, 1e15)
            rms = grad_N.square().mean().sqrt() + 1e-12
            return (grad_N / rms)[None], None, {"step": state["step"] + 1}

    testing.check_rule(PerTensor())


def test_a_rule_whose_network_couples_coordinates():
    @register
    @dataclass(frozen=True)
    class WholeStep(Toy):
        """The step of a tensor has unit length."""

        coupling: ClassVar[Coupling] = "network"

        def network(self, weights, features_FN, carry):
            total = 0.5 * carry["sum"] + features_FN
            step = weights["rate"] @ total
            return step / (1 + step.square().mean().sqrt()), {"sum": total}

    testing.check_rule(WholeStep())


def writes(self, grad_N, param_N, state, shape):
    grad_N.mul_(2)
    return grad_N[None], None, {"step": state["step"] + 1}


def couples(self, grad_N, param_N, state, shape):
    return (grad_N / grad_N.norm())[None], None, {"step": state["step"] + 1}


def overflows(self, grad_N, param_N, state, shape):
    return (
        (grad_N / (grad_N * grad_N + 1).sqrt() * 0 + grad_N * grad_N)[None],
        None,
        {"step": state["step"] + 1},
    )


def forgets(self, grad_N, param_N, state, shape):
    return grad_N[None], None, dict(state)


def draws(self, grad_N, param_N, state, shape):
    return (grad_N + torch.rand(()))[None], None, {"step": state["step"] + 1}


def wavers(self, grad_N, param_N, state, shape):
    return (grad_N * random.random())[None], None, {"step": state["step"] + 1}


def mixes(self, weights, features_FN, carry):
    return weights["rate"] @ features_FN / features_FN.norm(), carry


def mixes_through_the_carry(self, weights, features_FN, carry):
    total = carry["sum"] + features_FN
    return weights["rate"] @ features_FN + carry["sum"].mean(), {"sum": total}


def narrows(self, weights, features_FN, carry):
    return (weights["rate"] @ features_FN).float(), carry


def writes_its_input(self, weights, features_FN, carry):
    return weights["rate"] @ features_FN.mul_(2), carry


def writes_its_carry(self, weights, features_FN, carry):
    return weights["rate"] @ carry["sum"].add_(features_FN), carry


def grows(self, weights, features_FN, carry):
    return weights["rate"] @ features_FN, {"sum": torch.cat([carry["sum"], features_FN])}


def turns(self, output_ON, scale_N):
    return output_ON.neg_()[0]


def never_recovers(self, grad_N, param_N, state, shape):
    largest = torch.maximum(state["largest"], grad_N * grad_N)
    return (grad_N / (largest + 1))[None], None, {"step": state["step"] + 1, "largest": largest}


def largest_state(self, param_N):
    return {"step": torch.zeros((), dtype=param_N.dtype), "largest": torch.zeros_like(param_N)}


def plain(self, weights, features_FN, carry):
    return weights["rate"] @ features_FN, carry


def branches(self, grad_N, param_N, state, shape):
    big = float(grad_N.abs().max()) > 3
    return (grad_N / 2 if big else grad_N)[None], None, {"step": state["step"] + 1}


def ignores_the_device(self, n, *, dtype=torch.float32, device="cpu"):
    return {"sum": torch.zeros(1, n, dtype=dtype)}


def begins_by_coordinate(self, n, *, dtype=torch.float32, device="cpu"):
    return {"sum": torch.arange(n, dtype=dtype, device=device)[None]}


def drifts(self, output_ON, scale_N):
    return -output_ON[0] + 1e-4


def misshapes(self, output_ON, scale_N):
    return -output_ON


def unused(self, generator=None):
    return {"rate": torch.full((1, 1), 0.1), "spare": torch.ones(1)}


BROKEN: list[tuple[dict, str]] = [
    ({"features": writes}, "written to"),
    ({"features": couples}, "depends on other coordinates"),
    ({"features": overflows}, "not finite"),
    ({"features": forgets}, "must be 1"),
    ({"features": draws}, "different results|global random"),
    ({"features": wavers}, "different results"),
    ({"network": mixes}, "coordinates"),
    ({"step": drifts}, "always zero moved"),
    ({"step": misshapes}, "step must be"),
    ({"step": turns}, "step: an argument was written to"),
    ({"network": mixes_through_the_carry}, "coordinates"),
    ({"network": mixes_through_the_carry, "coupling": "features"}, "network and step mix"),
    ({"network": narrows}, "output must be"),
    ({"network": writes_its_input}, "network: an argument was written to"),
    ({"network": writes_its_carry}, "network: an argument was written to"),
    ({"network": grows}, "carry 'sum' changed"),
    (
        {"features": never_recovers, "init_state": largest_state, "network": plain},
        "steps stay zero after .* 1e.30",
    ),
    ({"features": never_recovers, "init_state": largest_state}, "state 'largest' is not finite"),
    ({"features": branches, "coupling": "features"}, "vmap"),
    ({"init_carry": ignores_the_device}, "device asked for"),
    ({"init_carry": begins_by_coordinate}, "the same for every coordinate"),
    ({"init": unused}, "no part in the steps"),
]


@pytest.mark.parametrize(
    ("methods", "match"), BROKEN, ids=lambda v: v if isinstance(v, str) else ""
)
def test_broken_rules_are_caught(methods, match):
    name = "Broken_" + "_".join(getattr(part, "__name__", part) for part in methods.values())
    rule = register(dataclass(frozen=True)(type(name, (Toy,), methods)))()
    with pytest.raises(AssertionError, match=match):
        testing.check_rule(rule)


def test_an_unregistered_rule_cannot_be_rebuilt():
    @dataclass(frozen=True)
    class Unknown(Toy):
        pass

    with pytest.raises(AssertionError, match="register"):
        testing.check_rule(Unknown())


def test_a_wrong_kernel_is_caught(monkeypatch):
    from stepsmith.kernels import lstm

    rule = make_rule("joined")
    right = lstm.step_
    monkeypatch.setattr(lstm, "step_", lambda *args: right(*args) * 1.001)
    with pytest.raises(AssertionError, match="leaves the reference"):
        testing.check_kernel(rule, testing.fresh_weights(rule))


def test_a_kernel_that_reads_fresh_memory_is_caught(monkeypatch):
    from stepsmith.kernels import lstm

    rule, right = make_rule("joined"), lstm.step_

    def forgets_the_last(rule, packed, features_FN, carry):
        output_ON = features_FN.new_empty(1, features_FN.shape[1])
        output_ON[:, :-1] = right(rule, packed, features_FN, carry)[:, :-1]
        return output_ON

    monkeypatch.setattr(lstm, "step_", forgets_the_last)
    with pytest.raises(AssertionError, match="leaves the reference by nan"):
        testing.check_kernel(rule, testing.fresh_weights(rule))
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_wrong_kernel_gradient_is_caught(monkeypatch):
    from stepsmith.kernels import lstm

    rule, right = make_rule("joined"), lstm.sequence
    monkeypatch.setattr(lstm, "sequence", lambda *arguments: right(*arguments) * (1 + 1e-8))
    with pytest.raises(AssertionError, match=r"the gradient of .* is not the reference's"):
        testing.check_kernel(rule, testing.fresh_weights(rule))
