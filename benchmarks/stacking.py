"""Gradients per second of 8 copies: stacked by vmap, looped, and side by side in threads.

The measurement behind `stacking="auto"` of `stepsmith.tasks.ModuleTask`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import get_args

from benchmarks.common import in_turn, median_ratio, report, row
from stepsmith import make_task
from stepsmith.tasks.base import Stacking
from stepsmith.unroll import Copies

COPIES = 8


def gradients(task_name: str, stacking: Stacking) -> Callable[[], None]:
    task = make_task(task_name, source="sample", stacking=stacking)
    copies = Copies(task, range(COPIES))
    batch = copies.batches("train")

    def run() -> None:
        for _ in range(3):
            copies.gradients(batch)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    rows = []
    for task in ("mlp-mnist", "convnet-mnist"):
        times = in_turn({way: gradients(task, way) for way in get_args(Stacking)}, rounds)
        for way, seconds in times.items():
            rate = 3 * COPIES / sorted(seconds)[rounds // 2]
            rows.append(
                row(f"{task}, {way}", rate, "gradients/s", f"{task}, loop",
                    median_ratio(times["loop"], seconds))
            )  # fmt: skip
    report("stacking", rows)


if __name__ == "__main__":
    main()
