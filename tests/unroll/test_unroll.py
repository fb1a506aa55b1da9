"""The forward roll: copies, stacking, steppers."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import make_tiny_task
from torch import nn

from stepsmith import LearnedOptimizer
from stepsmith.hub import TrainedRule
from stepsmith.layout import Layout
from stepsmith.rules import make_rule
from stepsmith.tasks import ModuleTask, Quadratic
from stepsmith.unroll import Copies, RuleStepper, TorchStepper, roll


def adam(params):
    return torch.optim.Adam(params, lr=0.05)


@pytest.mark.parametrize("stacking", ["loop", "threads", "vmap"])
def test_stacking_changes_nothing(stacking):
    def losses(stacking: str) -> torch.Tensor:
        copies = Copies(make_tiny_task(stacking=stacking), [1, 2, 3])
        return roll(copies, TorchStepper(adam, copies.theta, copies.layout), 6)

    torch.testing.assert_close(losses(stacking), losses("loop"), rtol=1e-10, atol=0)


def test_a_parameter_may_be_a_single_number():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.linear = nn.Linear(3, 1)

        def forward(self, inputs):
            return self.scale * self.linear(inputs)

    data = (torch.randn(8, 3), torch.randn(8, 1))
    task = ModuleTask(Scaled, nn.functional.mse_loss, data, batch_size=4)
    copies = Copies(task, [0, 1])
    assert copies.layout.views(copies.theta)["scale"].shape == (2,)
    before = copies.theta.clone()
    assert torch.isfinite(roll(copies, TorchStepper(adam, copies.theta, copies.layout), 3)).all()
    place = copies.layout.spans[copies.layout.names.index("scale")]
    assert not torch.equal(copies.theta[:, place], before[:, place])


def test_a_seed_means_the_same_run_whatever_runs_beside_it(tiny_task):
    def losses(seeds: list[int]) -> torch.Tensor:
        copies = Copies(tiny_task, seeds)
        return roll(copies, TorchStepper(adam, copies.theta, copies.layout), 6)

    torch.testing.assert_close(losses([1, 2, 3])[:, 1], losses([2])[:, 0], rtol=1e-10, atol=0)


def test_the_roll_is_an_ordinary_training_loop(tiny_task):
    """Copies under a rule equal the deployed optimizer on the module itself, batch for batch."""
    rule = make_rule("joined")
    trained = TrainedRule(rule, rule.init(torch.Generator().manual_seed(1)), {})
    copies = Copies(tiny_task, [4, 9])
    stepper = RuleStepper(rule, trained.weights, copies.theta, copies.layout)
    rolled = roll(copies, stepper, 8)[:, 1]
    generator = torch.Generator().manual_seed(9)
    params, buffers = tiny_task.init(generator)
    module = tiny_task.module(params, buffers)
    optimizer = LearnedOptimizer(module.parameters(), trained)
    losses = []
    for _ in range(8):
        inputs, targets = tiny_task.batch(generator, "train")
        loss = nn.functional.cross_entropy(module(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(rolled, torch.stack(losses), rtol=1e-9, atol=0)


class Normalised(torch.optim.SGD):
    """Couples a tensor's coordinates: the step has length lr."""

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = param.grad / param.grad.norm()
        return super().step(closure)


def test_an_optimizer_that_couples_coordinates_gets_each_copys_own_tensors(tiny_task):
    def losses(seeds: list[int]) -> torch.Tensor:
        copies = Copies(tiny_task, seeds)
        stepper = TorchStepper(lambda p: Normalised(p, lr=0.1), copies.theta, copies.layout)
        return roll(copies, stepper, 5)

    torch.testing.assert_close(losses([1, 2])[:, 1], losses([2])[:, 0], rtol=1e-10, atol=0)


def test_restarting_one_copy_leaves_the_others(tiny_task):
    copies = Copies(tiny_task, [1, 2])
    rule = make_rule("joined")
    stepper = RuleStepper(rule, rule.init(), copies.theta, copies.layout)
    roll(copies, stepper, 3)
    theta, moments = copies.theta.clone(), stepper.state["exp_avg"].clone()
    copies.restart(0)
    stepper.restart(0, copies.theta)
    assert torch.equal(copies.theta[1], theta[1])
    assert not torch.equal(copies.theta[0], theta[0])
    assert torch.equal(stepper.state["exp_avg"][1], moments[1])
    assert bool((stepper.state["exp_avg"][0] == 0).all())
    assert stepper.state["step"].flatten().tolist() == [0, 3]
    size = copies.layout.total
    assert bool((stepper.carry["h0"][:, :size] == 0).all())
    assert bool((stepper.carry["h0"][:, size:] != 0).any())


def test_layout_round_trip(tiny_task):
    params, _ = tiny_task.init(torch.Generator().manual_seed(0))
    layout = Layout.of(params)
    views = layout.views(layout.flatten(params))
    assert all(torch.equal(views[key], params[key]) for key in params)
    assert layout.total == 53


@pytest.mark.parametrize("stacking", ["vmap", "loop"])
def test_batch_norm_buffers_move_as_in_a_module(stacking):
    generator = torch.Generator().manual_seed(0)
    data = (torch.randn(40, 4, generator=generator), torch.randn(40, 2, generator=generator))

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.0), nn.Linear(3, 2))

    task = ModuleTask(make, nn.functional.mse_loss, data, batch_size=8, stacking=stacking)
    copies = Copies(task, [1, 2])
    roll(copies, lambda theta, grad: None, 3)
    assert copies.buffers["1.num_batches_tracked"].tolist() == [3, 3]
    generator = torch.Generator().manual_seed(1)
    module = task.module(*task.init(generator)).train()
    for _ in range(3):
        module(task.batch(generator, "train")[0])
    torch.testing.assert_close(
        copies.buffers["1.running_mean"][0], dict(module.named_buffers())["1.running_mean"]
    )


@pytest.mark.parametrize("stacking", ["vmap", "loop"])
def test_dropout_is_drawn_from_the_copies_seeds(stacking):
    data = (torch.ones(20, 4), torch.ones(20, 1))

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1))

    task = ModuleTask(make, nn.functional.mse_loss, data, batch_size=4, stacking=stacking)

    def losses(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)  # must not matter
        copies = Copies(task, [1, 2])
        return roll(copies, lambda theta, grad: None, 3)

    assert torch.equal(losses(0), losses(1))
    assert len(losses(0)[:, 0].unique()) == 3


def test_quadratic_gradients_are_the_formula():
    task = Quadratic(4, dtype=torch.float64)
    copies = Copies(task, [1, 2])
    copies.theta += 0.3
    losses, grads = copies.gradients(copies.batches("train"))
    W, y = copies.buffers["W"], copies.buffers["y"]
    residual = torch.einsum("cij,cj->ci", W, copies.theta) - y
    torch.testing.assert_close(losses, residual.square().sum(1))
    torch.testing.assert_close(grads, 2 * torch.einsum("cij,ci->cj", W, residual))


def test_optimizees_of_half_precision_are_refused():
    copies = Copies(make_tiny_task(dtype=torch.bfloat16), [0])
    with pytest.raises(ValueError, match="trained in float32 or float64, not"):
        RuleStepper(make_rule("joined"), {}, copies.theta, copies.layout)
