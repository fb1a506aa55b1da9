"""Successive halving of rates."""

from __future__ import annotations

import itertools
import math

import pytest

from stepsmith.evaluate.halving import MOST, WIDEST, Rung, halve


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
        {"centre": math.inf}, {"factor": math.inf}, {"centre": math.nan},
    ],
)  # fmt: skip
def test_refused_halvings(change):
    with pytest.raises(ValueError, match="halve: "):
        halve(lambda rate, share: rate, **{"centre": 1.0, **change})


def test_where_no_rate_ends_there_is_no_best():
    with pytest.raises(ValueError, match=r"halve: no score was finite.*another centre than 0.1"):
        halve(lambda rate, share: math.nan, 0.1)
    late = halve(lambda rate, share: rate if share == 1 else math.inf, 1.0)
    assert late.rate > 0
