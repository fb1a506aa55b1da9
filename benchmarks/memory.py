"""Peak memory of a meta-training window above the process's base, as the unroll grows.

A linear optimizee of 1,001,000 parameters, LSTM 8 with joined features, 200,000 sampled
coordinate-steps whatever the unroll. Every unroll runs in a process of its own, whose base is its
peak after one small window that loads and compiles what there is to load and compile.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource

import torch

from benchmarks.common import report, row
from stepsmith import make_rule
from stepsmith.meta import adjoint_window
from stepsmith.tasks import ModuleTask
from stepsmith.unroll import Copies, RuleStepper, roll

SAMPLES = 200_000
UNROLLS = (20, 50, 100, 200)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(unroll: int | None) -> float:
    """MiB above base of one window, or of deployment alone where `unroll` is None."""
    small, large = linear(10), linear(1000)
    window(small, 2)
    base = peak_mib()
    window(large, unroll)
    return peak_mib() - base


def linear(width: int) -> ModuleTask:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(2, 64, width, generator=generator)
    return ModuleTask(
        lambda: torch.nn.Linear(width, width), torch.nn.functional.mse_loss, (inputs, targets),
        batch_size=8,
    )  # fmt: skip


def window(task: ModuleTask, unroll: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    rule = make_rule("joined")
    weights = {key: value.requires_grad_() for key, value in rule.init(generator).items()}
    copies = Copies(task, [1])
    stepper = RuleStepper(rule, weights, copies.theta, copies.layout)
    if unroll is None:
        roll(copies, stepper, 20)
        return
    share = min(1.0, SAMPLES / (unroll * copies.layout.total))
    adjoint_window(
        copies, stepper, weights, unroll, losses="before", fraction=share, generator=generator
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    context = multiprocessing.get_context("spawn")
    peaks: dict[int | None, float] = {}
    for unroll in (None, *UNROLLS):
        with context.Pool(1) as pool:
            peaks[unroll] = pool.apply(measure, (unroll,))
    deployment = "deployment, 20 steps"
    rows = [row(deployment, peaks[None], "MiB above base")]
    shortest = f"window of {UNROLLS[0]}"
    for unroll in UNROLLS:
        ratio = peaks[unroll] / peaks[UNROLLS[0]]
        rows.append(row(f"window of {unroll}", peaks[unroll], "MiB above base", shortest, ratio))
    report("memory", rows)


if __name__ == "__main__":
    main()
