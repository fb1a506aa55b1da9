"""Tuning a baseline's rate on seeds of its own, over a grid that widens while its edge wins."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stepsmith.evaluate.baselines import Baseline
from stepsmith.evaluate.records import Key, Records
from stepsmith.evaluate.statistics import score
from stepsmith.rules.base import require_count, require_kind, require_number

CRITERIA = ("mean", "final")
"""Mean loss over the horizon, and over its last tenth."""

FACTOR = 2.0
"""Ratio of neighbouring rates."""

NARROW = 3
"""Rates of a first grid around a rate that is known to be good."""

WIDEST = 24
"""Rates tried before the grid stops widening, and says so."""


@dataclass(frozen=True)
class Tuned:
    """The best rate of each criterion.

    Attributes:
        rates: criterion -> rate.
        tried: all rates, ascending.
        at_edge: criteria whose best rate is still an edge of the widest grid.
    """

    baseline: Baseline
    rates: dict[str, float]
    tried: list[float]
    at_edge: tuple[str, ...]


def tune(
    baseline: Baseline,
    run: Callable[[Baseline, float], np.ndarray],
    records: Records,
    key: Key,
    seeds: Sequence[int],
    *,
    points: int = 9,
    factor: float = FACTOR,
    around: float | None = None,
) -> Tuned:
    """Find the best rate for each criterion.

    Args:
        baseline: what to tune.
        run: trains with a rate and returns (S, T) losses.
        records: gets every run, with purpose `tuning`.
        key: of the records, without the optimizer's fields.
        seeds: the tuning seeds `run` uses.
        points: rates of the first grid, at least 9.
        factor: ratio of neighbouring rates.
        around: the optimum of a like problem (another horizon), where one is known: the first grid
            is then `NARROW` rates around it, whatever `points` says.

    Raises:
        ValueError: fewer than 9 points, a factor not above 1, or a rate not above 0.
        TypeError: an argument of another type.
    """
    require_kind("tune", "baseline", baseline, Baseline)
    points = require_count("tune", "points", points, least=-(2**31))
    factor = require_number("tune", "factor", factor)
    if points < 9 or factor <= 1:
        raise ValueError(f"tune: needs points >= 9 and factor > 1, got {points} and {factor}")
    first = baseline.grid(points, factor)
    if around is not None:
        first = replace(baseline, centre=around).grid(NARROW, factor)
    scores: dict[float, dict[str, float]] = {}

    def measure(rate: float) -> None:
        rate = rounded(rate)
        losses_ST = _four_digits(run(baseline, rate))
        scores[rate] = _scores(losses_ST)
        own = replace(
            key, purpose="tuning", optimizer=baseline.name, kind="baseline",
            hyper_parameters=json.dumps(hyper_parameters(baseline, rate)),
        )  # fmt: skip
        steps = range(losses_ST.shape[1])
        records.add(own, "train_loss", losses_ST, seeds=seeds, steps=steps, split="train")

    for rate in first:
        measure(rate)
    while len(scores) < WIDEST:
        winners = {_best(scores, criterion) for criterion in CRITERIA}
        if max(scores) in winners:
            measure(max(scores) * factor)
        elif min(scores) in winners:
            measure(min(scores) / factor)
        else:
            break
    return _tuned(baseline, scores)


def tuned_from(baseline: Baseline, records: Records) -> Tuned:
    """What `tune` returned, from the tuning runs it recorded."""
    runs = records.select("train_loss", purpose="tuning", optimizer=baseline.name)
    return _tuned(baseline, {run.key.parameters["lr"]: _scores(run.values) for run in runs})


def _four_digits(losses_ST: np.ndarray) -> np.ndarray:
    """Tuning runs to four digits: they are most of what a record holds, and only rank rates."""
    mantissa_ST, exponent_ST = np.frexp(losses_ST)
    return np.ldexp(np.round(mantissa_ST * 2**13) / 2**13, exponent_ST)


def _scores(losses_ST: np.ndarray) -> dict[str, float]:
    return {c: float(score(losses_ST, c).mean()) for c in CRITERIA}


def _best(scores: dict[float, dict[str, float]], criterion: str) -> float:
    return min(scores, key=lambda rate: (scores[rate][criterion], rate))


def _tuned(baseline: Baseline, scores: dict[float, dict[str, float]]) -> Tuned:
    edges = (min(scores), max(scores))
    rates = {criterion: _best(scores, criterion) for criterion in CRITERIA}
    return Tuned(
        baseline, rates, sorted(scores), tuple(c for c, rate in rates.items() if rate in edges)
    )


def rounded(rate: float) -> float:
    """A rate to 6 digits, as optimizers get it and records show it."""
    return round(rate, 5 - math.floor(math.log10(rate)))


def hyper_parameters(baseline: Baseline, rate: float) -> dict[str, Any]:
    """The rate, to 6 digits, and the fixed arguments."""
    return {"lr": rounded(rate), **baseline.fixed}
