"""Schedules and successive halving."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from stepsmith.evaluate.halving import MOST, WIDEST, Rung, halve
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
        ("cosine", (0.5, 0.7)),
        ("constant", (0.5,)),
        ("steps", (0.5,), -3.0),
    ],
)
def test_refused_schedules(arguments):
    with pytest.raises(ValueError, match=r"Schedule: (kind must be|drops must rise|drops belong)"):
        Schedule(*arguments)


def test_halving_drops_the_worse_and_trains_the_rest_longer():
    trained = []

    def run(rate, share):
        trained.append((rate, share))
        # Early on the highest rate looks best, in the end the one before it.
        return -rate if share < 1 else abs(rate - 1.0)

    rungs = (Rung(0.25, 3), Rung(1.0, 2))
    found = halve(lambda r, s: run(r, s) if r <= 2 else math.nan, 1.0, rungs=rungs)
    assert found.rate == 1.0
    # Two came through; of the best both neighbours are tried.
    assert [rate for rate, share in trained if share == 1.0] == [2.0, 1.0, 0.5]
    assert found.scores[4.0, 0.25] == math.inf
    assert not found.at_edge


def test_a_rate_that_wins_late_has_its_neighbours_tried_over_the_whole_training():
    rungs = (Rung(0.5, 3), Rung(1.0, 2))
    found = halve(lambda r, s: abs(r - (1.0 if s < 1 else 4.0)), 1.0, rungs=rungs)
    assert found.rate == 4.0
    assert not found.at_edge
    assert {rate for rate, share in found.scores if share == 1} == {0.5, 1.0, 2.0, 4.0, 8.0}
    endless = halve(lambda r, s: abs(r - 1.0) if s < 1 else -r, 1.0, rungs=rungs)
    assert endless.at_edge
    assert sum(share == 1 for _, share in endless.scores) == MOST


def test_a_grid_widens_while_its_edge_wins_and_says_where_it_stopped():
    assert halve(lambda rate, share: abs(math.log(rate / 40)), 0.5).rate == 32.0
    tried = {rate for rate, _ in halve(lambda rate, share: rate, 0.05).scores}
    ordered = sorted(tried)
    assert all(b / a > 1.9 for a, b in itertools.pairwise(ordered))  # no rate twice, rounded
    endless = halve(lambda rate, share: -rate, 1.0)
    assert endless.at_edge
    assert len({rate for rate, share in endless.scores if share < 0.2}) == WIDEST


@pytest.mark.parametrize(
    "change",
    [
        {"rungs": (Rung(0.5, 3), Rung(0.25, 2))}, {"rungs": (Rung(0.5, 3),)},
        {"rungs": (Rung(0.5, 2), Rung(1.0, 3))}, {"rungs": ()},
        {"rungs": (Rung(0.0, 3), Rung(1.0, 2))}, {"centre": 0.0}, {"factor": 1.0},
    ],
)  # fmt: skip
def test_refused_halvings(change):
    with pytest.raises(ValueError, match="halve: "):
        halve(lambda rate, share: rate, **{"centre": 1.0, **change})
