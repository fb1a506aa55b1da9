"""Figures 1 to 8 of "Transferring Learned Optimizers", as published and corrected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from stepsmith.evaluate import BASELINES, Records
from stepsmith.evaluate.statistics import diverged
from stepsmith.hub import TrainedRule
from stepsmith.recipes.paper_a import published
from stepsmith.recipes.paper_a.horizons import longer
from stepsmith.recipes.paper_a.rules import learned
from stepsmith.recipes.study import Horizon, Recipe, Study
from stepsmith.tasks import Task


def corrected(
    study: Study,
    task_name: str,
    rules: Iterable[str],
    *,
    later: Iterable[str] = (),
    longest: bool = False,
    runs: int = 1,
    tuning: int = 1,
) -> None:
    """Rules and tuned baselines over the paper's horizon and ten times it (and a hundred times).

    At ten times, the runs that diverge are counted of the rules made for this task, out of as many
    as at the paper's horizon.

    Args:
        study: gets the records, and the finding `diverged`.
        task_name: of the task.
        rules: names of rules of `stepsmith.recipes.paper_a.rules`.
        later: further rules, for the longer horizons they were made for.
        longest: measure the longest horizon too.
        runs, tuning: factors on the runs (half of it at the longer horizons) and on the tuning
            runs, for tasks so cheap and so varied.
    """
    task = study.task(task_name)
    named = {f"learned ({name})": learned(study, name) for name in rules}
    first = study.compare(
        task, named, BASELINES, horizon=study.scale.first.times(runs, tuning), timing=True
    )
    if study.scale.long is not None:
        named |= {f"learned ({name})": learned(study, name) for name in later}
        wide = replace(study.scale.long, seeds=study.scale.first.seeds * runs)
        own = {label: rule for label, rule in named.items() if task.name in rule.manifest["tasks"]}
        if own:
            study.findings.setdefault("diverged", []).extend(_diverged(study, task, own, wide))
    found = first
    for horizon in (study.scale.long, study.scale.longest if longest else None):
        further = horizon and horizon.times(max(1, runs // 2), tuning)
        found = longer(study, task, named, found, further)


def _diverged(
    study: Study, task: Task, rules: Mapping[str, TrainedRule], horizon: Horizon
) -> list[dict[str, Any]]:
    """How many of a rule's runs diverge, by rule."""
    aside = replace(study, records=Records())  # they are counted, not shown beside the baselines
    runs = aside.compare(task, rules, (), horizon=horizon).records
    study.records.extend(Records(list(runs.select("core_seconds"))))
    return [
        {
            "task": task.name, "horizon": horizon.steps, "rule": block.key.optimizer,
            "diverged": int(diverged(block.values).sum()), "runs": len(block.values),
        }
        for block in runs.select("train_loss", purpose="test")
    ]  # fmt: skip


def halved(trained: TrainedRule) -> TrainedRule:
    """The rule with half its step multiplier, as the paper's small transfers silently had it."""
    rule = trained.rule
    half = replace(rule, step_scale=rule.config()["step_scale"] / 2)
    return replace(trained, rule=half)


def quadratic(study: Study) -> None:
    """Figure 1."""
    published.compare(study, "quadratic", {"LSTM": learned(study, "published-quadratic")})
    runs, tuning = (1, 1) if study.scale.name == "quick" else (6, 15)
    corrected(study, "quadratic", ["quadratic"], runs=runs, tuning=tuning)


def mlp(study: Study) -> None:
    """Figure 2."""
    published.compare(study, "mlp-mnist", {"LSTM": learned(study, "published-mlp-mnist")})
    corrected(study, "mlp-mnist", ["mlp-mnist"], later=["mlp-mnist-1000"], longest=True)


def convnet(study: Study) -> None:
    """Figure 3; the published curve of the MLP's rule shows the MLP."""
    published.compare(
        study, "convnet-mnist", {"LSTM": learned(study, "published-convnet-mnist")},
        others={"LSTM (MLP), on the MLP": (learned(study, "published-mlp-mnist"), "mlp-mnist")},
    )  # fmt: skip
    corrected(study, "convnet-mnist", ["convnet-mnist", "mlp-mnist"])


def convnet_to_mlp(study: Study) -> None:
    """Figure 4."""
    published.compare(
        study, "mlp-mnist",
        {
            "LSTM": learned(study, "published-mlp-mnist"),
            "LSTM (ConvNet)": learned(study, "published-convnet-mnist"),
        },
    )  # fmt: skip
    corrected(study, "mlp-mnist", ["mlp-mnist", "convnet-mnist"])


def variant(study: Study, name: str) -> None:
    """Figures 5 and 6; the published transfers ran at half the multiplier."""
    trained = learned(study, "published-convnet-mnist")
    published.compare(study, name, {"LSTM (ConvNet), halved": halved(trained)})
    corrected(study, name, ["convnet-mnist"])


def data(study: Study, name: str, own: str, other: str) -> None:
    """Figures 7 and 8."""
    rules = {"LSTM": own, "LSTM (transferred)": other}
    published.compare(
        study, name, {label: learned(study, f"published-{rule}") for label, rule in rules.items()}
    )
    corrected(study, name, [own, other])


RECIPES = (
    Recipe("a1-quadratic", "random quadratics (figure 1)", quadratic),
    Recipe("a2-mlp", "the MLP on MNIST (figure 2)", mlp),
    Recipe("a3-convnet", "the ConvNet on MNIST, and the MLP's rule on it (figure 3)", convnet),
    Recipe("a4-convnet-to-mlp", "the ConvNet's rule on the MLP (figure 4)", convnet_to_mlp),
    Recipe(
        "a5-kernel-size", "the ConvNet's rule on 5x5 kernels (figure 5)",
        partial(variant, name="convnet5x5-mnist"),
    ),
    Recipe(
        "a6-activation", "the ConvNet's rule on sigmoids (figure 6)",
        partial(variant, name="convnet-sigmoid-mnist"),
    ),
    Recipe(
        "a7-mnist-to-fashion", "MNIST's rule on Fashion-MNIST (figure 7)",
        partial(
            data, name="convnet-fashion_mnist", own="convnet-fashion_mnist", other="convnet-mnist"
        ),
    ),
    Recipe(
        "a8-fashion-to-mnist", "Fashion-MNIST's rule on MNIST (figure 8)",
        partial(data, name="convnet-mnist", own="convnet-mnist", other="convnet-fashion_mnist"),
    ),
)  # fmt: skip
