"""Results in sentences: who leads, by how much, how surely, and at what cost."""

from __future__ import annotations

from typing import Any

from stepsmith.evaluate.statistics import FEW

_MEAN, _FINAL = "mean_train_loss", "final_train_loss"


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence for each task and learned rule: mean loss, and final loss whoever leads."""
    sentences = []
    for row in rows:
        if row["metric"] == _MEAN and row["kind"] == "learned":
            final = next(
                other for other in rows
                if other["metric"] == _FINAL and _about(other) == _about(row)
            )  # fmt: skip
            against = [other for other in rows if other["metric"] == _MEAN
                       and _about(other)[:3] == _about(row)[:3]
                       and other["optimizer"] == row["against"]]  # fmt: skip
            sentences.append(_verdict(row, final, tuning_text(row["protocol"], against)))
    return sentences


def _about(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["protocol"], row["task"], row["horizon"], row["optimizer"]


def tuning_text(protocol: str, baselines: list[dict[str, Any]], criterion: str = "mean") -> str:
    """How the best of these baselines' rows is to be called: whether its rate was tuned for the
    criterion, `mean` or `final`, or for another.

    >>> tuning_text("corrected", [{"tuned_for": "final"}])
    'best baseline (tuned for final loss)'
    """
    if protocol != "corrected":
        return "best baseline"
    tuned_for = [row.get("tuned_for", criterion) for row in baselines] or [criterion]
    if any(criterion in purposes for purposes in tuned_for):
        return "best tuned baseline"
    if not tuned_for[0]:
        return "best baseline (as given, not tuned)"
    return f"best baseline (tuned for {tuned_for[0]} loss)"


def _verdict(mean: dict[str, Any], final: dict[str, Any], best: str) -> str:
    corrected = mean["protocol"] == "corrected"
    head = f"{mean['task']}, {mean['horizon']} steps, {mean['seeds']} seeds: {mean['optimizer']}"
    head = head if corrected else f"{mean['protocol']}: {head}"
    bad = f" {mean['diverged']} of its runs diverged." if mean["diverged"] else ""
    if mean["ratio"] is None:
        return f"{head} has a mean training loss of {mean['mean']:.4g}; no baseline was run.{bad}"
    return (
        f"{head} has {ratio_text(mean)} times the mean training loss of the {best}, "
        f"{mean['against']}: {_leader(mean)}. Final loss: {ratio_text(final)} times that of the "
        f"best, {final['against']}: {_leader(final)}.{bad}"
    )


def ratio_text(row: dict[str, Any]) -> str:
    """A row's ratio with its interval, where it has one; empty where it has no ratio.

    >>> ratio_text({"ratio": 0.9, "ratio_low": 0.85, "ratio_high": 0.951})
    '0.900 [0.850, 0.951]'
    """
    if row["ratio"] is None:
        return ""
    if row["ratio_low"] is None or row["ratio_high"] is None:
        return f"{row['ratio']:.3f}"
    return f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"


def _leader(row: dict[str, Any]) -> str:
    if row["seeds"] == 1:
        return "a single run"
    throughout = f" in each of {row['seeds']} runs" if row["seeds"] < FEW else ""
    if row["ratio_high"] is not None and row["ratio_high"] < 1:
        return f"{row['optimizer']} leads{throughout}"
    if row["ratio_low"] is not None and row["ratio_low"] > 1:
        return f"{row['against']} leads{throughout}"
    return "no clear difference"


def cost_sentences(costs: list[dict[str, Any]]) -> list[str]:
    """One sentence for each entry of `break_even`."""
    return [_cost(entry) for entry in costs]


def _cost(entry: dict[str, Any]) -> str:
    name, against = entry["optimizer"], entry["against"]
    cores = entry["meta_core_seconds"]
    cores = "" if cores is None else f" ({cores:.0f} core-seconds)"
    head = f"{entry['task']}: meta-training took {entry['meta_seconds']:.0f} s{cores}. "
    if entry["step_ms"] and entry["baseline_step_ms"]:
        head += (
            f"A training step by {name} takes {entry['step_ms']:.2f} ms, by {against} "
            f"{entry['baseline_step_ms']:.2f} ms. "
        )
    if entry["seconds"] is None:
        return f"{head}{name} never reaches {against}'s final loss: not repaid here."
    subspace = "".join(
        f"; {who}'s subspace takes {three_digits(seconds)} s before that"
        for who, seconds in ((name, entry["before"]), (against, entry["baseline_before"]))
        if seconds
    )
    reach = (
        f"{name} reaches {against}'s final loss in {entry['steps']:.0f} steps against "
        f"{entry['baseline_steps']:.0f}, {three_digits(entry['seconds'])} s against "
        f"{three_digits(entry['baseline_seconds'])} s{subspace}: "
    )
    if entry["trainings"] is None:
        return f"{head}{reach}in seconds it is never repaid here."
    return f"{head}{reach}repaid after {entry['trainings']:,.0f} trainings."


def three_digits(value: float) -> str:
    """0.45, 27.1, 145,000."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"
