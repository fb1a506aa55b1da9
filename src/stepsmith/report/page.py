"""One HTML page that opens with no network: everything is inside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from stepsmith.evaluate.records import Records
from stepsmith.names import shown
from stepsmith.report import figures
from stepsmith.report.break_even import break_even, break_even_figure
from stepsmith.report.epochs import accuracy_curves, accuracy_spreads, update_tracks
from stepsmith.report.figures import Panel
from stepsmith.report.findings import findings_tables
from stepsmith.report.matrix import matrix_figures
from stepsmith.report.style import svg
from stepsmith.report.verdict import cost_sentences, verdicts

COLUMNS = (
    ("mean_train_loss", "mean loss"), ("final_train_loss", "final loss"),
    ("test_loss", "test loss"), ("test_accuracy", "test accuracy"),
    ("steps_to_baseline", "steps to best"), ("seconds_to_baseline", "seconds to best"),
    ("seconds_per_step", "ms a step"),
)  # fmt: skip


def render(
    records: Records,
    rows: list[dict[str, Any]],
    *,
    title: str,
    command: str,
    config: Mapping[str, Any],
    machine: Mapping[str, Any],
    versions: Mapping[str, Any],
) -> str:
    """The page.

    Args:
        records: for the figures.
        rows: of the summary.
        title: of the page.
        command: that reproduces it.
        config: shown as it is, its `findings` as tables too.
        machine, versions: shown as they are.
    """
    costs = break_even(rows, records)
    environment = Environment(loader=PackageLoader("stepsmith.report", "."), autoescape=True)
    environment.filters["svg"] = _inline
    page = environment.get_template("page.html.j2").render(
        title=title, command=command, verdicts=verdicts(rows),
        costs=cost_sentences(costs), repaid=break_even_figure(costs),
        matrices=list(matrix_figures(rows).values()),
        panels=[_panel(records, rows, panel) for panel in figures.panels(records)],
        meta=figures.meta_curve(records),
        findings=findings_tables(config.get("findings", {})),
        config=json.dumps(config, indent=2), machine=machine, versions=versions,
    )  # fmt: skip
    return shown(page, keep="\n\t")


def _inline(figure: Figure | None) -> Markup:
    """A figure we drew ourselves; what XML reads in names was escaped by matplotlib."""
    return Markup(svg(figure)) if figure is not None else Markup("")


def _panel(records: Records, rows: list[dict[str, Any]], panel: Panel) -> dict[str, Any]:
    own = [row for row in rows if panel.holds(row)]
    measured = {row["metric"] for row in own}
    columns = {metric: label for metric, label in COLUMNS if metric in measured}
    order: dict[str, float] = {}
    for row in own:
        if row["metric"] == "mean_train_loss":
            order[row["optimizer"]] = row["mean"] if row["mean"] is not None else float("inf")
    lines = []
    for optimizer in sorted(order, key=order.__getitem__):
        cells = {row["metric"]: row for row in own if row["optimizer"] == optimizer}
        first = cells["mean_train_loss"]
        lines.append(
            {
                "name": optimizer, "learned": first["kind"] == "learned",
                "rates": _rates(cells), "diverged": f"{first['diverged']}/{first['seeds']}",
                "cells": [_cell(cells.get(metric), metric) for metric in columns],
            }
        )  # fmt: skip
    data = next(iter(panel.select(records, "train_loss", "test"))).key.data
    return {
        "name": panel.title, "data": data, "columns": list(columns.values()), "lines": lines,
        "curves": figures.loss_curves(records, panel),
        "accuracy": figures.accuracies(records, panel),
        "further": [
            figure
            for draw in (accuracy_curves, accuracy_spreads, update_tracks)
            if (figure := draw(records, panel)) is not None
        ],
        "cost": figures.step_costs(records, panel),
        "tuning": figures.tuning_curves(records, panel),
    }  # fmt: skip


def _rates(cells: dict[str, dict[str, Any]]) -> str:
    if cells["mean_train_loss"]["kind"] == "learned":
        return ""
    rates = [cells[m]["hyper_parameters"].get("lr") for m in ("mean_train_loss", "final_train_loss")
             if m in cells]  # fmt: skip
    return " / ".join(
        # Of an optimizer as it was given, whatever it was given.
        f"{rate:g}" if isinstance(rate, int | float) else str(rate)
        for rate in rates[: 1 + (rates[1:] != rates[:1])]
        if rate is not None
    )


def _cell(row: dict[str, Any] | None, metric: str) -> dict[str, str]:
    """Value, interval and ratio of a row as text."""
    if row is None:
        return {"value": "", "interval": "", "ratio": ""}
    unit = {"test_accuracy": 100, "seconds_per_step": 1e3}.get(metric, 1)
    value = row["median"] if metric == "seconds_per_step" else row["mean"]
    text = "never" if value is None else f"{value * unit:.4g}"
    bounds = (row["low"], row["high"])
    interval = ""
    if value is not None and None not in bounds:
        interval = " to ".join(f"{bound * unit:.4g}" for bound in bounds)
    ratio = ""
    if row["ratio"] is not None:
        ratio = (
            f"{row['ratio']:+.2f} points" if metric == "test_accuracy" else f"×{row['ratio']:.3f}"
        )
    return {"value": text, "interval": interval, "ratio": ratio}
