"""Imitation: its gradient against autograd, its trajectory, its place in a run."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from tests.meta.test_adjoint import RULES, CoupledRule, double_weights, relative_error

from stepsmith.meta import MetaTrainConfig, meta_train
from stepsmith.meta.imitation import TEACHERS, imitation_window, make_teacher
from stepsmith.meta.trainer import Run
from stepsmith.rules import make_rule
from stepsmith.rules.units import norms
from stepsmith.tasks import Quadratic
from stepsmith.unroll import Copies, RuleStepper, roll

STEPS = 7
SMALL = {"horizon": 12, "copies": 2, "validations": 3, "validation_copies": 4, "samples": 60}


def by_autograd(task, seed: int, rule, weights, make, lr: float, decay: float):
    """J of one copy and its gradient, the rule's steps being the only graph."""
    copies = Copies(task, [seed])
    layout, generator = copies.layout, copies.generators[0]
    params = [p.clone().requires_grad_() for p in layout.views(copies.theta[0]).values()]
    optimizer = make(params)
    uncoupled = rule.coupling == "none"
    spans = [(slice(0, layout.total), (layout.total,))] if uncoupled else [
        *zip(layout.spans, layout.shapes, strict=True)
    ]  # fmt: skip
    states = [rule.init_state(copies.theta[0][span]) for span, _ in spans]
    carries = [rule.init_carry(s.stop - s.start, dtype=torch.float64) for s, _ in spans]
    measures = rule.units.init(1, dtype=torch.float64) if rule.units else {}
    gap = squares = torch.zeros((), dtype=torch.float64)
    for _ in range(STEPS):
        batch = tuple(part[0] for part in task.batches([generator], "meta_train"))
        loss, _, _ = task.loss(dict(zip(layout.names, params, strict=True)), {}, batch, None, True)
        gradients = torch.autograd.grad(loss, params)
        before = torch.cat([p.detach().reshape(-1) for p in params])
        flat = torch.cat([g.reshape(-1) for g in gradients])
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        optimizer.step()
        taught = torch.cat([p.detach().reshape(-1) for p in params]) - before
        gain = 1.0
        if rule.units:
            seen, gain, measures = rule.units.measure(norms(flat[None]), layout.total, measures)
            flat = flat * seen
        steps = []
        for place, (span, shape) in enumerate(spans):
            features, scale, states[place] = rule.features(
                flat[span], before[span], states[place], shape
            )
            output, carries[place] = rule.network(weights, features, carries[place])
            steps.append(rule.step(output, scale))
        own = lr * gain * torch.cat(steps) - lr * decay * before
        gap = gap + (own - taught).square().sum()
        squares = squares + taught.square().sum()
    value = gap / squares / 2
    keys = list(weights)
    grads = torch.autograd.grad(value, [weights[key] for key in keys])
    return value.detach(), dict(zip(keys, grads, strict=True))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("teacher", "rate"), [("adam", 0.02), ("sgd", 0.3)])
def test_the_gradient_is_that_of_autograd(tiny_task, name, teacher, rate):
    rule = RULES[name]
    weights = double_weights(rule)
    copies = Copies(tiny_task, [3, 4])
    stepper = RuleStepper(rule, weights, copies.theta, copies.layout, lr=0.7, weight_decay=0.1)
    window = imitation_window(copies, stepper, weights, make_teacher(teacher, rate, copies), STEPS)
    parts = [
        by_autograd(
            tiny_task, seed, rule, weights, lambda p: TEACHERS[teacher](p, lr=rate), 0.7, 0.1
        )
        for seed in (3, 4)
    ]
    want = {key: (parts[0][1][key] + parts[1][1][key]) / 2 for key in weights}
    assert relative_error(window.gradients, want) < 1e-9
    assert window.value == pytest.approx(float(parts[0][0] + parts[1][0]) / 2, rel=1e-10)


def test_the_teacher_makes_the_steps(tiny_task):
    rule = make_rule("joined")
    weights = double_weights(rule)
    taught, alone = Copies(tiny_task, [1, 2]), Copies(tiny_task, [1, 2])
    stepper = RuleStepper(rule, weights, taught.theta, taught.layout)
    window = imitation_window(
        taught, stepper, weights, make_teacher("rmsprop", 0.01, taught), STEPS
    )
    losses = roll(alone, make_teacher("rmsprop", 0.01, alone), STEPS, split="meta_train")
    torch.testing.assert_close(window.losses_TC, losses, rtol=0, atol=0)
    torch.testing.assert_close(taught.theta, alone.theta, rtol=0, atol=0)
    assert float(stepper.state["step"].max()) == STEPS  # the rule has seen every gradient


def test_a_sample_is_unbiased(tiny_task):
    rule = make_rule("joined", hidden=3)
    weights = double_weights(rule)

    def draw(fraction: float, seed: int) -> torch.Tensor:
        copies = Copies(tiny_task, [1])
        stepper = RuleStepper(rule, weights, copies.theta, copies.layout)
        window = imitation_window(
            copies, stepper, weights, make_teacher("adam", 0.01, copies), 3, fraction=fraction,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return torch.cat([g.reshape(-1) for g in window.gradients.values()])

    full = draw(1.0, 0)
    draws = torch.stack([draw(0.15, seed) for seed in range(300)])
    assert (draws.mean(0) - full).norm() < 1.5 * draws.std(0).norm() / 300**0.5


def test_a_rule_that_couples_coordinates_is_not_sampled(tiny_task):
    rule, copies = CoupledRule(), Copies(tiny_task, [1])
    weights = double_weights(rule)
    stepper = RuleStepper(rule, weights, copies.theta, copies.layout)
    teacher = make_teacher("adam", 0.01, copies)
    with pytest.raises(ValueError, match="couples coordinates"):
        imitation_window(copies, stepper, weights, teacher, 3, fraction=0.5)


def test_a_copy_that_diverges_is_left_out(tiny_task):
    rule = make_rule("joined")
    weights = double_weights(rule)

    def gradient(seeds: list[int], poison: bool):
        copies = Copies(tiny_task, seeds)
        if poison:
            copies.theta[1] = float("nan")
        stepper = RuleStepper(rule, weights, copies.theta, copies.layout)
        teacher = make_teacher("adam", 0.01, copies)
        return imitation_window(copies, stepper, weights, teacher, 4)

    poisoned, alone = gradient([1, 2], True), gradient([1], False)
    assert poisoned.finite_C.tolist() == [True, False]
    assert relative_error(poisoned.gradients, alone.gradients) < 1e-12
    assert poisoned.value == pytest.approx(alone.value)


def test_a_rule_learns_to_imitate():
    values = []
    meta_train(
        Quadratic(4), steps=12_000, horizon=20, copies=4, imitation=1.0, teacher_lr=0.1,
        validations=1, validation_copies=2, on_window=lambda _, window: values.append(window.value),
    )  # fmt: skip
    assert sum(values[-10:]) / 10 < 0.25 * values[0]


def test_imitated_episodes_are_drawn_with_their_chance_and_counted():
    config = MetaTrainConfig(steps=1000, **{**SMALL, "window": 4}, imitation=0.3)
    run = Run([Quadratic(2), Quadratic(3)], make_rule("joined"), config)
    for _ in range(100):
        run.window()
    imitated = [row for row in run.progress.history if row.get("imitated")]
    assert 15 < len(imitated) < 45
    # An imitated episode is whole, a window is not.
    assert run.progress.inner_steps == 2 * (12 * len(imitated) + 4 * (100 - len(imitated)))
    assert all(own.levels["imitated"][1] + own.levels["own"][1] == 50 for own in run.episodes)


def test_without_imitation_nothing_changes():
    runs = [meta_train(Quadratic(3), steps=100, teacher_lr=rate, **SMALL) for rate in (0.1, 0.2)]
    assert runs[0].fingerprint == runs[1].fingerprint


def test_resuming_with_imitation_gives_the_same_numbers(tmp_path, tiny_task):
    tasks = [tiny_task, Quadratic(3)]
    common = {**SMALL, "window": 4, "imitation": 0.4}
    whole = meta_train(tasks, steps=600, **common)

    def stop(run: Run, window) -> None:
        if run.progress.inner_steps >= 250:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        meta_train(tasks, steps=600, out=tmp_path, on_window=stop, **common)
    resumed = meta_train(tasks, steps=600, out=tmp_path, resume=True, **common)
    assert resumed.fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"imitation": 1.5}, "imitation must lie in"),
        ({"teacher": "lbfgs"}, "teacher must be one of sgd, adam"),
        ({"teacher_lr": 0.0}, "teacher_lr must be"),
    ],
)
def test_bad_settings(bad, match, tiny_task):
    with pytest.raises(ValueError, match=match):
        MetaTrainConfig(steps=9, **bad)
    with pytest.raises(ValueError, match="unknown teacher"):
        make_teacher("adm", 0.1, Copies(tiny_task, [0]))
