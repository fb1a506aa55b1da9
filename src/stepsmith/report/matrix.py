"""The transfer matrix as a heat map: rules in rows, tasks in columns."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from stepsmith.evaluate.transfer import transfer_matrix
from stepsmith.report.style import STYLE, short, wrapped
from stepsmith.report.verdict import tuning_text

LIMIT = 1.5
"""Ratios from 1 / LIMIT to LIMIT have colours of their own, the same in every figure."""

_COLOURS = LinearSegmentedColormap.from_list("ratio", ["#0b6b63", "#ffffff", "#b83a09"])
_NORM = Normalize(-math.log(LIMIT), math.log(LIMIT))
_TITLES = {"mean_train_loss": "mean loss", "final_train_loss": "final loss"}
_CELL = 1.28, 0.72
"""Inches of a cell, across and down."""


def heat_maps(
    rows: Iterable[dict[str, Any]], metric: str = "mean_train_loss"
) -> dict[tuple[str, int], Figure]:
    """A heat map for each protocol and horizon with a rule, two tasks and a baseline.

    A label that stands for another rule on another task has no row.

    Args:
        rows: of the summary.
        metric: `mean_train_loss` or `final_train_loss`.

    Returns:
        (protocol, horizon) -> figure. A cell says the ratio to the best tuned baseline, its 95 %
        interval and the share of diverged runs where there are any; its colour is the logarithm of
        the ratio; a rule's own tasks are outlined.
    """
    rows = list(rows)
    rules = _rules(rows)
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for cell in transfer_matrix(rows, metric):
        one = len(rules[cell["protocol"], cell["horizon"], cell["rule"]]) == 1
        if one and cell["ratio"] is not None:
            groups.setdefault((cell["protocol"], cell["horizon"]), []).append(cell)
    return {
        group: _heat_map(cells, _title(rows, metric, *group))
        for group, cells in groups.items()
        if len({cell["task"] for cell in cells}) > 1
    }


def _rules(rows: list[dict[str, Any]]) -> dict[tuple[str, int, str], set[str]]:
    """The rules a label stands for, by protocol, horizon and label."""
    found: dict[tuple[str, int, str], set[str]] = {}
    for row in rows:
        told = json.dumps([row["meta_task"], row["rule"], row["hyper_parameters"]], sort_keys=True)
        found.setdefault((row["protocol"], row["horizon"], row["optimizer"]), set()).add(told)
    return found


def _title(rows: list[dict[str, Any]], metric: str, protocol: str, horizon: int) -> str:
    baselines = [
        row
        for row in rows
        if (row["metric"], row["kind"]) == (metric, "baseline")
        and (row["protocol"], row["horizon"]) == (protocol, horizon)
    ]
    against = tuning_text(protocol, baselines, metric.partition("_")[0])
    whose = "" if protocol == "corrected" else f", {protocol}"
    return f"{_TITLES[metric]} over that of the {against}, {horizon:,} steps{whose}"


def matrix_figures(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """Every heat map by the name of its file: `transfer-mean-100`, `transfer-final-100`, ..."""
    return {
        f"transfer-{metric.split('_')[0]}-{horizon}"
        + ("" if protocol == "corrected" else f"-{protocol}"): figure
        for metric in _TITLES
        for (protocol, horizon), figure in heat_maps(rows, metric).items()
    }


def _heat_map(cells: list[dict[str, Any]], title: str) -> Figure:
    rules = list(dict.fromkeys(cell["rule"] for cell in cells))
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        size = 2.6 + _CELL[0] * len(tasks), 1.7 + _CELL[1] * len(rules)
        figure = Figure(figsize=(max(size[0], 6.0), size[1]), layout="constrained")
        axes = figure.add_subplot()
        for cell in cells:
            _draw_cell(axes, cell, tasks.index(cell["task"]), rules.index(cell["rule"]))
        axes.set(xlim=(-0.52, len(tasks) - 0.48), ylim=(len(rules) - 0.48, -0.52))
        axes.set_xticks(range(len(tasks)), [wrapped(task) for task in tasks], fontsize=9)
        axes.set_yticks(range(len(rules)), [wrapped(short(rule), 24) for rule in rules], fontsize=9)
        axes.tick_params(length=0)
        axes.xaxis.tick_top()
        for side in axes.spines.values():
            side.set_visible(False)
        # Two columns are narrower than the title.
        axes.set_title("\n".join(textwrap.wrap(title, 20 + 12 * len(tasks))), pad=12)
        scale = ScalarMappable(_NORM, _COLOURS)
        bar = figure.colorbar(scale, ax=axes, extend="both", fraction=0.05, pad=0.02, aspect=16)
        ticks = (1 / 1.5, 0.8, 1, 1.25, 1.5)
        bar.set_ticks([math.log(tick) for tick in ticks], labels=[f"{tick:.3g}" for tick in ticks])
        bar.ax.tick_params(labelsize=9, length=2)
        bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def _draw_cell(axes: Axes, cell: dict[str, Any], column: int, row: int) -> None:
    level = math.log(cell["ratio"]) if cell["ratio"] > 0 else -math.inf
    axes.add_patch(
        Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, facecolor=_COLOURS(_NORM(level)),
                  edgecolor="#1d1d1f" if cell["own"] else "#dddddd",
                  linewidth=2.2 if cell["own"] else 0.6)
    )  # fmt: skip
    ink = "#ffffff" if abs(level) > 0.75 * math.log(LIMIT) else "#1d1d1f"
    lines = []
    if cell["low"] is not None and cell["high"] is not None:
        lines.append(f"{_number(cell['low'])} to {_number(cell['high'])}")
    if cell["diverged"]:
        lines.append(f"{cell['diverged']:.0%} diverged")
    top = row - 0.13 * len(lines)
    axes.text(column, top, _number(cell["ratio"]), ha="center", va="center", color=ink,
              fontsize=11, fontweight="bold")  # fmt: skip
    for place, line in enumerate(lines, 1):
        axes.text(column, top + 0.27 * place, line, ha="center", va="center", color=ink, fontsize=8)


def _number(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:.3g}"
