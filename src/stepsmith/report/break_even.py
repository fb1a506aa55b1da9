"""After how many trainings meta-training is repaid."""

from __future__ import annotations

from typing import Any

import numpy as np

from stepsmith.evaluate.records import Records


def break_even(rows: list[dict[str, Any]], records: Records) -> list[dict[str, Any]]:
    """For each learned rule and task, what it costs and when that is repaid.

    trainings = seconds of meta-training / (seconds in which the best baseline reaches its own final
    loss - seconds in which the rule reaches it), and None (never) where the rule is not faster or
    never reaches it.

    Args:
        rows: of the summary.
        records: for the seconds of meta-training.

    Returns:
        Dictionaries with `task`, `optimizer`, `against`, `meta_seconds`, `steps`, `baseline_steps`,
        `step_ms`, `baseline_step_ms`, `seconds`, `baseline_seconds`, `trainings`.
    """
    found = []
    for row in rows:
        if row["metric"] != "seconds_to_baseline" or row["kind"] != "learned":
            continue
        meta = [
            float(block.values.item())
            for block in records.select("meta_training_seconds", optimizer=row["optimizer"])
        ]
        if not meta:
            continue
        group = {key: row[key] for key in ("protocol", "task", "horizon")}
        own = {"optimizer": row["optimizer"], **group}
        other = {"optimizer": row["against"], **group}
        baseline_seconds = _value(rows, "seconds_to_baseline", other)
        saved = None
        if row["mean"] is not None and baseline_seconds is not None:
            saved = baseline_seconds - row["mean"]
        found.append(
            {
                **group, "optimizer": row["optimizer"], "against": row["against"],
                "meta_seconds": float(np.mean(meta)),
                "steps": _value(rows, "steps_to_baseline", own),
                "baseline_steps": _value(rows, "steps_to_baseline", other),
                "step_ms": _value(rows, "seconds_per_step", own, 1e3, "median"),
                "baseline_step_ms": _value(rows, "seconds_per_step", other, 1e3, "median"),
                "seconds": row["mean"], "baseline_seconds": baseline_seconds,
                "trainings": float(np.mean(meta)) / saved if saved and saved > 0 else None,
            }
        )  # fmt: skip
    return found


def _value(
    rows: list[dict[str, Any]], metric: str, wanted: dict[str, Any], unit: float = 1.0,
    field: str = "mean",
) -> float | None:  # fmt: skip
    for row in rows:
        if row["metric"] == metric and all(row[key] == wanted[key] for key in wanted):
            return None if row[field] is None else row[field] * unit
    return None
