"""How time and memory grow: with parameters, unroll, copies and the sampled share.

LSTM 8 with joined features on linear optimizees (batch 8) of 10^4 to 10^8 parameters, and on the
MLP for the share, where the variance of the meta-gradient stands beside the cost: an unbiased
estimate from a share of the coordinates, over 64 draws of one and the same window, relative to the
squared norm of the whole. Every point runs in a process of its own, whose base memory is its peak
after one small window that loads and compiles what there is to load and compile.

Writes `benchmarks/results/scaling.json` and `docs/images/scaling.svg`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, alone, report, row
from benchmarks.memory import SAMPLES, linear, one_window, peak_mib
from stepsmith import LearnedOptimizer, load, make_task
from stepsmith.tasks import Task

FIGURE = Path(__file__).parents[1] / "docs" / "images" / "scaling.svg"

PARAMETERS = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
UNROLLS = (10, 30, 100, 300, 1000)
COPIES = (1, 4, 16, 64)
SHARES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
DRAWS = 64


def sized(parameters: int) -> Task:
    return linear(round(parameters**0.5))


def timed(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def meta_training(parameters: int, unroll: int, copies: int) -> tuple[float, float]:
    """Seconds an inner step and copy, and MiB above base."""
    one_window(sized(100), 1, 2, 1.0)
    base = peak_mib()
    task = sized(parameters)
    share = min(1.0, SAMPLES / (unroll * copies * parameters))
    rounds = 1 if parameters >= 10_000_000 else 3
    seconds = timed(lambda: one_window(task, copies, unroll, share), rounds)
    return seconds / unroll / copies, peak_mib() - base


def deployment(parameters: int) -> tuple[float, float]:
    """Seconds a step of the deployed optimizer, its gradient not counted, and MiB above base."""
    small = torch.nn.Parameter(torch.zeros(100))
    small.grad = torch.zeros(100)
    LearnedOptimizer([small], load("mlp-mnist")).step()
    base = peak_mib()
    param = torch.nn.Parameter(torch.zeros(parameters))
    param.grad = torch.full((parameters,), 1e-3)
    optimizer = LearnedOptimizer([param], load("mlp-mnist"))
    optimizer.step()
    seconds = timed(optimizer.step, 3 if parameters >= 10_000_000 else 9)
    return seconds, peak_mib() - base


def share_of(share: float) -> tuple[float, float]:
    """Seconds an inner step, and the variance of the meta-gradient over the draws of coordinates,
    relative to the squared norm of the whole."""
    task = make_task("mlp-mnist", source="sample")
    whole = flat(one_window(task, 1, 20, 1.0))
    seconds = timed(lambda: one_window(task, 1, 20, share), 9)
    draws = torch.stack([flat(one_window(task, 1, 20, share, s)) for s in range(DRAWS)])
    variance = (draws - whole).square().sum(1).mean() / whole.square().sum()
    return seconds / 20, float(variance)


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.reshape(-1) for value in gradients.values()])


def figure(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "stepsmith"
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    def series(label: str, unit: str) -> tuple[list[float], list[float]]:
        found = [r for r in rows if r["what"].startswith(label + ": ") and r["unit"] == unit]
        found = [r for r in found if r["value"] > 0]  # a whole sample has no variance
        places = [float(r["what"].split(": ")[1].split()[0].replace(",", "")) for r in found]
        return places, [r["value"] for r in found]

    panels, axes = plt.subplots(2, 2, figsize=(9, 6.4), constrained_layout=True)
    lines = {
        (0, 0): ("parameters", ["meta-training, parameters", "deployment, parameters"]),
        (0, 1): ("steps of a window", ["meta-training, unroll"]),
        (1, 0): ("copies", ["meta-training, copies"]),
        (1, 1): ("sampled share", ["meta-training, share"]),
    }
    for place, (label, names) in lines.items():
        axis = axes[place]
        second = axis.twinx()
        for name in names:
            style = "--" if name.startswith("deployment") else "-"
            what = name.split(",")[0]
            x, y = series(name, "ms/step")
            axis.loglog(x, y, style, marker="o", color="#c2410c", label=f"{what}, time")
            unit = "variance / norm^2" if place == (1, 1) else "MiB above base"
            x, y = series(name, unit)
            other = "variance" if place == (1, 1) else f"{what}, memory"
            second.loglog(x, y, style, marker="s", color="#1d4ed8", label=other)
        axis.set_xlabel(label)
        axis.set_ylabel("ms a step (and copy)", color="#c2410c")
        second.set_ylabel(unit, color="#1d4ed8")
        # Room above for the legend, and at least a decade, or noise would look like a trend.
        for own in (axis, second):
            low, high = own.get_ylim()
            own.set_ylim(low / 1.5, high * 6)
            own.yaxis.set_minor_formatter(NullFormatter())
        handles = [axis.get_legend_handles_labels(), second.get_legend_handles_labels()]
        axis.legend(
            handles[0][0] + handles[1][0], handles[0][1] + handles[1][1], fontsize=7, ncols=2,
            loc="upper center", handlelength=2.6, frameon=False,
        )  # fmt: skip
        axis.grid(alpha=0.25)
    FIGURE.parent.mkdir(exist_ok=True)
    panels.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=PARAMETERS[-1])
    parser.add_argument("--redraw", action="store_true", help="the figure alone, from the record")
    chosen = parser.parse_args()
    if chosen.redraw:
        figure(json.loads((RESULTS / "scaling.json").read_text())["rows"])
        return
    rows = []

    def add(label: str, place: str, measured: tuple[float, float], unit: str) -> None:
        rows.append(row(f"{label}: {place}", measured[0] * 1e3, "ms/step"))
        rows.append(row(f"{label}: {place}", measured[1], unit))

    memory = "MiB above base"
    for parameters in (p for p in PARAMETERS if p <= chosen.largest):
        place = f"{parameters:,} parameters"
        unroll = 4 if parameters > 10_000_000 else 20
        measured = alone(meta_training, parameters, unroll, 1)
        add("meta-training, parameters", place, measured, memory)
        add("deployment, parameters", place, alone(deployment, parameters), memory)
    for unroll in UNROLLS:
        measured = alone(meta_training, 100_000, unroll, 1)
        add("meta-training, unroll", f"{unroll} steps", measured, memory)
    for copies in COPIES:
        measured = alone(meta_training, 10_000, 20, copies)
        add("meta-training, copies", f"{copies} copies", measured, memory)
    for share in SHARES:
        add("meta-training, share", f"{share} share", alone(share_of, share), "variance / norm^2")
    report("scaling", rows)
    figure(rows)


if __name__ == "__main__":
    main()
