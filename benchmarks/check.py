"""Whether anything became slower: measures the ratios again and holds them against the record's.

Ratios to a base of the same run, since machines differ and are noisy; a ratio that fell by more
than a quarter fails. Exit code 1 where one did.

    python -m benchmarks.check [--rounds N] [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import meta_training, replay, step
from benchmarks.common import RESULTS, one_of

ALLOWED = 0.25
MEASURES: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "step": lambda rounds: step.measure(rounds, shipped=True),
    "replay": replay.measure,
    "meta_training": meta_training.measure,
}
FASTER = ("ns/coordinate", "ns/coordinate-step", "inner steps/s")
"""Units of rows whose ratio says how many times faster than the base something is."""


def slower(
    committed: list[dict[str, Any]], measured: list[dict[str, Any]]
) -> list[tuple[str, str, float, float]]:
    """(what, against, committed ratio, measured ratio) of each ratio that fell too far.

    Rows of one list only, such as those of a compiler that is not here, are passed over.
    """
    now = {(r["what"], r["against"]): r["ratio"] for r in measured if r["unit"] in FASTER}
    fell = []
    for entry in committed:
        ratio = now.get((entry["what"], entry["against"]))
        if ratio is not None and ratio < entry["ratio"] * (1 - ALLOWED):
            fell.append((entry["what"], entry["against"], entry["ratio"], ratio))
    return fell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", type=one_of(MEASURES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    fell = []
    for name in chosen.names or MEASURES:
        committed = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
        fell += slower(committed, MEASURES[name](chosen.rounds))
    for what, against, before, now in fell:
        print(f"slower: {what} is {now:.2f} times {against}, was {before:.2f}")
    if fell:
        sys.exit(1)
    print(f"no ratio of {', '.join(chosen.names or MEASURES)} fell by more than {ALLOWED:.0%}")


if __name__ == "__main__":
    main()
