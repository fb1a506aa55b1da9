"""What contests of deep networks say beyond means: speed, and the honest clock.

Shape letters: S = seeds, T = steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from stepsmith.evaluate import Records
from stepsmith.evaluate.epochs import Contest
from stepsmith.evaluate.records import Block
from stepsmith.evaluate.statistics import (
    final_accuracies,
    finite,
    first_reach,
    last_tenth,
    penalised,
    reach,
    score,
)

CLOSE = 1.02
"""Times a final loss: where training has come as low as its space goes, batches of other examples
differ by a percent or two, and when a curve meets the loss itself is chance."""


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
        against: baselines; of those that were run, the one with the lowest final loss counts.

    Returns:
        The baseline, its final loss (mean over seeds of the last tenth), the steps in which each
        mean curve first meets it, smoothed over as many, their ratio, and the ratio of each seed's
        own curves; None where a loss is never met. `close` and `baseline_close` are the steps to
        `CLOSE` times that final loss. `share` is the rule's steps over all steps of the training;
        `loss_at_half` its mean loss over the tenth before half of them, over that final loss. And
        the differences of test accuracies in points, of the means and each seed's.
    """
    found = curves(records, task, protocol)
    best, target = lowest(found, against)
    (met, base), (close, base_close) = (
        [reach(found[name].values, loss) for name in (rule, best)]
        for loss in (target, CLOSE * target)
    )
    own_ST, other_ST = (penalised(found[name].values) for name in (rule, best))
    finals_S = score(other_ST, "final")
    each = [
        _ratio(float(first_reach(own_T, final)), float(first_reach(other_T, final)))
        for own_T, other_T, final in zip(own_ST, other_ST, finals_S, strict=True)
    ]
    steps = own_ST.shape[1]
    half_T = own_ST.mean(0)[max(0, steps // 2 - last_tenth(steps)) : max(1, steps // 2)]
    points_S = _points(records, found[rule], found[best])
    return {
        "task": task, "protocol": protocol, "rule": rule, "against": best,
        "final_loss": target, "steps": finite(met), "baseline_steps": finite(base),
        "ratio": _ratio(met, base), "ratio_of_each_seed": each, "share": _ratio(met, steps),
        "close": finite(close), "baseline_close": finite(base_close),
        "loss_at_half": float(half_T.mean()) / target,
        "points_of_accuracy": None if points_S is None else float(points_S.mean()),
        "points_of_each_seed": None if points_S is None else points_S.tolist(),
    }  # fmt: skip


def outlasting(
    longer: Contest,
    optimizer: str,
    shorter: Contest,
    other: str,
    basis_seconds: float,
    *,
    timed_as: str | None = None,
) -> dict[str, Any]:
    """How a longer training ends beside another optimizer's shorter one, whose preparation took the
    difference.

    Args:
        longer: the contest of the longer training.
        optimizer: there.
        shorter: the other contest, under the same protocol and of the same seeds.
        other: optimizer there.
        basis_seconds: of the preparation.
        timed_as: its name in the shorter contest, where steps were timed; by default the same.

    Returns:
        Steps of both; final losses (means over seeds of each run's last tenth), their ratio and
        that of each seed; `met`, steps in which the mean curve first meets the other's final loss,
        smoothed over as many steps as that is the mean of, None where it never does; the difference
        of test accuracies in points; seconds of both trainings, the other's with its preparation,
        None where they were not timed, and those of each with its meta-training.
    """
    records, protocol = longer.records, longer.key.protocol
    found = curves(records, longer.name, protocol)[optimizer]
    base = curves(shorter.records, shorter.name, protocol)[other]
    own_ST, other_ST = penalised(found.values), penalised(base.values)
    finals_S, targets_S = score(own_ST, "final"), score(other_ST, "final")
    target = float(targets_S.mean())
    points_S = _points(records, found, base)
    own, own_all = _whole_seconds(shorter, timed_as or optimizer, longer.length.total, 0.0)
    that, that_all = _whole_seconds(shorter, other, shorter.length.total, basis_seconds)
    return {
        "task": longer.name, "protocol": protocol, "optimizer": optimizer,
        "steps": own_ST.shape[1], "against": other, "steps_of_that": other_ST.shape[1],
        "final_loss": float(finals_S.mean()), "final_loss_of_that": target,
        "ratio": float(finals_S.mean()) / target,
        "ratio_of_each_seed": (finals_S / targets_S).tolist(),
        "met": finite(reach(found.values, target, last_tenth(other_ST.shape[1]))),
        "points_of_accuracy": None if points_S is None else float(points_S.mean()),
        "seconds": own, "seconds_of_that": that,
        "with_all": own_all, "with_all_of_that": that_all,
    }  # fmt: skip


def _whole_seconds(
    timed: Contest, optimizer: str, steps: int, before: float
) -> tuple[float | None, float | None]:
    """Of a training of so many steps and what comes before it, and those with the meta-training, by
    the contest in which the optimizer's steps were timed."""
    step = step_seconds(timed.records, timed.name, optimizer)
    if step is None:
        return None, None
    seconds = before + step * steps
    return seconds, seconds + _meta_seconds(
        timed.records, timed.name, timed.key.protocol, optimizer
    )


def lowest(found: Mapping[str, Block], names: Iterable[str]) -> tuple[str, float]:
    """Of the named optimizers that were run, the one with the lowest final loss, and that loss.

    Args:
        found: of `curves`.
        names: some of them, and others that were not run.
    """
    finals = {n: float(score(found[n].values, "final").mean()) for n in names if n in found}
    best = min(finals, key=finals.__getitem__)
    return best, finals[best]


def gradient_seconds(records: Records, task: str) -> float | None:
    """Median seconds of the cheapest optimizer's gradient, where any was timed."""
    blocks = records.select("gradient_seconds", purpose="cost", task=task)
    return min((float(np.median(block.values)) for block in blocks), default=None)


def step_seconds(records: Records, task: str, optimizer: str) -> float | None:
    """Median seconds of a training step, where they were timed."""
    timed = [
        float(np.median(block.values))
        for block in records.select("seconds_per_step", purpose="cost", task=task)
        if block.key.optimizer == optimizer
    ]
    return timed[0] if timed else None


def clock(
    records: Records,
    task: str,
    protocol: str,
    *,
    basis_seconds: float,
    subspace: Iterable[str],
) -> list[dict[str, Any]]:
    """Steps and seconds to the final loss of the best baseline, with and without what came before:
    of the best of the subspace, and of the best of the whole space.

    Args:
        records: with `train_loss`, `seconds_per_step` and seconds of meta-training.
        task, protocol: of the contest.
        basis_seconds: of making one basis, which every start needs anew.
        subspace: optimizers that need one.

    Returns:
        For each target and optimizer `steps`, `seconds` of training alone, `with_basis`, and
        `with_all` (its meta-training too, paid by one training); None where the loss is never met.
        `meta_seconds` are spent once for all trainings, as recorded when the rule was made, the
        basis it was meta-trained in included where that is not the tested training's own.
    """
    found, subspace = curves(records, task, protocol), set(subspace)
    baselines = [name for name, block in found.items() if block.key.kind == "baseline"]
    rows = []
    for within in (True, False):
        held = [name for name in baselines if (name in subspace) == within]
        if not held:
            continue
        best, target = lowest(found, held)
        for name, block in found.items():
            steps = reach(block.values, target)
            timed = step_seconds(records, task, name)
            seconds = np.inf if timed is None else steps * timed
            basis = basis_seconds if name in subspace else 0.0
            meta = _meta_seconds(records, task, protocol, name)
            rows.append(
                {
                    "task": task, "protocol": protocol, "optimizer": name, "against": best,
                    "target": target, "steps": finite(steps), "seconds": finite(seconds),
                    "with_basis": finite(seconds + basis), "meta_seconds": meta,
                    "with_all": finite(seconds + basis + meta),
                }
            )  # fmt: skip
    return rows


def _meta_seconds(records: Records, task: str, protocol: str, optimizer: str) -> float:
    about = {"task": task, "protocol": protocol, "optimizer": optimizer}
    return sum(
        float(block.values.sum())
        for metric in ("meta_training_seconds", "meta_training_subspace_seconds")
        for block in records.select(metric, **about)
    )


def _points(records: Records, one: Block, other: Block) -> np.ndarray | None:
    """(S,) by how many points of test accuracy runs end above others of the same seeds."""
    one_S, other_S = (final_accuracies(records, block) for block in (one, other))
    return None if one_S is None or other_S is None else 100 * (one_S - other_S)


def _ratio(one: float, other: float) -> float | None:
    return one / other if np.isfinite(one) and np.isfinite(other) else None
