"""Shared by the benchmarks: timing in turn, and records of one form."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stepsmith.machine import machine, versions

RESULTS = Path(__file__).parent / "results"


def in_turn(work: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each piece of work, `rounds` times, taking turns after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds + 1):
        for name, run in work.items():
            begun = time.perf_counter()
            run()
            if round_:
                times[name].append(time.perf_counter() - begun)
    return times


def row(
    what: str, value: float, unit: str, against: str = "", ratio: float | None = None
) -> dict[str, Any]:
    """One measurement; `ratio` is to the row named by `against`, from the same run."""
    return {"what": what, "value": value, "unit": unit, "against": against, "ratio": ratio}


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median over rounds of above / below: a slow moment hits both of a round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def report(name: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows and write `benchmarks/results/NAME.json`."""
    show({name: rows})
    RESULTS.mkdir(exist_ok=True)
    result = {
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "machine": machine(), "versions": versions(), "rows": rows,
    }  # fmt: skip
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def show(results: Mapping[str, list[dict[str, Any]]]) -> None:
    """Print rows as one table, a section a benchmark."""
    table = Table("what", "value", "unit", "ratio", "against", title=", ".join(results))
    for rows in results.values():
        for entry in rows:
            ratio = "" if entry["ratio"] is None else f"{entry['ratio']:.2f}"
            table.add_row(
                entry["what"], f"{entry['value']:,.4g}", entry["unit"], ratio, entry["against"]
            )
        table.add_section()
    Console().print(table)


def summary() -> None:
    """Print every committed or just written result's rows that have a ratio, as one table."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    show(
        {
            name: [entry for entry in result["rows"] if entry["ratio"] is not None]
            for name, result in results.items()
        }
    )
