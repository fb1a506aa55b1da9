"""What a recurrent state in bfloat16 costs in loss: the bundled rules on their own tasks, paired.

Ratio of the final loss (mean of the last tenth of the steps) with a bfloat16 carry to that with a
float32 one, over the same seeds, with a 95 % interval from a paired bootstrap.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from benchmarks.common import report, row
from stepsmith import TrainedRule, load, make_task
from stepsmith.evaluate import train
from stepsmith.evaluate.statistics import diverged, resamples, score
from stepsmith.tasks import Task
from stepsmith.unroll import Copies, RuleStepper


def final_losses(
    task: Task, trained: TrainedRule, dtype: torch.dtype, seeds: int, steps: int
) -> np.ndarray:
    def make(group: Copies) -> RuleStepper:
        return RuleStepper(
            trained.rule, trained.weights, group.theta, group.layout, carry_dtype=dtype
        )

    losses_ST, _ = train(task, make, range(seeds), steps, 8)
    assert not diverged(losses_ST).any()
    return score(losses_ST, "final")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    chosen = parser.parse_args()
    rows = []
    for name in ("mlp-mnist", "convnet-mnist"):
        task, trained = make_task(name, source="sample"), load(name)
        full_S, half_S = (
            final_losses(task, trained, dtype, chosen.seeds, chosen.steps)
            for dtype in (torch.float32, torch.bfloat16)
        )
        index_RS = resamples(chosen.seeds)
        low, high = np.percentile(half_S[index_RS].mean(1) / full_S[index_RS].mean(1), [2.5, 97.5])
        base = f"{name}, final loss, float32"
        ratio = float(half_S.mean() / full_S.mean())
        rows.append(row(base, float(full_S.mean()), "loss"))
        label = f"{name}, final loss, bfloat16 (95 %: {low:.4f} to {high:.4f})"
        rows.append(row(label, float(half_S.mean()), "loss", base, ratio))
    report("carry_dtype", rows)


if __name__ == "__main__":
    main()
