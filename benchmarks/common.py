"""Shared by the benchmarks: timing in turn, and records of one form."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stepsmith.machine import machine, versions

RESULTS = Path(__file__).parent / "results"


SHORTEST = 0.1
"""Seconds a timing lasts at least: what is short is repeated, so that it is not timed cold, right
after something else that emptied the caches."""


def one_of(known: Iterable[str]) -> Callable[[str], str]:
    """A type for argparse, whose `choices` refuse an empty list."""
    names = tuple(known)

    def check(name: str) -> str:
        if name not in names:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(names)}")
        return name

    return check


def in_turn(work: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each piece of work, `rounds` times, taking turns after two rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    repeats = dict.fromkeys(work, 1)
    for round_ in range(rounds + 2):
        for name, run in work.items():
            begun = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            seconds = (time.perf_counter() - begun) / repeats[name]
            if round_ > 1:
                times[name].append(seconds)
            elif round_ == 1:  # the first round compiles
                repeats[name] = max(1, math.ceil(SHORTEST / seconds))
    return times


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run in a fresh process, whose peak memory is nobody else's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def row(
    what: str, value: float, unit: str, against: str = "", ratio: float | None = None
) -> dict[str, Any]:
    """One measurement; `ratio` is to the row named by `against`, from the same run."""
    return {"what": what, "value": value, "unit": unit, "against": against, "ratio": ratio}


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median over rounds of above / below: a slow moment hits both of a round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def report(
    name: str,
    rows: list[dict[str, Any]],
    made_on: Mapping[str, Any] | None = None,
    made_with: Mapping[str, Any] | None = None,
) -> None:
    """Print the rows and write `benchmarks/results/NAME.json`; machine and versions are this
    process's, where the rows were not made elsewhere."""
    show({name: rows})
    RESULTS.mkdir(exist_ok=True)
    result = {
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "machine": made_on or machine(), "versions": made_with or versions(), "rows": rows,
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
