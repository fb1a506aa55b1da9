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

CRITERIA = ("mean", "final")
"""Mean loss over the horizon, and over its last tenth."""

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
    factor: float = 2.0,
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

    Raises:
        ValueError: fewer than 9 points, or a factor not above 1.
    """
    if points < 9 or factor <= 1:
        raise ValueError(f"tune: needs points >= 9 and factor > 1, got {points} and {factor}")
    scores: dict[float, dict[str, float]] = {}

    def measure(rate: float) -> None:
        losses_ST = run(baseline, rate)
        scores[rate] = {c: float(score(losses_ST, c).mean()) for c in CRITERIA}
        own = replace(
            key, purpose="tuning", optimizer=baseline.name, kind="baseline",
            hyper_parameters=json.dumps(hyper_parameters(baseline, rate)),
        )  # fmt: skip
        steps = range(losses_ST.shape[1])
        records.add(own, "train_loss", losses_ST, seeds=seeds, steps=steps, split="train")

    def best(criterion: str) -> float:
        return min(scores, key=lambda rate: (scores[rate][criterion], rate))

    for rate in baseline.grid(points, factor):
        measure(rate)
    while len(scores) < WIDEST:
        winners = {best(criterion) for criterion in CRITERIA}
        if max(scores) in winners:
            measure(max(scores) * factor)
        elif min(scores) in winners:
            measure(min(scores) / factor)
        else:
            break
    edges = (min(scores), max(scores))
    return Tuned(
        baseline,
        {criterion: best(criterion) for criterion in CRITERIA},
        sorted(scores),
        tuple(criterion for criterion in CRITERIA if best(criterion) in edges),
    )


def hyper_parameters(baseline: Baseline, rate: float) -> dict[str, Any]:
    """The rate, to 6 digits, and the fixed arguments."""
    digits = 5 - math.floor(math.log10(rate))
    return {"lr": round(rate, digits), **baseline.fixed}
