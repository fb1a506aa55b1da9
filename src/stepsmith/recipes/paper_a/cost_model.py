"""A model of what steps and meta-training cost an optimizee, linear in its size and its work.

Shape letters: M = measured optimizees, K = terms of a cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Costs:
    """Seconds of one optimizee.

    Attributes:
        parameters, batch: P, and examples of a batch.
        gradient: of a gradient.
        rule, baseline: of a step of the learned rule, and of the baseline.
        meta: of an inner step of meta-training, its share of the validations included.
    """

    parameters: int
    batch: int
    gradient: float
    rule: float
    baseline: float
    meta: float


def _terms(costs: Costs) -> dict[str, list[float]]:
    """What each cost is taken to be linear in; nothing is negative."""
    size, work = costs.parameters, costs.parameters * costs.batch
    return {
        "gradient": [1.0, float(size), float(work), float(costs.batch)],
        "rule": [1.0, float(size)],
        "baseline": [1.0, float(size)],
        "meta": [1.0, float(size), float(work), float(costs.batch)],
    }


@dataclass(frozen=True)
class CostModel:
    """seconds = coefficients . terms, for a gradient, both steps and an inner step.

    Attributes:
        coefficients: by cost.
        sizes, batches: the least and the largest it was fitted to, inclusive.
    """

    coefficients: dict[str, list[float]]
    sizes: tuple[int, int]
    batches: tuple[int, int]

    @classmethod
    def fit(cls, measured: Sequence[Costs]) -> CostModel:
        """Non-negative least squares of the relative error."""
        found = {}
        for name in _terms(measured[0]):
            seconds_M = np.array([getattr(costs, name) for costs in measured])
            terms_MK = np.array([_terms(costs)[name] for costs in measured]) / seconds_M[:, None]
            found[name] = _nonnegative(terms_MK, np.ones(len(measured)))
        sizes = [costs.parameters for costs in measured]
        batches = [costs.batch for costs in measured]
        return cls(found, (min(sizes), max(sizes)), (min(batches), max(batches)))

    def covers(self, parameters: int, batch: int) -> bool:
        """Whether an optimizee lies within what the model was fitted to."""
        inside = self.sizes[0] <= parameters <= self.sizes[1]
        return inside and self.batches[0] <= batch <= self.batches[1]

    def seconds(self, parameters: int, batch: int) -> Costs:
        """The prediction for an optimizee of so many parameters at a batch size.

        Raises:
            ValueError: outside what the model was fitted to.
        """
        if not self.covers(parameters, batch):
            raise ValueError(
                f"cost model: {parameters:,} parameters in batches of {batch} lie outside what it "
                f"was fitted to, {self.sizes[0]:,} to {self.sizes[1]:,} in batches of "
                f"{self.batches[0]} to {self.batches[1]}; measure such an optimizee too"
            )
        terms = _terms(Costs(parameters, batch, 0, 0, 0, 0))
        values = {name: float(np.dot(self.coefficients[name], terms[name])) for name in terms}
        return Costs(parameters, batch, **values)


def _nonnegative(terms_MK: np.ndarray, wanted_M: np.ndarray) -> list[float]:
    """Least squares with coefficients >= 0: the best of all subsets of the few terms."""
    count = terms_MK.shape[1]
    scale_K = np.abs(terms_MK).max(0)
    best, least = np.zeros(count), float("inf")
    for subset in range(1, 2**count):
        chosen = [k for k in range(count) if subset >> k & 1]
        solved, *_ = np.linalg.lstsq(terms_MK[:, chosen] / scale_K[chosen], wanted_M, rcond=None)
        error = float(np.square(terms_MK[:, chosen] / scale_K[chosen] @ solved - wanted_M).sum())
        if (solved >= 0).all() and error < least:
            best, least = np.zeros(count), error
            best[chosen] = solved / scale_K[chosen]
    return [float(value) for value in best]


def trainings(
    costs: Costs, *, rule_steps: float | None, baseline_steps: float | None, meta_steps: int
) -> float | None:
    """Trainings until meta-training is repaid; None where a training by the rule takes longer.

    Args:
        costs: of the optimizee.
        rule_steps, baseline_steps: steps to the baseline's final loss; None is never.
        meta_steps: inner steps of meta-training.
    """
    if rule_steps is None or baseline_steps is None:
        return None
    saved = baseline_steps * (costs.gradient + costs.baseline)
    saved -= rule_steps * (costs.gradient + costs.rule)
    return meta_steps * costs.meta / saved if saved > 0 else None
