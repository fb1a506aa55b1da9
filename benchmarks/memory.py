"""Peak memory of a meta-training window above the process's base, as the unroll grows.

A linear optimizee of 1,001,000 parameters, LSTM 8 with joined features, 200,000 sampled
coordinate-steps whatever the unroll. Every unroll runs in processes of its own, whose base is their
peak after one small window that loads and compiles what there is to load and compile.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.common import alone, report, row
from stepsmith import make_rule
from stepsmith.machine import peak_memory
from stepsmith.meta import adjoint_window
from stepsmith.tasks import ModuleTask, Task
from stepsmith.unroll import Copies, RuleStepper, roll

SAMPLES = 200_000
"""Coordinate-steps replayed a window, all copies together."""
UNROLLS = (20, 50, 100, 200)
PROCESSES = 7
"""Of each unroll, whose median is taken: where the allocator puts things differs from run to run by
a tenth."""


def peak_mib() -> float:
    return peak_memory() / 2**20


def measure(unroll: int | None) -> float:
    """MiB above base of one window, or of deployment alone where `unroll` is None."""
    small, large = linear(10), linear(1000)
    one_window(small, 1, 2, 1.0)
    base = peak_mib()
    if unroll is None:
        group, stepper, _ = started(large, 1)
        roll(group, stepper, 20)
    else:
        one_window(large, 1, unroll, SAMPLES / (unroll * 1_001_000))
    return peak_mib() - base


def linear(width: int) -> ModuleTask:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(2, 64, width, generator=generator)
    return ModuleTask(
        lambda: torch.nn.Linear(width, width), torch.nn.functional.mse_loss, (inputs, targets),
        batch_size=8,
    )  # fmt: skip


def one_window(
    task: Task, copies: int, unroll: int, share: float, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The meta-gradient of one window of a fresh rule; `seed` draws the sample alone."""
    group, stepper, weights = started(task, copies)
    draw = torch.Generator().manual_seed(seed)
    return adjoint_window(
        group, stepper, weights, unroll, losses="before", fraction=share, generator=draw
    ).gradients


def started(task: Task, copies: int) -> tuple[Copies, RuleStepper, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rule = make_rule("joined", scaling="absolute")
    weights = {key: value.requires_grad_() for key, value in rule.init(generator).items()}
    group = Copies(task, range(copies))
    return group, RuleStepper(rule, weights, group.theta, group.layout), weights


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    peaks = {
        unroll: statistics.median(alone(measure, unroll) for _ in range(PROCESSES))
        for unroll in (None, *UNROLLS)
    }
    deployment = "deployment, 20 steps"
    rows = [row(deployment, peaks[None], "MiB above base")]
    shortest = f"window of {UNROLLS[0]}"
    for unroll in UNROLLS:
        ratio = peaks[unroll] / peaks[UNROLLS[0]]
        rows.append(row(f"window of {unroll}", peaks[unroll], "MiB above base", shortest, ratio))
    report("memory", rows)


if __name__ == "__main__":
    main()
