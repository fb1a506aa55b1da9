"""After how many trainings meta-training is repaid."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from stepsmith.evaluate.records import Records
from stepsmith.report.style import STYLE, colours, short
from stepsmith.report.verdict import three_digits

LEAST = 0.1
"""Trainings at the left end of a figure: none at all have no place on a logarithmic axis."""


def break_even(rows: list[dict[str, Any]], records: Records) -> list[dict[str, Any]]:
    """For each learned rule and task, what it costs and when that is repaid.

    trainings = seconds of meta-training / (seconds in which the best baseline reaches its own final
    loss - seconds in which the rule reaches it), both with what is spent before each training (on
    a subspace), and None (never) where the rule is not faster or never reaches it. Seconds of
    meta-training are those of the machine that timed the steps, where they were timed there again,
    and otherwise those of the machine it ran on; with those of a subspace that it alone needed.

    Args:
        rows: of the summary.
        records: for the seconds of meta-training.

    Returns:
        Dictionaries with `protocol`, `task`, `horizon`, `optimizer`, `against`, `meta_seconds`,
        `meta_core_seconds` (processor time; None where not recorded), `steps`, `baseline_steps`,
        `step_ms`, `baseline_step_ms`, `seconds`, `baseline_seconds`, `before`, `baseline_before`,
        `trainings`.
    """
    found = []
    for row in rows:
        if row["metric"] != "seconds_to_baseline" or row["kind"] != "learned":
            continue
        meta = _meta_training(records, "seconds", row)
        if meta is None:
            continue
        group = {key: row[key] for key in ("protocol", "task", "horizon")}
        own = {"optimizer": row["optimizer"], **group}
        other = {"optimizer": row["against"], **group}
        baseline_seconds = _value(rows, "seconds_to_baseline", other)
        of_rule = {key: row[key] for key in ("protocol", "task", "optimizer")}
        meta += _most(records, "meta_training_subspace_seconds", **of_rule)
        before, baseline_before = (
            _most(records, "subspace_seconds", task=row["task"], optimizer=name)
            for name in (row["optimizer"], row["against"])
        )
        saved = None
        if row["mean"] is not None and baseline_seconds is not None:
            saved = baseline_seconds + baseline_before - row["mean"] - before
        found.append(
            {
                **group, "optimizer": row["optimizer"], "against": row["against"],
                "meta_seconds": meta,
                "meta_core_seconds": _meta_training(records, "core_seconds", row),
                "steps": _value(rows, "steps_to_baseline", own),
                "baseline_steps": _value(rows, "steps_to_baseline", other),
                "step_ms": _value(rows, "seconds_per_step", own, 1e3, "median"),
                "baseline_step_ms": _value(rows, "seconds_per_step", other, 1e3, "median"),
                "seconds": row["mean"], "baseline_seconds": baseline_seconds,
                "before": before, "baseline_before": baseline_before,
                "trainings": meta / saved if saved and saved > 0 else None,
            }
        )  # fmt: skip
    return found


def _most(records: Records, metric: str, **about: str) -> float:
    """Seconds spent on a subspace, by the dearest record of them; 0 where there is none."""
    blocks = records.select(metric, **about)
    return max((float(block.values.max()) for block in blocks), default=0.0)


def _meta_training(records: Records, unit: str, row: dict[str, Any]) -> float | None:
    """What the meta-training of a row's rule took, timed here where it was; None if unknown."""
    about = {key: row[key] for key in ("protocol", "task", "optimizer")}
    for metric in (f"meta_training_{unit}_here", f"meta_training_{unit}"):
        values = [float(block.values.item()) for block in records.select(metric, **about)]
        if values:
            return float(np.mean(values))
    return None


def _value(
    rows: list[dict[str, Any]], metric: str, wanted: dict[str, Any], unit: float = 1.0,
    field: str = "mean",
) -> float | None:  # fmt: skip
    for row in rows:
        if row["metric"] == metric and all(row[key] == wanted[key] for key in wanted):
            return None if row[field] is None else row[field] * unit
    return None


def break_even_figure(entries: list[dict[str, Any]]) -> Figure | None:
    """Trainings until meta-training is repaid, a line for each task and rule; those never repaid
    set apart, with the reason.

    Args:
        entries: of `break_even`.

    Returns:
        The figure, or None where there are no entries.
    """
    if not entries:
        return None
    palette = colours((entry["optimizer"], "learned") for entry in entries)
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(_heading(entry, entries), []).append(entry)
    repaid = [entry["trainings"] for entry in entries if entry["trainings"] is not None]
    names, place = {}, 0
    with mpl.rc_context(STYLE):
        height = 1.1 + 0.27 * (len(entries) + len(groups))
        figure = Figure(figsize=(10, height), layout="constrained")
        axes, apart = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for heading, group in groups.items():
            axes.text(0.01, place, heading, transform=axes.get_yaxis_transform(), va="center",
                      fontsize=10, fontweight="bold")  # fmt: skip
            for entry in group:
                place += 1
                names[place] = short(entry["optimizer"])
                _draw_entry(axes, apart, entry, place, palette[entry["optimizer"]])
            place += 1
        _finish(axes, apart, names, [max(trainings, LEAST) for trainings in repaid])
    return figure


def _heading(entry: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    heading = entry["task"]
    if len({other["horizon"] for other in entries}) > 1:
        heading += f", {entry['horizon']:,} steps"
    if len({other["protocol"] for other in entries}) > 1:
        heading += f", {entry['protocol']}"
    return heading


def _draw_entry(axes: Axes, apart: Axes, entry: dict[str, Any], place: int, colour: str) -> None:
    if entry["trainings"] is not None:
        at, text = max(entry["trainings"], LEAST), three_digits(entry["trainings"])
        axes.plot(at, place, "o", color=colour, ms=7)
        axes.annotate(
            text, (at, place), (8, 0), textcoords="offset points", va="center", fontsize=9
        )
        return
    reason = f"never reaches {entry['against']}'s final loss"
    if entry["seconds"] is not None:
        own, other = (entry[f"{who}seconds"] + entry[f"{who}before"] for who in ("", "baseline_"))
        reason = f"slower: {three_digits(own)} s against {three_digits(other)} s"
    apart.plot(0.03, place, "x", color=colour, ms=7, mew=2)
    lines = textwrap.wrap(reason, 36)
    apart.annotate("\n".join(lines), (0.03, place), (10, 0), textcoords="offset points",
                   va="center", fontsize=9 if len(lines) == 1 else 7)  # fmt: skip


def _finish(axes: Axes, apart: Axes, names: dict[int, str], repaid: list[float]) -> None:
    """Axes and labels.

    Args:
        axes, apart: of what is repaid, and of what never is.
        names: line -> rule.
        repaid: trainings drawn.
    """
    axes.set_xscale("log")
    # Whole decades, and room for the number beside the last point.
    low, high = min(repaid, default=1), max(repaid, default=1)
    axes.set_xlim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high * 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(max(names) + 0.6, -0.6)
    axes.set_yticks(list(names), list(names.values()), fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="trainings", title="repaid after so many trainings")
    if not repaid:
        axes.text(0.85, 0.5, "none", transform=axes.transAxes, ha="center", color="#777777")
        axes.set_xticks([])
    apart.set(xlim=(0, 1), title="never")
    apart.set_facecolor("#f6f3f0")
    apart.tick_params(length=0, labelbottom=False)
    apart.grid(visible=False)
