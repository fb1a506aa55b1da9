"""How much test accuracy batch-norm's running statistics cost at the end of a short training.

    python scripts/measure_statistics.py TASK [RULE ...] [--baseline NAME:RATE] [--data-dir DIR]

Trains 100 steps, measures test accuracy with the running statistics as training left them, then
with statistics estimated anew by forward passes at the last weights.
"""

from __future__ import annotations

import argparse

import torch

from stepsmith import load, make_task
from stepsmith.evaluate.baselines import baseline
from stepsmith.evaluate.run import at_rate, by_rule, by_torch
from stepsmith.tasks import Task
from stepsmith.unroll import Copies, Stepper, roll

BATCHES = 100
"""Of forward passes; statistics of momentum .1 forget nine tenths in 22."""
BATCH_SEED = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task")
    parser.add_argument("rules", nargs="*", default=["general-warmed"])
    parser.add_argument("--baseline", action="append", default=[], metavar="NAME:RATE")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--data-dir")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    task = make_task(chosen.task, data_dir=chosen.data_dir)
    print("optimizer | accuracy, % | statistics anew | gain, points (standard error)")
    for name in [*chosen.rules, *chosen.baseline]:
        copies = Copies(task, range(chosen.seeds))
        roll(copies, stepper(name, copies), chosen.steps)
        as_left_C = copies.test()["accuracy"]
        estimate(task, copies)
        anew_C = copies.test()["accuracy"]
        gain_C = 100 * (anew_C - as_left_C)
        print(
            f"{name} | {100 * as_left_C.mean():.2f} | {100 * anew_C.mean():.2f} | "
            f"{gain_C.mean():+.2f} ({gain_C.std() / len(gain_C) ** 0.5:.2f})"
        )


def stepper(name: str, copies: Copies) -> Stepper:
    """Of a rule, or of NAME:RATE."""
    label, _, rate = name.partition(":")
    if not rate:
        return by_rule(load(name))(copies)
    return by_torch(at_rate(baseline(label), float(rate)))(copies)


@torch.no_grad()
def estimate(task: Task, copies: Copies) -> None:
    """Let the buffers follow batches of training images while the parameters stay."""
    for copy in range(len(copies)):
        params = copies.layout.views(copies.theta[copy])
        buffers = {name: value[copy].clone() for name, value in copies.buffers.items()}
        generator = torch.Generator().manual_seed(BATCH_SEED)
        for _ in range(BATCHES):
            _, buffers, _ = task.loss(params, buffers, task.batch(generator, "train"), None, True)
        for name, value in buffers.items():
            copies.buffers[name][copy] = value


if __name__ == "__main__":
    main()
