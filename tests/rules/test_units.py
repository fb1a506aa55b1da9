"""Relative units: invariance, the floor, and every path that applies them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stepsmith import LearnedOptimizer, TrainedRule, make_rule
from stepsmith.rules.units import FIRST, RelativeUnits, norms
from stepsmith.tasks import Quadratic
from stepsmith.unroll import Copies, RuleStepper, roll


def relative_rule() -> TrainedRule:
    rule = make_rule("joined", scaling="relative", step_scale=3.0)
    return TrainedRule(rule, rule.init(torch.Generator().manual_seed(0)))


def test_the_first_gradient_is_seen_at_a_fixed_mean_and_its_step_predicts_the_loss():
    grad_CP = torch.tensor([[1.0, -3.0], [10.0, 0.0]])
    units = RelativeUnits()
    seen_C, gain_C, _ = units.measure(norms(grad_CP), 2, units.init(2))
    torch.testing.assert_close((grad_CP * seen_C[:, None]).abs().mean(1), torch.full((2,), FIRST))
    # A step of 1 against every gradient's sign changes the loss by -1, to first order.
    torch.testing.assert_close((grad_CP.abs() * gain_C[:, None]).sum(1), torch.ones(2))


def test_the_running_norm_is_a_corrected_mean_with_a_floor():
    units = RelativeUnits(beta=0.5, floor=0.1)
    state = units.init(1)
    _, gain, state = units.measure(torch.tensor([8.0]), 1, state)
    assert float(gain) == pytest.approx(1 / 8)
    _, gain, state = units.measure(torch.tensor([2.0]), 1, state)
    assert float(gain) == pytest.approx(1 / ((0.25 * 8 + 0.5 * 2) / 0.75))
    _, gain, _ = units.measure(torch.tensor([100.0]), 1, state)
    assert float(gain) == pytest.approx(1 / 100)  # at once, not in the mean
    for _ in range(20):
        _, gain, state = units.measure(torch.tensor([1e-6]), 1, state)
    assert float(gain) == pytest.approx(1 / 0.8, rel=1e-4)


def test_a_warm_up_raises_the_first_steps_to_their_whole_size():
    plain, warmed = RelativeUnits(), RelativeUnits(warmup=4)
    states = [plain.init(2), warmed.init(2)]
    for rise in (0.25, 0.5, 0.75, 1, 1, 1):
        norm_C = torch.tensor([2.0, 3.0])
        seen, gain, states[0] = plain.measure(norm_C, 5, states[0])
        slow_seen, slow_gain, states[1] = warmed.measure(norm_C, 5, states[1])
        torch.testing.assert_close(slow_seen, seen)
        torch.testing.assert_close(slow_gain, rise * gain)


def test_a_warmed_rule_makes_a_fifth_of_the_first_step():
    rule = make_rule("joined", scaling="relative", step_scale=3.0)
    weights = rule.init(torch.Generator().manual_seed(0))
    moved = []
    for made in (rule, replace(rule, scaling="warmed")):
        param = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        param.grad = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
        LearnedOptimizer([param], TrainedRule(made, weights)).step()
        moved.append(param.detach())
    torch.testing.assert_close(moved[1], moved[0] / 5)
    assert bool(moved[0].abs().min() > 0)


def test_gradients_of_zero_give_no_nan_and_the_first_real_one_counts_as_first():
    units = RelativeUnits()
    seen, gain, state = units.measure(torch.zeros(1), 3, units.init(1))
    assert bool(seen.isfinite())
    assert bool(gain.isfinite())
    units.measure(torch.ones(1), 3, state)
    assert float(units.measure(torch.ones(1), 3, state)[2]["first_norm"]) == 1


def test_an_optimizee_with_rescaled_parameters_is_trained_alike():
    trained, scale = relative_rule(), 37.0
    paths = []
    for factor in (1.0, scale):
        param = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]) / factor)
        optimizer = LearnedOptimizer([param], trained)
        for _ in range(10):
            optimizer.zero_grad()
            ((factor * param - torch.tensor([0.0, 1.0, 2.0])) ** 2).sum().backward()
            optimizer.step()
        paths.append(factor * param.detach())
    torch.testing.assert_close(paths[1], paths[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(paths[0], torch.tensor([1.0, -2.0, 0.5]))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_deployment_makes_the_steps_of_meta_training(tiny_task, backend):
    trained = relative_rule()
    copies = Copies(tiny_task, [3])
    start = copies.layout.views(copies.theta[0].clone())
    grads = []
    stepper = RuleStepper(trained.rule, trained.weights, copies.theta, copies.layout)
    roll(copies, stepper, 12, hook=lambda s: grads.append(s.grad_CP[0].clone()))
    params = {key: torch.nn.Parameter(value.clone()) for key, value in start.items()}
    keys = list(params)
    groups = [{"params": [params[keys[0]]]}, {"params": [params[key] for key in keys[1:]]}]
    optimizer = LearnedOptimizer(groups, trained, backend=backend)
    for grad_P in grads:
        for key, grad in copies.layout.views(grad_P).items():
            params[key].grad = grad.clone()
        optimizer.step()
    after = copies.layout.flatten({key: value.detach() for key, value in params.items()})
    torch.testing.assert_close(after, copies.theta[0], rtol=1e-4, atol=1e-5)


def test_a_restarted_copy_measures_afresh():
    trained = relative_rule()
    copies = Copies(Quadratic(3), [1, 2])
    stepper = RuleStepper(trained.rule, trained.weights, copies.theta, copies.layout)
    roll(copies, stepper, 3)
    kept = {key: value.clone() for key, value in stepper.measures.items()}
    stepper.restart(0, copies.theta)
    for key, value in stepper.measures.items():
        assert float(value[0]) == 0
        assert torch.equal(value[1], kept[key][1])


def test_a_resumed_optimizer_remembers_what_it_measured():
    trained = relative_rule()

    def made() -> tuple[list[torch.nn.Parameter], LearnedOptimizer]:
        params = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(2, 3))]
        return params, LearnedOptimizer(params, trained)

    def feed(params, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()

    one, first = made()
    two, second = made()
    for seed in range(5):
        feed(one, first, seed)
    second.load_state_dict(first.state_dict())
    for a, b in zip(one, two, strict=True):
        b.data.copy_(a.data)
    for seed in range(5, 8):
        feed(one, first, seed)
        feed(two, second, seed)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
    assert float(second.state[two[1]]["measured"]) == 8


def test_a_parameter_that_joins_late_shares_the_optimizees_measure():
    trained = relative_rule()
    early, late = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = LearnedOptimizer([early], trained)
    early.grad = torch.ones(3)
    optimizer.step()
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(3)
    optimizer.step()
    for key in ("first_norm", "first_size", "running_norm", "measured"):
        assert float(optimizer.state[late][key]) == float(optimizer.state[early][key])
    assert float(optimizer.state[late]["measured"]) == 2


def test_gradients_are_seen_alike_whoever_else_has_one():
    units = RelativeUnits(floor=0.5)
    seen_C, _, state = units.measure(torch.tensor([6.0]), 3, units.init(1))
    # A hundred times as many coordinates, then as few again, all of the same mean magnitude.
    for size in (300, 3):
        again_C, gain_C, state = units.measure(torch.tensor([2.0 * size]), size, state)
        assert torch.equal(again_C, seen_C)
    # The floor is that of as many: half of 2 a coordinate, though all gradients have vanished.
    _, gain_C, _ = RelativeUnits(beta=0.0, floor=0.5).measure(torch.tensor([1e-9]), 300, state)
    assert float(gain_C) == pytest.approx(1 / 300)


def test_what_is_measured_stays_where_a_captured_graph_reads_it():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([param], relative_rule(), nonfinite="ignore")

    def places() -> dict[str, int]:
        param.grad = torch.ones(3)
        optimizer.step()
        return {key: value.data_ptr() for key, value in optimizer._measures.items()}

    first = places()
    assert first
    assert places() == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_goes_on_measuring():
    ended = []
    for captured in (True, False):
        param = torch.nn.Parameter(torch.ones(64, device="cuda"))
        param.grad = torch.ones(64, device="cuda")
        optimizer = LearnedOptimizer([param], "general-warmed", nonfinite="ignore")
        for _ in range(3):
            optimizer.step()
        step = optimizer.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay
        for size in (0.5, 2.0, 0.1):
            param.grad.fill_(size)
            step()
        ended.append(param.detach().cpu())
    torch.testing.assert_close(*ended)


@pytest.mark.parametrize("units", [RelativeUnits(), RelativeUnits(0.5, 0.1, 4)])
def test_one_optimizee_is_measured_as_many_are(units):
    state, one = units.init(1, dtype=torch.float64), {}
    one = dict.fromkeys(state, 0.0)
    norms_T = [1e4, 2.0, 2.0, 0.0, 3e3, 1e-9, 1e35, 1.0, 1.0, 7.0]
    for norm, size in zip(norms_T, [3, 3, 5, 3, 3, 3, 3, 9, 3, 3], strict=True):
        *many, state = units.measure(torch.tensor([norm], dtype=torch.float64), size, state, 2.0)
        *few, one = units.measure_one(norm, size, one, 2.0)
        for got, want in zip([*few, *one.values()], [*many, *state.values()], strict=True):
            assert got == pytest.approx(float(want))


def test_a_first_gradient_that_was_no_measure_is_forgotten():
    """A batch of padding, or a loss of other units: one step is spoilt, not the training."""
    units = RelativeUnits()
    _, usual, _ = units.measure(torch.tensor([5.0]), 3, units.init(1))
    for first in (5e-4, 5e4, 5e37):
        _, _, state = units.measure(torch.tensor([first]), 3, units.init(1))
        seen, gain, state = units.measure(torch.tensor([5.0]), 3, state)
        torch.testing.assert_close(gain, usual)
        torch.testing.assert_close(seen, torch.tensor([FIRST * 3 / 5.0]))


def test_a_gradient_that_merely_grows_or_shrinks_leaves_the_first_as_it_is():
    units = RelativeUnits()
    for then in (5.0 * 200, 5.0 / 50):  # a plateau's end, a good first step
        _, _, state = units.measure(torch.tensor([5.0]), 3, units.init(1))
        _, _, state = units.measure(torch.tensor([then]), 3, state)
        assert float(state["first_norm"]) == 5


def test_one_gigantic_gradient_does_not_freeze_what_follows():
    units, state = RelativeUnits(), RelativeUnits().init(1)
    for norm in [1.0] * 30 + [1e38] + [1.0] * 100:
        _, gain, state = units.measure(torch.tensor([norm]), 3, state)
    assert float(gain) == pytest.approx(1, rel=0.05)
