"""Tuning where full trainings are dear: successive halving of the rates.

Source: Jamieson & Talwalkar 2016, arXiv:1502.07943.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from stepsmith.evaluate.tuning import FACTOR, rounded
from stepsmith.rules.base import require_count, require_kind, require_number, set_checked

Run = Callable[[float, float], float]
"""A rate and a share of the training to its score, lower is better."""


@dataclass(frozen=True)
class Rung:
    """A share of the training, and how many rates are tried over it.

    Raises:
        ValueError: numbers that are not finite, or rates that are not whole.
        TypeError: no numbers.
    """

    share: float
    rates: int

    def __post_init__(self):
        set_checked(
            self,
            share=require_number("Rung", "share", self.share),
            rates=require_count("Rung", "rates", self.rates, least=0),
        )


RUNGS = (Rung(1 / 6, 5), Rung(1 / 2, 3), Rung(1.0, 2))
WIDEST = 15
"""Rates tried on the first rung before its grid stops widening."""
CLOSE = 1e-3
"""Rates closer than this are one."""
MOST = 6
"""Rates tried over the whole training before it stops there, and says so."""


@dataclass(frozen=True)
class Halved:
    """What was tried.

    Attributes:
        rate: the best over the whole training.
        scores: (rate, share of the training) -> score.
        at_edge: whether a neighbour of it was not tried over the whole training.
    """

    rate: float
    scores: dict[tuple[float, float], float]
    at_edge: bool


def halve(
    run: Run,
    centre: float,
    *,
    rungs: tuple[Rung, ...] = RUNGS,
    factor: float = FACTOR,
) -> Halved:
    """The rate whose whole training ends best, the worse ones dropped after a part of it.

    The first rung's grid widens while its edge wins. On the last, the neighbours of the best rate
    are tried too, until both do worse than it: what is best over a part need not be over all.

    Args:
        run: trains with a rate for a share of the training, its schedule drawn together to that
            share. A score that is not finite is worse than any other.
        centre: middle of the first grid.
        rungs: growing shares, the last 1, and falling numbers of rates.
        factor: ratio of neighbouring rates.

    Raises:
        ValueError: rungs that do not grow to 1 or do not shrink in number, or a centre or factor
            out of range; or no rate whose score over the whole training is finite.
        TypeError: an argument of another type.

    >>> found = halve(lambda rate, share: abs(rate - 2.0) / share, 0.25)
    >>> found.rate, found.at_edge, len(found.scores)
    (2.0, False, 13)
    """
    require_kind("halve", "run", run, Callable, "it trains with a rate for a share")
    require_kind("halve", "rungs", rungs, tuple | list, "of Rung")
    for rung in rungs:
        require_kind("halve", "each of rungs", rung, Rung)
    centre = require_number("halve", "centre", centre)
    factor = require_number("halve", "factor", factor)
    shares, counts = [r.share for r in rungs], [r.rates for r in rungs]
    grows = bool(rungs) and shares == sorted(set(shares)) and shares[0] > 0 and shares[-1] == 1
    if not grows or counts != sorted(counts, reverse=True):
        raise ValueError(f"halve: rungs must grow to a share of 1 with ever fewer rates: {rungs}")
    if not 0 < centre < math.inf or not 1 < factor < math.inf or counts[-1] < 1:
        raise ValueError(
            f"halve: needs centre > 0, factor > 1 and rates; got {centre}, {factor}, {counts}"
        )
    scores: dict[tuple[float, float], float] = {}

    def measure(rate: float, share: float) -> float:
        value = run(rate, share)
        scores[rate, share] = value if math.isfinite(value) else math.inf
        return scores[rate, share]

    first = rungs[0]
    grid = [rounded(centre * factor ** (i - first.rates // 2)) for i in range(first.rates)]
    level = {rate: measure(rate, first.share) for rate in grid}
    while len(level) < WIDEST:
        best = min(level, key=lambda rate: (level[rate], rate))
        if best == max(level):
            new = rounded(best * factor)
        elif best == min(level):
            new = rounded(best / factor)
        else:
            break
        level[new] = measure(new, first.share)
    for rung in rungs[1:]:
        kept = sorted(level, key=lambda rate: (level[rate], rate))[: rung.rates]
        level = {rate: measure(rate, rung.share) for rate in kept}
    while True:
        best = min(level, key=lambda rate: (level[rate], rate))
        around = [rounded(best / factor), rounded(best * factor)]
        # Rounded twice, one rate may have two last digits.
        new = [
            rate
            for rate in around
            if not any(math.isclose(rate, old, rel_tol=CLOSE) for old in level)
        ]
        if not new or len(level) >= max(MOST, rungs[-1].rates):
            if math.isinf(level[best]):
                raise ValueError(
                    f"halve: no score was finite, at none of the rates from {min(level)} to "
                    f"{max(level)} over the whole training; try another centre than {centre}"
                )
            return Halved(best, scores, at_edge=bool(new))
        level[new[0]] = measure(new[0], rungs[-1].share)
