"""From records to rows of a summary: means, intervals, ratios, each with its definition.

Shape letters: S = seeds, T = steps, E = tests on the way, R = resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from stepsmith.evaluate.records import Block, Key, Records, contiguous

RESAMPLES = 10_000
PENALTY = 10.0
"""A run that diverged counts as this many times its initial loss."""
SMOOTHING = 10
"""Steps a loss curve is smoothed over where it is drawn; no more than a tenth of the horizon."""
FEW = 8
"""Fewer seeds than these are not resampled: their intervals are the range of single seeds."""

LEAST_TESTS = 3
"""In the last third of a training, for its accuracies to have a spread about their line."""

METRICS = (
    "mean_train_loss", "final_train_loss", "test_loss", "test_accuracy", "steps_to_baseline",
    "seconds_to_baseline", "seconds_per_step",
)  # fmt: skip
_CRITERION = {"mean_train_loss": "mean"}
"""Which tuning of a baseline a metric is compared with; the others take the one for `final`."""


@dataclass(frozen=True)
class Row:
    """One optimizer on one task, by one metric.

    `ratio` is the mean over seeds of this optimizer over that of `against`, the best tuned baseline
    on the same task, horizon and metric; for accuracies the difference in points; both with a 95 %
    interval from a paired bootstrap over seeds, of fewer than `FEW` seeds with the range of single
    seeds. `low` and `high` bound the mean likewise. None is a target never reached. `median` of
    steps and seconds is that of the median curve.
    """

    protocol: str
    optimizer: str
    kind: str
    tuned_for: str
    rule: str
    meta_task: str
    hyper_parameters: dict[str, Any]
    task: str
    horizon: int
    metric: str
    mean: float | None
    median: float | None
    low: float | None
    high: float | None
    seeds: int
    diverged: int
    against: str
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None


def diverged(losses_ST: np.ndarray) -> np.ndarray:
    """(S,) whether a run was ever non-finite or above ten times its initial loss."""
    initial_S = losses_ST[:, 0]
    finite_S = np.isfinite(losses_ST).all(axis=1)
    with np.errstate(invalid="ignore"):
        above_S = np.any(losses_ST > PENALTY * initial_S[:, None], axis=1)
    return np.logical_or(~finite_S, above_S)


def require_positive(task: str, losses_ST: np.ndarray) -> None:
    """Refuse initial losses by whose multiples no divergence can be told.

    Raises:
        ValueError: one of them is zero or below, or not finite.
    """
    initial_S = losses_ST[:, 0]
    wrong_S = ~(np.isfinite(initial_S) & (initial_S > 0))
    if wrong_S.any():
        raise ValueError(
            f"{task}: has an initial loss of {initial_S[wrong_S][0]:.3g}; losses must be finite "
            "and above zero at the start, of which runs that diverge count as ten times: look for "
            "values in the data that are not finite, or add a constant"
        )


def score(losses_ST: np.ndarray, criterion: str) -> np.ndarray:
    """(S,) mean loss over the horizon or its last tenth (`final`); the penalty if diverged."""
    losses_ST = contiguous(losses_ST)
    steps = losses_ST.shape[1]
    tail = losses_ST if criterion == "mean" else losses_ST[:, steps - last_tenth(steps) :]
    with np.errstate(invalid="ignore"):
        value_S = tail.mean(axis=1)
    return np.where(diverged(losses_ST), PENALTY * losses_ST[:, 0], value_S)


def penalised(losses_ST: np.ndarray) -> np.ndarray:
    """The losses, those of a run that diverged all replaced by the penalty."""
    losses_ST = contiguous(losses_ST)
    return np.where(diverged(losses_ST)[:, None], PENALTY * losses_ST[:, :1], losses_ST)


def interval(values_R: np.ndarray) -> tuple[float | None, float | None]:
    """The central 95 % of resampled values; None at an end that lies among the never-reached, and
    at both where there is one value alone."""
    if len(values_R) == 1:
        return None, None
    low, high = np.percentile(values_R, [2.5, 97.5], method="nearest")
    return finite(low), finite(high)


def resamples(seeds: int) -> np.ndarray:
    """(R, S) indices of bootstrap resamples, always the same for the same S; of fewer than `FEW`
    seeds (S, 1), each seed alone."""
    if seeds < FEW:
        return np.arange(seeds)[:, None]
    return np.random.default_rng(20_161_206).integers(0, seeds, (RESAMPLES, seeds))


def finite(value: float) -> float | None:
    """The number, or None for one that is not finite, which JSON lacks."""
    return float(value) if math.isfinite(value) else None


def last_tenth(steps: int) -> int:
    """Steps of a horizon's end that its final loss is the mean of."""
    return max(1, steps // 10)


def smoothing(steps: int) -> int:
    """Steps smoothed over where a curve of so many is drawn."""
    return min(SMOOTHING, last_tenth(steps))


def smoothed(curve_T: np.ndarray, width: int = SMOOTHING) -> np.ndarray:
    """Trailing means over `width` steps, along the last axis; shorter at the start."""
    curve_T = contiguous(curve_T)
    steps = curve_T.shape[-1]
    width = min(width, steps)
    # Sums from the end: beside what a curve that falls by many magnitudes was at first, sums from
    # the start would lose what it comes down to.
    left = np.flip(np.cumsum(np.flip(curve_T, -1), axis=-1), -1)
    whole = left[..., : steps - width + 1].copy()
    whole[..., :-1] -= left[..., width:]
    begun = np.cumsum(curve_T[..., : width - 1], axis=-1) / np.arange(1, width)
    return np.concatenate([begun, whole / width], axis=-1)


def first_reach(curve_T: np.ndarray, target: float, width: int | None = None) -> np.ndarray:
    """Steps made when the smoothed curve first meets the target; inf where it never does.

    Smoothed over as many steps as the target is the mean of, by default the last tenth of this
    curve's: over fewer, noise alone would now and then meet a target that the curve never comes
    down to. Only full windows count, so no result is below `width`: of a curve that falls within a
    window or little more, it is an upper bound.
    """
    width = width or last_tenth(curve_T.shape[-1])
    below = smoothed(curve_T, width) <= target + 1e-9 * abs(target)
    below[..., : width - 1] = False
    return np.where(below.any(-1), below.argmax(-1) + 1.0, np.inf)


def reach(losses_ST: np.ndarray, target: float, width: int | None = None) -> float:
    """`first_reach` of the mean over seeds; runs that diverged are penalised."""
    return float(first_reach(penalised(losses_ST).mean(0), target, width))


@dataclass(frozen=True)
class _Run:
    """One optimizer's test block with what else is known of it."""

    key: Key
    seeds: np.ndarray
    losses_ST: np.ndarray
    test: dict[str, np.ndarray]
    seconds: np.ndarray

    def value(self, metric: str) -> np.ndarray:
        """(S,) value of a per-seed metric; penalised where diverged."""
        if metric in ("mean_train_loss", "final_train_loss"):
            return score(self.losses_ST, metric.split("_")[0])
        bad_S = diverged(self.losses_ST)
        values_S = self.test[metric]
        penalty = PENALTY * self.losses_ST[:, 0] if metric == "test_loss" else 0.0
        return np.where(bad_S | ~np.isfinite(values_S), penalty, values_S)


class _Keyed(Protocol):
    @property
    def key(self) -> Key: ...


AnyRun = TypeVar("AnyRun", bound=_Keyed)


def standing(runs: Iterable[AnyRun], criterion: str) -> list[AnyRun]:
    """Those runs of a panel that stand for their optimizer by a criterion, `mean` or `final`.

    Args:
        runs: what has a `key`; several of a baseline that was tuned for several criteria.
        criterion: what is to be shown.

    Returns:
        Of learned rules all; of a baseline those tuned for the criterion, and where none was, all.
    """
    runs = list(runs)

    def fits(key: Key) -> bool:
        return key.kind == "learned" or criterion in key.tuned_for.split(",")

    filled = {run.key.optimizer for run in runs if fits(run.key)}
    return [run for run in runs if fits(run.key) or run.key.optimizer not in filled]


def summarise(records: Records) -> list[dict[str, Any]]:
    """All rows of a summary, as JSON-able dictionaries.

    Args:
        records: with `train_loss` blocks of purpose `test`, one for each optimizer and tuning;
            test and cost metrics where they were measured.
    """
    groups: dict[tuple[str, str, int], list[_Run]] = {}
    for block in records.select("train_loss", purpose="test"):
        group = (block.key.protocol, block.key.task, block.key.horizon)
        groups.setdefault(group, []).append(_gather(records, block))
    rows = []
    for runs in groups.values():
        for metric in METRICS:
            rows += _metric_rows(runs, metric)
    return [asdict(row) for row in rows]


def _gather(records: Records, block: Block) -> _Run:
    test = {
        other.metric: other.values[:, -1]
        for name in ("test_loss", "test_accuracy")
        for other in records.select(name, purpose="test")
        if other.key == block.key
    }
    seconds = [
        cost.values[:, 0]
        for cost in records.select(
            "seconds_per_step",
            purpose="cost",
            task=block.key.task,
            network=block.key.network,
            optimizer=block.key.optimizer,
        )
    ]
    return _Run(block.key, block.seeds, block.values, test, np.concatenate([*seconds, []]))


def _metric_rows(runs: list[_Run], metric: str) -> list[Row]:
    runs = standing(runs, _CRITERION.get(metric, "final"))
    baselines = [run for run in runs if run.key.kind == "baseline"]
    if metric == "seconds_per_step":
        return _cost_rows(runs, baselines)
    if metric in ("steps_to_baseline", "seconds_to_baseline"):
        return _reach_rows(runs, baselines, metric)
    if not all(metric.endswith("train_loss") or metric in run.test for run in runs):
        return []
    accuracy = metric == "test_accuracy"
    pick: Callable[..., _Run] = max if accuracy else min
    best = pick(baselines, key=lambda run: float(run.value(metric).mean())) if baselines else None
    rows = []
    for run in runs:
        values_S = run.value(metric)
        index_RS = resamples(len(values_S))
        means_R = values_S[index_RS].mean(axis=1)
        against: dict[str, Any] = {}
        if best is not None:
            other_S = best.value(metric)
            if np.array_equal(run.seeds, best.seeds):
                others_R = other_S[index_RS].mean(axis=1)
            elif min(len(values_S), len(other_S)) >= FEW:
                # Unpaired: other draws for the other set of seeds.
                others_R = other_S[resamples(len(other_S))[::-1]].mean(axis=1)
            else:
                others_R = np.array([np.nan])
            if accuracy:
                value = 100 * (values_S.mean() - other_S.mean())
                spread_R = 100 * (means_R - others_R)
            else:
                value = values_S.mean() / other_S.mean()
                spread_R = means_R / others_R
            low, high = interval(spread_R)
            against = {
                "against": best.key.optimizer, "ratio": finite(value), "ratio_low": low,
                "ratio_high": high,
            }  # fmt: skip
        rows.append(
            _row(run, metric, values_S.mean(), np.median(values_S), interval(means_R), **against)
        )
    return rows


def _row(
    run: _Run,
    metric: str,
    mean: float,
    median: float,
    bounds: tuple[float | None, float | None],
    against: str = "",
    ratio: float | None = None,
    ratio_low: float | None = None,
    ratio_high: float | None = None,
) -> Row:
    key = run.key
    return Row(
        key.protocol, key.optimizer, key.kind, key.tuned_for, key.rule, key.meta_task,
        key.parameters, key.task, key.horizon, metric, finite(mean), finite(median), *bounds,
        len(run.seeds), int(diverged(run.losses_ST).sum()), against, ratio, ratio_low, ratio_high,
    )  # fmt: skip


def _cost_rows(runs: list[_Run], baselines: list[_Run]) -> list[Row]:
    """Median seconds of a whole training step; the ratio is to the fastest baseline."""
    timed = [run for run in runs if len(run.seconds)]
    timed_baselines = [run for run in baselines if len(run.seconds)]
    best = min(timed_baselines, key=lambda run: float(np.median(run.seconds)), default=None)
    rows = []
    for run in timed:
        index = resamples(len(run.seconds))
        medians_R = np.median(run.seconds[index], axis=1)
        against: dict[str, Any] = {}
        if best is not None:
            # Timed in turn, round by round: rounds are paired.
            paired = len(best.seconds) == len(run.seconds)
            other_R = np.median(best.seconds[index if paired else resamples(len(best.seconds))], 1)
            low, high = interval(medians_R / other_R)
            value = float(np.median(run.seconds) / np.median(best.seconds))
            against = {
                "against": best.key.optimizer, "ratio": value, "ratio_low": low, "ratio_high": high,
            }  # fmt: skip
        rows.append(
            _row(run, "seconds_per_step", float(run.seconds.mean()),
                 float(np.median(run.seconds)), interval(medians_R), **against)
        )  # fmt: skip
    return rows


def _reach_rows(runs: list[_Run], baselines: list[_Run], metric: str) -> list[Row]:
    """Steps, or seconds, until the best baseline's final loss is first met by the mean curve."""
    if not baselines:
        return []
    best = min(baselines, key=lambda run: float(run.value("final_train_loss").mean()))
    if metric == "seconds_to_baseline":
        runs = [run for run in runs if len(run.seconds)]
        if not len(best.seconds):
            return []

    def cost(run: _Run) -> float:
        return float(np.median(run.seconds)) if metric == "seconds_to_baseline" else 1.0

    target = float(best.value("final_train_loss").mean())
    own = reach(best.losses_ST, target)
    index_RS = resamples(len(best.seeds))[:1000]
    rows = []
    for run in runs:
        losses_ST = penalised(run.losses_ST)
        mean = reach(run.losses_ST, target)
        middle = float(first_reach(np.median(losses_ST, axis=0), target))
        reach_R = np.array([np.inf])
        ratio_R = np.array([np.inf])
        if np.array_equal(run.seeds, best.seeds):
            # Target and curves move together over the resampled seeds.
            best_ST, final_S = penalised(best.losses_ST), best.value("final_train_loss")
            pairs = [
                tuple(
                    float(first_reach(own_ST[index].mean(0), float(final_S[index].mean())))
                    for own_ST in (losses_ST, best_ST)
                )
                for index in index_RS
            ]
            reach_R = np.array([pair[0] for pair in pairs])
            ratio_R = reach_R / np.array([pair[1] for pair in pairs])
        share = cost(run) / cost(best)
        low, high = interval(ratio_R * share)
        rows.append(
            _row(run, metric, mean * cost(run), middle * cost(run),
                 interval(reach_R * cost(run)), best.key.optimizer,
                 finite(mean / own * share), low, high)
        )  # fmt: skip
    return rows


def final_accuracies(records: Records, losses: Block) -> np.ndarray | None:
    """(S,) test accuracies at the end of the runs a block of losses is of, as in a summary: 0 where
    a run diverged; None where none were measured."""
    run = _gather(records, losses)
    return run.value("test_accuracy") if "test_accuracy" in run.test else None


def stability(records: Records, task: str, protocol: str) -> list[dict[str, Any]]:
    """How much test accuracy still moves in the last third of a training.

    Args:
        records: with `test_accuracy` and `train_loss` of purpose `test`.
        task, protocol: of the contest.

    Returns:
        For each optimizer that was tested at least `LEAST_TESTS` times in that third, steadiest
        first: `spread_of_each_seed`, the standard deviation in points about the line that fits its
        accuracies best (what it still gains is no unrest), their mean `spread`, and how many
        `tests`. Seeds that diverged, at rest at the worst accuracy, are left out.
    """
    about = {"purpose": "test", "task": task, "protocol": protocol}
    losses = {block.key: block.values for block in records.select("train_loss", **about)}
    found = []
    for block in records.select("test_accuracy", **about):
        late, alive_S = block.steps > block.key.horizon * 2 / 3, ~diverged(losses[block.key])
        if late.sum() < LEAST_TESTS or not alive_S.any():
            continue
        steps_E, values_SE = block.steps[late], 100 * block.values[alive_S][:, late]
        lines = np.polynomial.polynomial.polyfit(steps_E, values_SE.T, 1)
        left_SE = values_SE - np.polynomial.polynomial.polyval(steps_E, lines)
        spread_S = np.sqrt(np.square(left_SE).sum(1) / (late.sum() - 2))
        found.append(
            {
                "task": task, "protocol": protocol, "optimizer": block.key.optimizer,
                "tests": int(late.sum()), "spread": float(spread_S.mean()),
                "spread_of_each_seed": spread_S.tolist(),
            }
        )  # fmt: skip
    return sorted(found, key=lambda entry: entry["spread"])
