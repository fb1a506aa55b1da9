"""What a step in a subspace costs beside the gradient, and what it takes to find the subspace.

- Project, the optimizer of c, lift: a ResNet-20 (0.27 million parameters) on 32x32 images, batch
  128, 40 directions; ratios are shares of one forward and backward pass of the same run.
- Building it from 60 snapshots of 1,000,000 numbers (or `--parameters`) on disk: seconds, and peak
  memory above the process's base as a multiple of the basis itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import alone, in_turn, median_ratio, report, row
from benchmarks.memory import peak_mib
from stepsmith import LearnedOptimizer, SubspaceOptimizer, TrainedRule, make_rule
from stepsmith.subspace import Snapshots, from_trajectory, products, random
from stepsmith.tasks.networks import get_network

BATCH = 128
SNAPSHOTS = 60


def measure(rounds: int, network: str = "resnet20", d: int = 40) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    model = get_network(network)(torch.Size([3, 32, 32]), 10)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (BATCH,), generator=generator)

    def gradient() -> None:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()

    basis = random(model, d, generator=generator)
    half = dataclasses.replace(basis, blocks=tuple(b.bfloat16() for b in basis.blocks))
    rule = make_rule("rnnprop")
    trained = TrainedRule(rule, rule.init(generator), {})
    inner = {
        "SGD": partial(torch.optim.SGD, lr=0.0, momentum=0.9),
        "LSTM 8": partial(LearnedOptimizer, rule=trained, lr=0.0),
    }
    base = f"{network}, batch {BATCH}, forward and backward"
    gradient()
    work: dict[str, Callable[[], object]] = {base: gradient}
    g, c = torch.randn(basis.layout.total), torch.randn(d)
    for stored, subspace in (("float32", basis), ("bfloat16", half)):
        work[f"P g, {stored}"] = partial(products.projected, subspace.blocks, g)
        work[f"P^T c, {stored}"] = partial(products.lifted, subspace.blocks, c)
    for name, make in inner.items():
        small = torch.nn.Parameter(torch.zeros(d))
        small.grad = torch.randn(d)
        work[f"{name} on {d} coefficients"] = make([small]).step
    # No rate: every step is of the same weights and gradients, and none is taken away.
    for stored, subspace in (("float32", basis), ("bfloat16", half)):
        for name, make in inner.items():
            work[f"whole step, {name}, {stored}"] = SubspaceOptimizer(model, subspace, make).step
    work["SGD with momentum in full space"] = inner["SGD"](model.parameters()).step
    times = in_turn(work, rounds)
    rows = []
    for name, seconds in times.items():
        value = statistics.median(seconds) * 1e3
        rows.append(
            row(name, value, "ms")
            if name == base
            else row(name, value, "ms", base, median_ratio(seconds, times[base]))
        )
    return rows


def write(folder: Path, parameters: int) -> None:
    """Snapshots of a random walk with inertia."""
    model = torch.nn.Linear(parameters, 1, bias=False)
    speed, snapshots = torch.zeros_like(model.weight), Snapshots(folder, model)
    for _ in range(SNAPSHOTS):
        snapshots()
        speed = 0.8 * speed + 1e-3 * torch.randn(model.weight.shape)
        with torch.no_grad():
            model.weight += speed


def build(folder: Path, d: int) -> tuple[float, float]:
    """(MiB above base, seconds) of finding d components."""
    with tempfile.TemporaryDirectory() as small:
        write(Path(small), 1000)
        from_trajectory(small, d)
    base, begun = peak_mib(), time.perf_counter()
    from_trajectory(folder, d)
    return peak_mib() - base, time.perf_counter() - begun


def building(parameters: int, d: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        alone(write, Path(folder), parameters)
        memory, seconds = alone(build, Path(folder), d)
    basis = d * parameters * 4 / 2**20
    what = f"{SNAPSHOTS} snapshots of {parameters:,} numbers, {d} components"
    held = f"{what}: the basis"
    return [
        row(held, basis, "MiB"),
        row(f"{what}: peak", memory, "MiB above base", held, memory / basis),
        row(f"{what}: time", seconds, "s"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--directions", type=int, default=40)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    chosen = parser.parse_args()
    rows = building(chosen.parameters, chosen.directions)
    report("subspace", rows + measure(chosen.rounds, chosen.network, chosen.directions))


if __name__ == "__main__":
    main()
