"""Finite gradients, clipped gradients and starts that no rule was made for."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stepsmith import LearnedOptimizer

BUNDLED = ("quadratic", "mlp-mnist", "mlp-mnist-1000", "convnet-mnist", "general-warmed")
every_rule = pytest.mark.parametrize("rule", BUNDLED)


def network(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for here, there in itertools.pairwise(widths):
        layers += [nn.Linear(here, there), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(256, 16, generator=generator)
    return x, (x @ torch.randn(16, 4, generator=generator)).argmax(1)


def train(module, optimizer, steps: int, scales=None) -> list[float]:
    """Losses of a training whose loss at each step is multiplied as `scales` say."""
    x, y = problem()
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), y)
        (loss * (1.0 if scales is None else scales(step))).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@every_rule
@pytest.mark.parametrize("value", [1e37, -1e37, 1e-8, 1e-30, 1e-45])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_absurd_gradients_make_no_absurd_steps(rule, value, steps):
    for start in (torch.ones(3), torch.full((4, 5), 0.1)):
        param = nn.Parameter(start.clone())
        optimizer = LearnedOptimizer([param], rule)
        for _ in range(steps):
            param.grad = torch.full_like(param, value)
            optimizer.step()
        assert bool(param.isfinite().all())
        assert float((param.detach() - start).abs().max()) <= 10 * steps * float(start.max())


@pytest.mark.parametrize("rule", BUNDLED[1:])
@pytest.mark.parametrize(
    ("scale", "spoilt"),
    # Two in a row of 1e4 are taken for the loss's own size.
    [*((scale, 1) for scale in (0.0, 1e-12, 1e-6, 1e4, 1e30)),
     *((scale, 2) for scale in (0.0, 1e-12, 1e-6, 1e30))],
)  # fmt: skip
def test_first_batches_that_were_no_measure_spoil_little(rule, scale, spoilt):
    scales = {**dict.fromkeys(range(spoilt), scale)}
    module = network(16, 32, 4)
    losses = train(
        module, LearnedOptimizer(module.parameters(), rule), 150, lambda t: scales.get(t, 1.0)
    )
    assert max(losses) < 10 * losses[0]
    assert losses[-1] < 0.5 * losses[0]


@every_rule
def test_a_trained_network_is_not_ruined(rule):
    module = network(16, 64, 4)
    train(module, torch.optim.AdamW(module.parameters(), 1e-2), 400)
    x, y = problem()
    start = float(F.cross_entropy(module(x), y).detach())
    assert start < 0.02
    losses = train(module, LearnedOptimizer(module.parameters(), rule), 200)
    assert max(losses) < 10 * start
    assert losses[-1] <= 1.001 * start


@every_rule
@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_a_loss_in_other_units_is_not_ruined(rule, unit):
    module = network(16, 32, 4)
    losses = train(module, LearnedOptimizer(module.parameters(), rule), 200, lambda _: unit)
    assert max(losses) < 10 * losses[0]
    assert losses[-1] < losses[0] * 1.001


def moved(rule: str, clip, scale: float) -> float:
    """How far three steps of a fixed gradient go."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(6, 5))
    before = param.detach().clone()
    optimizer = LearnedOptimizer([param], rule)
    for seed in range(3):
        param.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) * scale
        clip(optimizer)
        optimizer.step()
    return float((param.detach() - before).norm())


@pytest.mark.parametrize("rule", BUNDLED[1:])
@pytest.mark.parametrize("largest", [1.0, 0.1, 1e-3])
def test_clipping_by_the_optimizer_makes_no_step_bolder(rule, largest):
    usual = moved(rule, lambda optimizer: None, 1.0)
    clipped = moved(rule, lambda optimizer: optimizer.clip_grad_norm_(largest), 1.0)
    assert clipped <= 1.3 * usual
    assert moved(rule, lambda optimizer: optimizer.clip_grad_norm_(1e9), 1.0) == usual


def test_clipping_clips_and_tells_the_norm():
    param, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = LearnedOptimizer([{"params": [param]}, {"params": [other]}], "mlp-mnist")
    param.grad, other.grad = torch.full((3,), 4.0), torch.full((2,), -3.0)
    whole = torch.cat([param.grad, other.grad]).norm()
    torch.testing.assert_close(optimizer.clip_grad_norm_(1.0), whole)
    torch.testing.assert_close(
        torch.cat([param.grad, other.grad]).norm(), torch.tensor(1.0), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("rule", BUNDLED[1:])
def test_saving_amid_a_training_changes_nothing(rule):
    module = network(16, 32, 4)
    optimizer = LearnedOptimizer(module.parameters(), rule)
    train(module, optimizer, 7)
    again = copy.deepcopy(module)
    resumed = LearnedOptimizer(again.parameters(), rule)
    resumed.load_state_dict(optimizer.state_dict())
    assert train(module, optimizer, 5) == train(again, resumed, 5)
