"""Section 2's claim: networks do not converge without the log/sign pair, and the quadratic does
not care; and section 3.2's remark on spikes, with noisy batches made on purpose."""

from __future__ import annotations

from typing import Any

import numpy as np

from stepsmith.evaluate import BASELINES, Records
from stepsmith.evaluate.statistics import PENALTY, interval, resamples
from stepsmith.recipes.paper_a import published
from stepsmith.recipes.paper_a.horizons import longer
from stepsmith.recipes.paper_a.rules import learned
from stepsmith.recipes.study import Recipe, Study
from stepsmith.tasks.noisy import with_noisy_batches

PAIRS = {
    "quadratic": ("published-quadratic-log_sign", "published-quadratic"),
    "mlp-mnist": ("published-mlp-mnist", "published-mlp-mnist-raw"),
    "convnet-mnist": ("published-convnet-mnist", "published-convnet-mnist-raw"),
}
"""Task -> the LSTM meta-trained with log/sign pairs, and with raw gradients."""

AFTER = 5
"""Steps after a noisy batch over which its harm is measured."""


def preprocessing(study: Study) -> None:
    """Both LSTMs on the paper's data beside its baselines, and on ours beside tuned ones, over ten
    times the horizon too."""
    for name, (pairs, raw) in PAIRS.items():
        rules = {"LSTM, log/sign": learned(study, pairs), "LSTM, raw": learned(study, raw)}
        published.compare(study, name, rules)
        task = study.task(name)
        first = study.compare(task, rules, BASELINES)
        longer(study, task, rules, first, study.scale.long)


def spikes(study: Study, every: int = 20) -> None:
    """The MLP and the ConvNet with and without noisy batches, same starts, same other batches."""
    every = min(every, study.scale.first.steps // 2)
    for name in ("mlp-mnist", "convnet-mnist"):
        rules = {
            "learned": learned(study, name),
            "LSTM as published": learned(study, f"published-{name}"),
        }
        clean, noisy = study.task(name), with_noisy_batches(study.task(name), every)
        around = study.compare(clean, rules, BASELINES).tuned
        study.compare(
            noisy, rules, BASELINES,
            tune_around={key: tuned.rates["mean"] for key, tuned in around.items()},
        )  # fmt: skip
        study.findings[name] = harm(study.records, clean.name, noisy.name, every)


def harm(records: Records, clean: str, noisy: str, every: int) -> list[dict[str, Any]]:
    """How much worse the losses of the steps right after a noisy batch are than without it.

    Args:
        records: with `train_loss` of both tasks, the same seeds.
        clean, noisy: names of the tasks.
        every: steps between noisy batches.

    Returns:
        For each optimizer the ratio of mean losses over the `AFTER` steps that follow each noisy
        batch, with a 95 % interval from a paired bootstrap over seeds, runs that were ever
        non-finite counting as ten times their initial loss (a noisy batch's own loss may well be
        above that); and whether it was run with the `same` settings on both tasks, where its rate
        was tuned on each; lowest first.
    """
    blocks = {
        task: {
            block.key.optimizer: block
            for block in records.select("train_loss", purpose="test", task=task)
            if block.key.kind == "learned" or "mean" in block.key.tuned_for.split(",")
        }
        for task in (clean, noisy)
    }
    found = []
    for name, block in blocks[noisy].items():
        other = blocks[clean][name]
        steps = block.values.shape[1]
        # Step number `every` is made on the noisy batch; its loss is the noisy batch's own.
        counted = [
            t
            for start in range(every, steps, every)
            for t in range(start, min(start + AFTER, steps))
        ]
        with_S, without_S = (_finite(b.values)[:, counted].mean(1) for b in (block, other))
        index_RS = resamples(len(with_S))
        low, high = interval(with_S[index_RS].mean(1) / without_S[index_RS].mean(1))
        ratio = float(np.mean(with_S) / np.mean(without_S))
        same = block.key.hyper_parameters == other.key.hyper_parameters
        found.append({"optimizer": name, "ratio": ratio, "low": low, "high": high, "same": same})
    return sorted(found, key=lambda entry: entry["ratio"])


def _finite(losses_ST: np.ndarray) -> np.ndarray:
    finite_S1 = np.isfinite(losses_ST).all(axis=1, keepdims=True)
    return np.where(finite_S1, losses_ST, PENALTY * losses_ST[:, :1])


RECIPES = (
    Recipe(
        "a12-preprocessing", "with and without the log/sign pair (section 2)", preprocessing
    ),
    Recipe("a13-spikes", "noisy batches made on purpose (section 3.2's remark)", spikes),
)  # fmt: skip
