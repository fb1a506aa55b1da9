"""Schedules of rates."""

from __future__ import annotations

import math

import pytest
import torch

from stepsmith.evaluate.schedules import Schedule, Scheduled, scheduled


def rates_of(schedule: Schedule, steps: int, lr: float = 0.4) -> list[float]:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = scheduled(lambda p: torch.optim.SGD(p, lr=lr), schedule, steps)([param])
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        param.grad = torch.ones(2)
        optimizer.step()
    return seen


def test_rates_drop_at_their_shares():
    seen = rates_of(Schedule("steps", (0.5, 0.75)), 8)
    assert seen == pytest.approx([0.4] * 4 + [0.04] * 2 + [0.004] * 2)


def test_a_cosine_falls_to_zero():
    seen = rates_of(Schedule("cosine"), 10)
    assert seen == pytest.approx([0.2 * (1 + math.cos(math.pi * t / 10)) for t in range(10)])


def test_a_constant_rate_and_a_scheduled_baseline():
    assert rates_of(Schedule(), 3) == [0.4] * 3
    entry = Scheduled("mine", torch.optim.SGD, 0.1, {"momentum": 0.9}, Schedule("steps", (0.5,)))
    optimizer = entry.at(0.2, 2)([torch.nn.Parameter(torch.ones(1))])
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert optimizer.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize(
    "arguments",
    [
        ("linear",),
        ("steps", (0.5, 0.5)),
        ("steps", (0.0,)),
        ("steps", (0.5, 1.0)),
        ("steps", (math.nan,)),
        ("cosine", (0.5, 0.7)),
        ("constant", (0.5,)),
        ("steps", (0.5,), -3.0),
    ],
)
def test_refused_schedules(arguments):
    with pytest.raises(ValueError, match=r"Schedule: (kind must be|drops must rise|drops belong)"):
        Schedule(*arguments)
