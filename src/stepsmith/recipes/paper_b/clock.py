"""What contests of deep networks say beyond means: speed, stability, and the honest clock.

Shape letters: S = seeds, E = epochs, T = steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from stepsmith.evaluate import Records
from stepsmith.evaluate.records import Block
from stepsmith.evaluate.statistics import first_reach, penalised, score

LAST = 5
"""Epochs at the end over which accuracies should be still, or a third of all where they are few."""


def curves(records: Records, task: str, protocol: str) -> dict[str, Block]:
    """Each optimizer's test losses on a task."""
    return {
        block.key.optimizer: block
        for block in records.select("train_loss", purpose="test", task=task, protocol=protocol)
    }


def speed(
    records: Records, task: str, protocol: str, rule: str, against: Iterable[str]
) -> dict[str, Any]:
    """In what share of a baseline's steps a rule reaches its final loss.

    Args:
        records: with `train_loss` of purpose `test`.
        task, protocol: of the contest.
        rule: of the optimizer.
        against: baselines; the one with the lowest final loss counts.

    Returns:
        The baseline, its final loss (mean over seeds of the last tenth), the steps in which each
        mean curve first meets it, smoothed, their ratio, and the ratio of each seed's own curves;
        None where a loss is never met. And the difference of test accuracies in points.
    """
    found = curves(records, task, protocol)
    final = {name: float(score(found[name].values, "final").mean()) for name in against}
    best = min(final, key=final.__getitem__)
    own_ST, other_ST = (penalised(found[name].values) for name in (rule, best))
    reach, base = (float(first_reach(part.mean(0), final[best])) for part in (own_ST, other_ST))
    finals_S = score(other_ST, "final")
    each = [
        _ratio(float(first_reach(own_T, target)), float(first_reach(other_T, target)))
        for own_T, other_T, target in zip(own_ST, other_ST, finals_S, strict=True)
    ]
    accuracy = {
        block.key.optimizer: 100 * float(block.values[:, -1].mean())
        for block in records.select("test_accuracy", purpose="test", task=task, protocol=protocol)
    }
    return {
        "task": task, "protocol": protocol, "rule": rule, "against": best,
        "final_loss": final[best], "steps": _finite(reach), "baseline_steps": _finite(base),
        "ratio": _ratio(reach, base), "ratio_of_each_seed": each,
        "points_of_accuracy": accuracy[rule] - accuracy[best] if accuracy else None,
    }  # fmt: skip


def stability(records: Records, task: str, protocol: str) -> list[dict[str, Any]]:
    """How much test accuracy still moves over the last epochs.

    Returns:
        For each optimizer the standard deviation over the last epochs in points, the mean over
        seeds and the largest, steadiest first.
    """
    found = []
    for block in records.select("test_accuracy", purpose="test", task=task, protocol=protocol):
        epochs = block.values.shape[1]
        last_SE = 100 * block.values[:, -min(LAST, max(2, epochs // 3)) :]
        spread_S = last_SE.std(axis=1)
        found.append(
            {
                "task": task, "protocol": protocol, "optimizer": block.key.optimizer,
                "epochs": last_SE.shape[1], "spread": float(spread_S.mean()),
                "largest": float(spread_S.max()),
            }
        )  # fmt: skip
    return sorted(found, key=lambda entry: entry["spread"])


def step_seconds(records: Records, task: str, optimizer: str) -> float | None:
    """Median seconds of a training step, where they were timed."""
    timed = [
        float(np.median(block.values))
        for block in records.select("seconds_per_step", purpose="cost", task=task)
        if block.key.optimizer == optimizer
    ]
    return timed[0] if timed else None


def clock(
    records: Records, task: str, protocol: str, *, basis_seconds: float, subspace: Iterable[str]
) -> list[dict[str, Any]]:
    """Steps and seconds to the final loss of the best baseline, with and without what came before.

    Args:
        records: with `train_loss`, `seconds_per_step` and seconds of meta-training.
        task, protocol: of the contest.
        basis_seconds: of making one basis, which every start needs anew.
        subspace: optimizers that need one.

    Returns:
        For each optimizer `steps`, `seconds` of training alone, `with_basis`, and `with_all` (its
        meta-training too, paid by one training); None where the loss is never met. `meta_seconds`
        are spent once for all trainings.
    """
    found = curves(records, task, protocol)
    baselines = [name for name, block in found.items() if block.key.kind == "baseline"]
    target = min(float(score(found[name].values, "final").mean()) for name in baselines)
    rows = []
    for name, block in found.items():
        steps = float(first_reach(penalised(block.values).mean(0), target))
        timed = step_seconds(records, task, name)
        meta = sum(
            float(cost.values.sum())
            for cost in records.select("meta_training_seconds", task=task, protocol=protocol)
            if cost.key.optimizer == name
        )
        seconds = np.inf if timed is None else steps * timed
        basis = basis_seconds if name in set(subspace) else 0.0
        rows.append(
            {
                "task": task, "protocol": protocol, "optimizer": name, "target": target,
                "steps": _finite(steps), "seconds": _finite(seconds),
                "with_basis": _finite(seconds + basis), "meta_seconds": meta,
                "with_all": _finite(seconds + basis + meta),
            }
        )  # fmt: skip
    return rows


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _ratio(one: float, other: float) -> float | None:
    return one / other if np.isfinite(one) and np.isfinite(other) else None
