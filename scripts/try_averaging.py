"""Averaged weights of a rule beside the last ones: does an exponential mean over meta-updates help?

    python scripts/try_averaging.py --data-dir DIR [TASK]

Meta-trains in windows of the whole horizon and prints, along the way, the mean loss and that of the
last ten of 100 steps on held-out starts. `docs/what-did-not-work.md` has what came of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from torch import Tensor

from stepsmith import make_rule, make_task
from stepsmith.evaluate import train
from stepsmith.evaluate.run import by_rule
from stepsmith.hub import TrainedRule
from stepsmith.meta import MetaTrainConfig
from stepsmith.meta.trainer import Run

DECAYS = (0.9, 0.97, 0.99)
MARKS = (0.25, 0.5, 0.7, 0.85, 1.0)
"""Shares of the budget after which all are tried."""
STARTS = range(5000, 5024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", default="mlp-mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    task = make_task(chosen.task, data_dir=chosen.data_dir)
    rule = make_rule("joined")
    run = Run([task], rule, MetaTrainConfig(steps=chosen.steps, copies=1, seed=chosen.seed))

    def tried(weights: Mapping[str, Tensor]) -> str:
        trained = TrainedRule(rule, dict(weights), {})
        losses_ST, _ = train(task, by_rule(trained), STARTS, 100, 8)
        return f"{losses_ST.mean():.4f} {losses_ST[:, 90:].mean():.4f}"

    means = {d: {key: torch.zeros_like(w) for key, w in run.weights.items()} for d in DECAYS}
    marks = list(MARKS)
    while marks:
        run.window()
        for decay, mean in means.items():
            for key, weight in run.weights.items():
                mean[key].lerp_(weight.detach(), 1 - decay)
        if run.spent >= marks[0]:
            marks.pop(0)
            last = {key: weight.detach() for key, weight in run.weights.items()}
            told = [f"last {tried(last)}"]
            for decay, mean in means.items():
                whole = 1 - decay**run.progress.updates  # the means began at zero
                told.append(f"{decay} {tried({k: m / whole for k, m in mean.items()})}")
            print(f"{run.spent:.0%}: {'; '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
