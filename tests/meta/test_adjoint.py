"""The adjoint engine against back-propagation through the whole unrolled graph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tests.conftest import make_tiny_task
from torch import nn

from stepsmith.layout import Layout
from stepsmith.meta.adjoint import adjoint_window
from stepsmith.meta.losses import META_LOSSES, meta_loss
from stepsmith.meta.reference import reference_window
from stepsmith.meta.sample import sample_coordinates
from stepsmith.rules import LEARNED, Rule, make_rule
from stepsmith.rules.base import Coupling
from stepsmith.tasks import ModuleTask, Quadratic
from stepsmith.unroll import Copies, RuleStepper

STEPS = 9


def double_weights(rule: Rule, seed: int = 0) -> dict[str, torch.Tensor]:
    drawn = rule.init(torch.Generator().manual_seed(seed))
    return {key: value.double().requires_grad_() for key, value in drawn.items()}


def relative_error(have: dict, want: dict) -> float:
    gap = torch.cat([(have[key] - want[key]).reshape(-1) for key in want]).norm()
    return float(gap / torch.cat([value.reshape(-1) for value in want.values()]).norm())


@dataclass(frozen=True)
class TensorRule(Rule):
    """A toy: the gradient over its tensor's root mean square, times a learned number."""

    coupling: ClassVar[Coupling] = "features"

    def init(self, generator=None):
        return {"rate": torch.full((1,), 0.3)}

    def init_state(self, param_N):
        return {"step": torch.zeros((), dtype=param_N.dtype)}

    def init_carry(self, n, *, dtype=torch.float32, device="cpu"):
        return {"last": torch.zeros(1, n, dtype=dtype, device=device)}

    def features(self, grad_N, param_N, state, shape):
        rms = grad_N.square().mean().sqrt() + 1e-12
        scale_N = torch.ones_like(grad_N) / len(shape)
        return (grad_N / rms)[None], scale_N, {"step": state["step"] + 1}

    def network(self, weights, features_FN, carry):
        output = weights["rate"] * features_FN + 0.5 * carry["last"]
        return output, {"last": output}

    def step(self, output_ON, scale_N):
        return -0.1 * output_ON[0] * scale_N


@dataclass(frozen=True)
class CoupledRule(TensorRule):
    """The same, its whole step normalised to a fixed length."""

    coupling: ClassVar[Coupling] = "network"

    def step(self, output_ON, scale_N):
        return -0.1 * output_ON[0] / (output_ON.norm() + 0.1) * scale_N


RULES = {name: make_rule(name) for name in LEARNED} | {
    "per-tensor features": TensorRule(),
    "coupled": CoupledRule(),
    "relative units": make_rule("joined", scaling="relative", step_scale=3.0),
}


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("losses", ["after", "before"])
@pytest.mark.parametrize("kind", META_LOSSES)
@pytest.mark.parametrize("name", RULES)
def test_adjoint_equals_back_propagation(tiny_task, name, kind, losses, decay):
    rule, weights = RULES[name], double_weights(RULES[name])
    one, two = (Copies(tiny_task, [3, 4]) for _ in range(2))
    stepper = RuleStepper(rule, weights, one.theta, one.layout, lr=0.7, weight_decay=decay)
    window = adjoint_window(one, stepper, weights, STEPS, kind=kind, losses=losses)
    value, want = reference_window(
        two, rule, weights, STEPS, kind=kind, losses=losses, lr=0.7, weight_decay=decay
    )
    assert relative_error(window.gradients, want) < 1e-9
    assert window.value == pytest.approx(float(value), rel=1e-12)


def test_reference_with_second_derivatives_is_the_true_gradient():
    task = Quadratic(3, dtype=torch.float64)
    rule = make_rule("rnnprop", hidden=2)
    weights = double_weights(rule)

    def value(shift: float) -> float:
        moved = {k: (v + shift * direction[k]).detach() for k, v in weights.items()}
        moved = {k: v.requires_grad_() for k, v in moved.items()}
        return float(reference_window(Copies(task, [1]), rule, moved, 6, second_order=True)[0])

    direction = {k: torch.ones_like(v) for k, v in weights.items()}
    _, exact = reference_window(Copies(task, [1]), rule, weights, 6, second_order=True)
    _, first = reference_window(Copies(task, [1]), rule, weights, 6)
    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    assert sum(float(v.sum()) for v in exact.values()) == pytest.approx(slope, rel=1e-5)
    assert relative_error(first, exact) > 1e-3  # the dropped terms are not nothing


def test_the_true_gradient_is_finite_where_coordinates_see_no_gradient():
    inputs = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs[:, 1] = 0  # a pixel that is always black
    task = ModuleTask(
        lambda: nn.Linear(3, 1), nn.functional.mse_loss, (inputs, inputs.sum(1, keepdim=True)),
        batch_size=4, dtype=torch.float64,
    )  # fmt: skip
    for rule in (make_rule("joined", hidden=2), make_rule("joined", hidden=2, scaling="relative")):
        weights = double_weights(rule)
        _, exact = reference_window(Copies(task, [1]), rule, weights, 5, second_order=True)
        assert all(bool(value.isfinite().all()) for value in exact.values())
        assert any(bool(value.any()) for value in exact.values())


def test_later_windows_continue_the_carry(tiny_task):
    rule = make_rule("joined")
    weights = double_weights(rule)
    long, short = (Copies(tiny_task, [5]) for _ in range(2))
    whole = RuleStepper(rule, weights, long.theta, long.layout)
    parts = RuleStepper(rule, weights, short.theta, short.layout)
    losses = adjoint_window(long, whole, weights, 8, losses="before").losses_TC
    halves = [adjoint_window(short, parts, weights, 4, losses="before") for _ in range(2)]
    torch.testing.assert_close(torch.cat([h.losses_TC for h in halves]), losses, rtol=0, atol=0)
    torch.testing.assert_close(short.theta, long.theta, rtol=0, atol=0)


def test_sampling_keeps_the_meta_gradient_unbiased(tiny_task):
    rule = make_rule("joined", hidden=3)
    weights = double_weights(rule)

    def draw(fraction: float, seed: int) -> torch.Tensor:
        copies = Copies(tiny_task, [1])
        stepper = RuleStepper(rule, weights, copies.theta, copies.layout)
        window = adjoint_window(
            copies, stepper, weights, 4, fraction=fraction,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return torch.cat([g.reshape(-1) for g in window.gradients.values()])

    full = draw(1.0, 0)
    draws = torch.stack([draw(0.15, seed) for seed in range(400)])
    standard_error = draws.std(0).norm() / 400**0.5
    assert (draws.mean(0) - full).norm() < 1.5 * standard_error
    assert draws.std(0).norm() > 0.05 * full.norm()  # the draws do differ


@pytest.mark.parametrize("fraction", [0.01, 0.13, 0.5, 1.0])
def test_every_coordinate_is_expected_k_over_n_times(fraction):
    layout = Layout(("a", "b", "c"), ((7, 3), (), (5,)))
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(2 * layout.total, dtype=torch.float64)
    draws = 3000
    for _ in range(draws):
        index, weight = sample_coordinates(layout, 2, fraction, generator)
        counts.index_add_(0, index, weight)
    # With its weight n / k, every coordinate is expected to count once a draw.
    assert ((counts / draws - 1).abs() < 6 / (draws * min(1, fraction)) ** 0.5 + 0.02).all()
    owners = index // layout.total
    assert (owners.bincount() == len(index) // 2).all()


def test_a_rule_that_couples_coordinates_is_not_sampled(tiny_task):
    rule = CoupledRule()
    weights = double_weights(rule)
    copies = Copies(tiny_task, [1])
    stepper = RuleStepper(rule, weights, copies.theta, copies.layout)
    with pytest.raises(ValueError, match="couples coordinates"):
        adjoint_window(copies, stepper, weights, 4, fraction=0.5)
    with pytest.raises(ValueError, match="fraction"):
        adjoint_window(copies, stepper, weights, 4, fraction=0.0)


def test_a_copy_that_diverges_does_not_poison_the_others(tiny_task):
    rule = make_rule("joined")
    weights = double_weights(rule)

    def gradient(seeds: list[int], poison: bool) -> dict:
        copies = Copies(tiny_task, seeds)
        if poison:
            copies.theta[1] = float("nan")
        stepper = RuleStepper(rule, weights, copies.theta, copies.layout)
        window = adjoint_window(copies, stepper, weights, 5)
        assert window.finite_C.tolist() == [True, not poison][: len(seeds)]
        return window.gradients

    assert relative_error(gradient([1, 2], True), gradient([1], False)) < 1e-12


def test_a_discount_shortens_the_sight(tiny_task):
    rule = make_rule("joined")
    weights = double_weights(rule)

    def gradient(discount: float, steps: int) -> dict:
        copies = Copies(tiny_task, [1])
        stepper = RuleStepper(rule, weights, copies.theta, copies.layout)
        return adjoint_window(copies, stepper, weights, steps, discount=discount).gradients

    assert relative_error(gradient(0.5, 6), gradient(1.0, 6)) > 1e-2


@pytest.mark.parametrize("kind", META_LOSSES)
def test_meta_loss_derivatives(kind):
    losses = torch.rand(20, 3, dtype=torch.float64).add_(0.1).requires_grad_()
    places = torch.arange(1, 21)[:, None].expand(20, 3)
    value, weight = meta_loss(kind, losses, places, 20)
    (want,) = torch.autograd.grad(value.sum(), losses)
    torch.testing.assert_close(weight.detach(), want)


def test_final_loss_is_the_mean_of_the_last_tenth():
    losses = torch.arange(100, dtype=torch.float64)[:, None]
    value, _ = meta_loss("final", losses, torch.arange(1, 101)[:, None], 100)
    assert float(value) == pytest.approx(sum(range(90, 100)) / 10)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_second_window_with_a_carry_in_bfloat16(backend):
    task = make_tiny_task(dtype=torch.float32)
    rule = make_rule("joined", hidden=3)
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        drawn = rule.init(torch.Generator().manual_seed(0))
        weights = {key: value.requires_grad_() for key, value in drawn.items()}
        copies = Copies(task, [0, 1])
        stepper = RuleStepper(
            rule, weights, copies.theta, copies.layout, backend=backend, carry_dtype=dtype
        )
        for _ in range(2):
            window = adjoint_window(copies, stepper, weights, 4)
        gradients.append(torch.cat([g.reshape(-1) for g in window.gradients.values()]))
    narrow, wide = gradients
    assert (narrow - wide).norm() < 0.03 * wide.norm()


def test_a_sample_needs_a_generator(tiny_task):
    rule, copies = make_rule("joined"), Copies(tiny_task, [1])
    weights = double_weights(rule)
    stepper = RuleStepper(rule, weights, copies.theta, copies.layout)
    with pytest.raises(ValueError, match=r"a fraction of 0\.5 is drawn: pass a generator"):
        adjoint_window(copies, stepper, weights, 3, fraction=0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"steps": 2.0}, {"steps": "4"}, {"kind": "median"}, {"kind": None},
        {"losses": "during"}, {"losses": 1}, {"fraction": 0}, {"fraction": math.nan},
        {"fraction": "1"}, {"fraction": 1.5}, {"discount": 0}, {"discount": math.inf},
        {"discount": "1"}, {"horizon": 1}, {"horizon": 2.5}, {"ages": [0]}, {"generator": 0},
        {"copies": 3},
    ],
)  # fmt: skip
def test_arguments_of_a_window_are_checked_before_a_copy_moves(wrong):
    rule = make_rule("joined")
    weights = {k: v.requires_grad_() for k, v in rule.init(torch.Generator()).items()}
    copies = Copies(Quadratic(3), [0, 1])
    before = copies.theta.clone()
    stepper = RuleStepper(rule, weights, copies.theta, copies.layout)
    given = {"copies": copies, "steps": 2, **wrong}
    with pytest.raises((ValueError, TypeError), match="must"):
        adjoint_window(given.pop("copies"), stepper, weights, given.pop("steps"), **given)
    assert torch.equal(copies.theta, before)


@pytest.mark.parametrize(
    "wrong",
    [{"task": "quadratic"}, {"seeds": 3}, {"seeds": []}, {"seeds": [0.5]}, {"seeds": [-1]}],
)
def test_copies_of_other_types(wrong):
    with pytest.raises((ValueError, TypeError), match="Copies: "):
        Copies(**{"task": Quadratic(3), "seeds": [0], **wrong})
