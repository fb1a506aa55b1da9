"""Section 5.1: what meta-training costs, and after how many trainings it is repaid.

Shape letters: M = measured optimizees, K = terms of a cost.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from stepsmith.evaluate import BASELINES
from stepsmith.evaluate.cost import seconds_per_step
from stepsmith.evaluate.statistics import summarise
from stepsmith.hub import TrainedRule
from stepsmith.meta import MetaTrainConfig
from stepsmith.meta.trainer import Run
from stepsmith.optim import LearnedOptimizer
from stepsmith.recipes.paper_a.rules import learned
from stepsmith.recipes.study import Recipe, Study
from stepsmith.report.break_even import break_even
from stepsmith.tasks import Task

RULES = ("mlp-mnist", "convnet-mnist", "convnet-fashion_mnist")
TASKS = (
    "mlp-mnist", "mlp-fashion_mnist", "convnet-mnist", "convnet5x5-mnist",
    "convnet-sigmoid-mnist", "convnet-fashion_mnist",
)  # fmt: skip
FITTED = ("mlp20-relu", "mlp64-relu", "mlp128x128-relu", "mlp256x256-relu", "mlp400-relu")
"""Networks, on MNIST, whose costs the model is fitted to, at each of `BATCHES`."""
BATCHES = (32, 128, 512)
HELD_OUT = ("mlp200x100-relu", 256)
"""The optimizee outside the fit, and its batch size."""
TOLERANCE = 0.2


@dataclass(frozen=True)
class Costs:
    """Seconds of one optimizee.

    Attributes:
        parameters, batch: P, and examples of a batch.
        gradient: of a gradient.
        rule, baseline: of a step of the learned rule, and of the baseline.
        meta: of an inner step of meta-training, everything counted.
    """

    parameters: int
    batch: int
    gradient: float
    rule: float
    baseline: float
    meta: float


def measure(study: Study, network: str, batch: int, trained: TrainedRule) -> Costs:
    """Time one optimizee: medians, the rule and Adam in turn."""
    task = study.task(f"{network}-mnist", batch_size=batch)
    rounds = max(3, study.scale.timing_rounds)
    make = {
        "rule": partial(LearnedOptimizer, rule=trained),
        "adam": partial(torch.optim.Adam, lr=1e-3),
    }
    times = seconds_per_step(task, make, rounds=rounds)
    gradient = statistics.median(part for pairs in times.values() for _, part in pairs)
    steps = {
        name: statistics.median(whole - part for whole, part in pairs)
        for name, pairs in times.items()
    }
    parameters = sum(value.numel() for value in task.init(torch.Generator())[0].values())
    meta = meta_seconds(task, trained, rounds)
    return Costs(parameters, batch, gradient, steps["rule"], steps["adam"], meta)


def meta_seconds(task: Task, trained: TrainedRule, rounds: int, steps: int = 20) -> float:
    """Median seconds of an inner step of meta-training, one copy, windows of `steps`."""
    config = MetaTrainConfig(steps=1, horizon=steps, copies=1, samples=steps * 400)
    run = Run([task], trained, config)
    taken = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        run.window()
        taken.append((time.perf_counter() - begun) / steps)
    return statistics.median(taken[1:])  # the first compiles


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
    """seconds = coefficients . terms, for a gradient, both steps and an inner step."""

    coefficients: dict[str, list[float]]

    @classmethod
    def fit(cls, measured: Sequence[Costs]) -> CostModel:
        """Non-negative least squares of the relative error."""
        found = {}
        for name in _terms(measured[0]):
            seconds_M = np.array([getattr(costs, name) for costs in measured])
            terms_MK = np.array([_terms(costs)[name] for costs in measured]) / seconds_M[:, None]
            found[name] = _nonnegative(terms_MK, np.ones(len(measured)))
        return cls(found)

    def seconds(self, parameters: int, batch: int) -> Costs:
        """The prediction for an optimizee of so many parameters at a batch size."""
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
    costs: Costs, *, rule_steps: float, baseline_steps: float, meta_steps: float
) -> float | None:
    """Trainings until meta-training is repaid; None where a training by the rule takes longer.

    Args:
        costs: of the optimizee.
        rule_steps, baseline_steps: steps to the baseline's final loss.
        meta_steps: inner steps of meta-training.
    """
    saved = baseline_steps * (costs.gradient + costs.baseline)
    saved -= rule_steps * (costs.gradient + costs.rule)
    return meta_steps * costs.meta / saved if saved > 0 else None


def price(study: Study) -> None:
    """Costs of all pairs, the model, its test, and what follows from it."""
    rules = {f"learned ({name})": learned(study, name) for name in RULES}
    for name in TASKS:
        study.compare(study.task(name), rules, BASELINES, timing=True)
    study.findings["pairs"] = break_even(summarise(study.records), study.records)
    trained = learned(study, "mlp-mnist")
    study.say("timing the optimizees of the cost model")
    measured = [measure(study, net, batch, trained) for net in FITTED for batch in BATCHES]
    model = CostModel.fit(measured)
    truth = measure(study, *HELD_OUT, trained)
    study.findings["cost_model"] = {
        "coefficients": model.coefficients, "fitted_to": [asdict(costs) for costs in measured],
        "held_out": _held_out(model, truth), "repaid_after": _pays(study, model),
    }  # fmt: skip


def _held_out(model: CostModel, truth: Costs) -> dict[str, Any]:
    """Measured and predicted seconds of the optimizee outside the fit, and whether all agree."""
    predicted = model.seconds(truth.parameters, truth.batch)
    wholes = {
        "rule's training step": (predicted.gradient + predicted.rule, truth.gradient + truth.rule),
        "baseline's training step": (
            predicted.gradient + predicted.baseline, truth.gradient + truth.baseline,
        ),
        "inner step of meta-training": (predicted.meta, truth.meta),
    }  # fmt: skip
    errors = {name: guess / real - 1 for name, (guess, real) in wholes.items()}
    return {
        "optimizee": f"{HELD_OUT[0]}-mnist, batch {HELD_OUT[1]}", "measured": asdict(truth),
        "predicted": asdict(predicted), "relative_errors": errors,
        "within_tolerance": all(abs(error) <= TOLERANCE for error in errors.values()),
    }  # fmt: skip


def _pays(study: Study, model: CostModel) -> list[dict[str, Any]]:
    """Trainings until repaid by size, batch and horizon, at the MLP's measured saving of steps."""
    pair = next(
        entry for entry in study.findings["pairs"]
        if entry["task"] == "mlp-mnist" and entry["optimizer"] == "learned (mlp-mnist)"
    )  # fmt: skip
    if pair["steps"] is None or pair["baseline_steps"] is None:
        return []
    share = pair["steps"] / pair["baseline_steps"]
    found = []
    for parameters in (10_000, 100_000, 1_000_000, 10_000_000):
        for batch in (32, 128, 512, 2048):
            for horizon in (100, 1000, 10_000):
                repaid = trainings(
                    model.seconds(parameters, batch), rule_steps=share * horizon,
                    baseline_steps=horizon, meta_steps=3000 * horizon,
                )  # fmt: skip
                found.append(
                    {
                        "parameters": parameters, "batch": batch, "horizon": horizon,
                        "share_of_steps": share, "trainings": repaid,
                    }
                )  # fmt: skip
    return found


RECIPES = (
    Recipe("a9-price", "what meta-training costs, and when it is repaid (section 5.1)", price),
)
