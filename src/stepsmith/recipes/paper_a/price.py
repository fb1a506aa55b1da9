"""Section 5.1: what meta-training costs, and after how many trainings it is repaid."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from stepsmith.evaluate import BASELINES, Records, summarise
from stepsmith.evaluate.cost import seconds_per_step
from stepsmith.evaluate.tuning import hyper_parameters
from stepsmith.hub import TrainedRule
from stepsmith.machine import machine
from stepsmith.optim import LearnedOptimizer
from stepsmith.recipes.paper_a import published
from stepsmith.recipes.paper_a.cost_model import CostModel, Costs, trainings
from stepsmith.recipes.paper_a.meta_cost import MetaCost, meta_cost
from stepsmith.recipes.paper_a.rules import learned, meta_tasks
from stepsmith.recipes.study import Recipe, Study
from stepsmith.report.break_even import break_even

RULES = ("mlp-mnist", "convnet-mnist", "convnet-fashion_mnist")
TASKS = (
    "mlp-mnist", "mlp-fashion_mnist", "convnet-mnist", "convnet5x5-mnist",
    "convnet-sigmoid-mnist", "convnet-fashion_mnist",
)  # fmt: skip
PUBLISHED = ("mlp-mnist", "convnet-mnist")
"""Tasks of the paper's own LSTMs, each meta-trained on the one it is priced on."""
MODELLED = "mlp-mnist"
"""The rule, and the task, that the cost model starts from."""
FITTED = ("mlp20-relu", "mlp64-relu", "mlp128x128-relu", "mlp256x256-relu", "mlp400-relu")
"""Networks, on MNIST, whose costs the model is fitted to, at each of `BATCHES`."""
BATCHES = (32, 128, 512)
HELD_OUT = ("mlp200x100-relu-mnist", 256)
"""The optimizee outside the fit, and its batch size."""
SIZES = (20_000, 50_000, 100_000, 200_000, 300_000)
"""Parameters that the model is asked about, within those of `FITTED`, and at each of `BATCHES`."""
TOLERANCE = 0.2
EPISODES = 5
"""Timed of each meta-training, and as many validations; fewer where a scale times fewer rounds."""


def price(study: Study) -> None:
    """Costs of all pairs, the model, its test, and what follows from it."""
    rules = {_label(name): learned(study, name) for name in RULES}
    for name in TASKS:
        study.compare(study.task(name), rules, BASELINES, timing=True)
    held_out = study.task(HELD_OUT[0], batch_size=HELD_OUT[1])
    modelled = rules[_label(MODELLED)]
    study.compare(held_out, {_label(MODELLED): modelled}, BASELINES, timing=True)
    for name in PUBLISHED:
        rule = learned(study, f"published-{name}")
        published.compare(study, name, {"LSTM": rule}, timing=True)
    study.findings["meta_training"] = time_again(study)
    study.findings["pairs"] = pairs = price_pairs(study.records)
    pair = _pair(pairs, MODELLED)
    study.say("timing the optimizees of the cost model")
    measured = [
        measure(study, f"{net}-mnist", batch, modelled, pair["against"])
        for net in FITTED for batch in BATCHES
    ]  # fmt: skip
    model = CostModel.fit(measured)
    truth = measure(study, *HELD_OUT, modelled, pair["against"])
    inner_steps = modelled.manifest["inner_steps"]
    study.findings["cost_model"] = {
        "baseline": pair["against"], "coefficients": model.coefficients,
        "fitted_to": [asdict(costs) for costs in measured],
        "held_out": judged(model, truth, pair, _pair(pairs, HELD_OUT[0]), inner_steps),
        **pays(model, pair, inner_steps),
    }  # fmt: skip


def _label(rule: str) -> str:
    return f"learned ({rule})"


def _pair(pairs: list[dict[str, Any]], task: str) -> dict[str, Any]:
    """What the modelled rule costs and saves on a task."""
    return next(
        entry for entry in pairs
        if entry["task"] == task and entry["optimizer"] == _label(MODELLED)
    )  # fmt: skip


def time_again(study: Study) -> list[dict[str, Any]]:
    """Time the meta-training of every rule on this machine, in its own configuration on its own
    task, and record it beside what it took when the rule was made.

    Returns:
        A dictionary for each rule.
    """
    found, costs = [], {}
    for name in (*RULES, *(f"published-{name}" for name in PUBLISHED)):
        study.say(f"timing the meta-training of {name}")
        trained = learned(study, name)
        cost = meta_cost(meta_tasks(study, name), trained, _episodes(study))
        costs[trained.fingerprint[:16]] = cost
        manifest = trained.manifest
        found.append(
            {
                "rule": name, "inner_steps": cost.inner_steps,
                "machine_when_made": manifest.get("machine"), "machine_here": machine(),
                "seconds_when_made": manifest["seconds"],
                "core_seconds_when_made": manifest.get("core_seconds"),
                "seconds_here": cost.whole.seconds, "core_seconds_here": cost.whole.core_seconds,
                "inner_step": cost.inner_step.seconds,
                "inner_step_without_validations": cost.step.seconds,
                "validation_step": cost.validation_step.seconds,
                "validation_share": cost.validation_share,
            }
        )  # fmt: skip
    record_again(study.records, costs)
    return found


def record_again(records: Records, costs: Mapping[str, MetaCost]) -> None:
    """Record what meta-training takes here, wherever there is what it once took.

    Args:
        records: added to.
        costs: by the checkpoint of the records' keys: rules may share a name.
    """
    for block in list(records.select("meta_training_seconds")):
        whole = costs[block.key.checkpoint].whole
        for unit, value in whole._asdict().items():
            records.add(block.key, f"meta_training_{unit}_here", [value], seeds=[0], steps=[0])


def price_pairs(records: Records) -> list[dict[str, Any]]:
    """`break_even` of each protocol, and what meta-training is to one training by the rule.

    Args:
        records: baselines of two protocols may share a name and a task; each is priced by the
            timings of its own.

    Returns:
        Its dictionaries, with `training_seconds` and `training_core_seconds` of one training over
        the whole horizon, and `meta_to_training` and `meta_to_training_cores`, the ratios of
        meta-training to it (None where processor time was not recorded).
    """
    found = []
    for protocol in dict.fromkeys(block.key.protocol for block in records.blocks):
        own = Records(list(records.select(protocol=protocol)))
        found += [entry | _one_training(entry, own) for entry in break_even(summarise(own), own)]
    return found


def _one_training(entry: dict[str, Any], records: Records) -> dict[str, Any]:
    about = {"task": entry["task"], "optimizer": entry["optimizer"], "purpose": "cost"}
    cores = [block.values for block in records.select("core_seconds_per_step", **about)]
    seconds = entry["horizon"] * entry["step_ms"] / 1e3
    core_seconds = entry["horizon"] * float(np.median(np.concatenate(cores)))
    meta_cores = entry["meta_core_seconds"]
    return {
        "training_seconds": seconds, "training_core_seconds": core_seconds,
        "meta_to_training": entry["meta_seconds"] / seconds,
        "meta_to_training_cores": None if meta_cores is None else meta_cores / core_seconds,
    }  # fmt: skip


def measure(study: Study, name: str, batch: int, trained: TrainedRule, against: str) -> Costs:
    """Time one optimizee: medians, the rule and a baseline in turn.

    Args:
        study: makes the task.
        name, batch: of the task, and examples of a batch.
        trained: the rule.
        against: the baseline's name; what it costs does not depend on its rate.
    """
    task = study.task(name, batch_size=batch)
    entry = BASELINES[against]
    make = {
        "rule": partial(LearnedOptimizer, rule=trained),
        "baseline": partial(entry.make, **hyper_parameters(entry, 1e-3)),
    }
    times = seconds_per_step(task, make, rounds=max(3, study.scale.timing_rounds))
    gradient = statistics.median(one.gradient for taken in times.values() for one in taken)
    steps = {
        who: statistics.median(one.whole - one.gradient for one in taken)
        for who, taken in times.items()
    }
    parameters = sum(value.numel() for value in task.init(torch.Generator())[0].values())
    meta = meta_cost([task], trained, _episodes(study)).inner_step.seconds
    return Costs(parameters, batch, gradient, steps["rule"], steps["baseline"], meta)


def _episodes(study: Study) -> int:
    return max(1, min(EPISODES, study.scale.timing_rounds))


def judged(
    model: CostModel,
    truth: Costs,
    pair: dict[str, Any],
    own: dict[str, Any],
    inner_steps: int,
) -> dict[str, Any]:
    """What the model says of the optimizee outside the fit, beside what was measured there.

    Args:
        model: fitted.
        truth: the optimizee's measured costs.
        pair: of `price_pairs`, of the rule on its own task: the steps that are predicted with.
        own: of the rule on the optimizee: the seconds measured there.
        inner_steps: of the rule's meta-training.

    Returns:
        `predictions`, each with its relative error and whether that is within the tolerance; of
        trainings None is never, and predicted rightly where it is measured too.
    """
    guess = model.seconds(truth.parameters, truth.batch)
    predicted = trainings(
        guess, rule_steps=pair["steps"], baseline_steps=pair["baseline_steps"],
        meta_steps=inner_steps,
    )  # fmt: skip
    measured = None
    if own["trainings"] is not None:
        saved = own["baseline_seconds"] - own["seconds"]
        measured = inner_steps * truth.meta / saved
    wholes = {
        "rule's training step, s": (guess.gradient + guess.rule, truth.gradient + truth.rule),
        "baseline's training step, s": (
            guess.gradient + guess.baseline, truth.gradient + truth.baseline,
        ),
        "inner step of meta-training, s": (guess.meta, truth.meta),
        "trainings until repaid": (predicted, measured),
    }  # fmt: skip
    return {
        "optimizee": f"{HELD_OUT[0]}, batch {HELD_OUT[1]}", "measured": asdict(truth),
        "predicted": asdict(guess), "against": own["against"],
        "steps": [own["steps"], own["baseline_steps"]],
        "predictions": {name: _held_against(*values) for name, values in wholes.items()},
    }  # fmt: skip


def _held_against(predicted: float | None, measured: float | None) -> dict[str, Any]:
    error = None if predicted is None or measured is None else predicted / measured - 1
    within = predicted == measured if error is None else abs(error) <= TOLERANCE
    return {"predicted": predicted, "measured": measured, "error": error, "within": within}


def pays(model: CostModel, pair: dict[str, Any], inner_steps: int) -> dict[str, Any]:
    """Trainings until repaid by size and batch, with what that takes for granted.

    Args:
        model: fitted to sizes and batches around those asked about.
        pair: of `price_pairs`, of the rule on its own task; its steps, at its horizon, are taken to
            be those of every optimizee.
        inner_steps: of the rule's meta-training.
    """
    steps, baseline_steps = pair["steps"], pair["baseline_steps"]
    found = [
        {
            "parameters": parameters, "batch": batch, "horizon": pair["horizon"],
            "trainings": trainings(
                model.seconds(parameters, batch), rule_steps=steps, baseline_steps=baseline_steps,
                meta_steps=inner_steps,
            ),
        }
        for parameters in SIZES for batch in BATCHES
    ]  # fmt: skip
    own, other = (
        f"more than {pair['horizon']}" if reached is None else f"{reached:.0f}"
        for reached in (steps, baseline_steps)
    )
    return {
        "assumption": (
            f"The share of steps saved is the MLP's: the rule takes {own} of {pair['horizon']} "
            f"steps to {pair['against']}'s final loss, {pair['against']} itself {other}."
        ),
        "range": (
            f"Predicted are only optimizees within the fit, {model.sizes[0]:,} to "
            f"{model.sizes[1]:,} parameters in batches of {model.batches[0]} to "
            f"{model.batches[1]}, and only the horizon of the MLP's measurement, {pair['horizon']} "
            f"steps; meta-training takes the rule's own {inner_steps:,} inner steps."
        ),
        "repaid_after": found,
    }  # fmt: skip


RECIPES = (
    Recipe("a9-price", "what meta-training costs, and when it is repaid (section 5.1)", price),
)
