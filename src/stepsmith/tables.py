"""What the command line prints as tables."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table
from rich.text import Text

from stepsmith.hub import TrainedRule
from stepsmith.names import shown


def table_of(*head: str, **options: Any) -> Table:
    """A table with these heads, whatever they say."""
    table = Table(**options)
    for text in head:
        table.add_column(Text(shown(text)))
    return table


def add_row(table: Table, *cells: str | Text, style: str | None = None) -> None:
    """Add a line whose texts are shown as they are: no markup, no control characters."""
    shown_cells = (Text(shown(cell)) if isinstance(cell, str) else cell for cell in cells)
    table.add_row(*shown_cells, style=style)


def losses(rows: list[dict[str, Any]]) -> Table:
    """The losses of a summary's rows."""
    told = [row for row in rows if row["metric"] in ("mean_train_loss", "final_train_loss")]
    table = table_of("task", "optimizer", "metric", "mean", "95 %", "ratio", "diverged")
    for row in sorted(told, key=lambda r: (r["task"], r["metric"], r["mean"] or 9e9)):
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        interval = f"{row['low']:.4g} to {row['high']:.4g}" if row["low"] is not None else ""
        metric = row["metric"].replace("_train_loss", " loss")
        mean = "" if row["mean"] is None else f"{row['mean']:.4g}"
        add_row(
            table, row["task"], row["optimizer"], metric, mean, interval, ratio,
            f"{row['diverged']}/{row['seeds']}",
            style="bold" if row["kind"] == "learned" else None,
        )  # fmt: skip
    return table


def matrix(cells: list[dict[str, Any]], label: str) -> Table:
    """A transfer matrix: ratio, interval and share of diverged runs in each cell, a rule's own
    tasks in bold.

    Args:
        cells: of `transfer_matrix`.
        label: what the ratios are of.
    """
    found = {(cell["rule"], cell["task"]): cell for cell in cells}
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    table = table_of(f"{label}, ratio", *tasks)
    for rule in dict.fromkeys(cell["rule"] for cell in cells):
        own = [found.get((rule, task)) for task in tasks]
        add_row(table, rule, *("" if cell is None else _cell(cell) for cell in own))
    return table


def _cell(cell: dict[str, Any]) -> Text:
    lines = [Text("" if cell["ratio"] is None else f"{cell['ratio']:.3f}")]
    if cell["low"] is not None and cell["high"] is not None:
        lines.append(Text(f"{cell['low']:.3f} to {cell['high']:.3f}"))
    if cell["diverged"]:
        lines.append(Text(f"{cell['diverged']:.0%} diverged", "red"))
    whole = Text("\n").join(lines)
    whole.style = "bold" if cell["own"] else ""
    return whole


def described(trained: TrainedRule) -> Table:
    """What a trained rule is and how it came to be."""
    manifest = trained.manifest
    weights = sum(value.numel() for value in trained.weights.values())
    cores = f"{manifest['core_seconds']} core-seconds, " if "core_seconds" in manifest else ""
    stages = [
        f"{stage['horizon']} ({stage['inner_steps']} inner steps, ended: {stage['ended']})"
        for stage in manifest.get("curriculum", [])
    ]
    lines = [
        ("name", trained.name),
        ("rule", f"{type(trained.rule).__name__} {json.dumps(trained.rule.config())}"),
        ("weights", f"{weights:,}, fingerprint {trained.fingerprint[:16]}"),
        ("tasks", ", ".join(manifest.get("tasks", [])) or "unknown"),
        ("data", str(manifest.get("data", "unknown"))),
        ("horizon", str(trained.horizon)),
        *([("curriculum", ", ".join(stages))] if stages else []),
        ("validation", json.dumps(manifest.get("validation"))),
        ("meta-training", json.dumps(manifest.get("meta_training"))),
        ("cost", f"{manifest.get('seconds')} s, {cores}{manifest.get('inner_steps')} inner steps"),
        *([("made on", _machine(manifest["machine"]))] if "machine" in manifest else []),
        ("version", str(manifest.get("version"))),
        ("licence", str(manifest.get("licence"))),
    ]
    table = Table(show_header=False, box=None, pad_edge=False)
    for label, value in lines:
        add_row(table, Text(label, "bold"), value)
    return table


def _machine(machine: dict[str, Any]) -> str:
    """A manifest's machine in words."""
    told = [machine.get("processor"), machine.get("accelerator")]
    told.append(f"{machine.get('threads')} threads on {machine.get('cores')} cores")
    return ", ".join(str(part) for part in told if part)
