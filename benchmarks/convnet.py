"""A gradient of the papers' ConvNets: layer by layer, and with the compiled residual block.

python -m benchmarks.convnet [--rounds N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from unittest import mock

from benchmarks.common import in_turn, median_ratio, report, row
from stepsmith import make_task
from stepsmith.tasks.networks import residual_block
from stepsmith.unroll import Copies

TASKS = ("convnet-mnist", "convnet5x5-mnist", "convnet-sigmoid-mnist")


def gradient(name: str, compiled: bool) -> Callable[[], None]:
    copies = Copies(make_task(name, source="sample"), [0])
    batch = copies.batches("train")
    native = residual_block._native if compiled else lambda: None

    def run() -> None:
        with mock.patch.object(residual_block, "_native", native):
            copies.gradients(batch)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    rows = []
    for task in TASKS:
        work = {way: gradient(task, way == "compiled") for way in ("layers", "compiled")}
        times = in_turn(work, rounds)
        for way, seconds in times.items():
            rate = 1 / sorted(seconds)[rounds // 2]
            ratio = median_ratio(times["layers"], seconds)
            rows.append(row(f"{task}, {way}", rate, "gradients/s", f"{task}, layers", ratio))
    report("convnet", rows)


if __name__ == "__main__":
    main()
