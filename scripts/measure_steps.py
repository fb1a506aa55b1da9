"""How large a good rule's steps are, in parameters and in predicted change of the loss.

    python scripts/measure_steps.py --data-dir DIR [RULE:TASK ...]

For each rule on its task: per step the loss, the mean |step| of the coordinates with a gradient,
and sum |gradient| |step|: what the step is predicted to change the loss by, to first order.
"""

from __future__ import annotations

import argparse

import torch

from stepsmith import load, make_task
from stepsmith.unroll import Copies, RuleStepper, Start, roll

PAIRS = ["mlp-mnist:mlp-mnist", "convnet-mnist:convnet-mnist"]
STEPS = (0, 3, 10, 40, 90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="*", default=PAIRS, help="rule's name or file, and task")
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", type=int, default=16)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print("| rule on task | step | loss | mean step | predicted change |\n|---|---|---|---|---|")
    for pair in chosen.pairs:
        rule, _, name = pair.rpartition(":")
        trained, task = load(rule), make_task(name, data_dir=chosen.data_dir)
        copies = Copies(task, range(chosen.seeds))
        stepper = RuleStepper(trained.rule, trained.weights, copies.theta, copies.layout)
        seen: list[tuple[Start, torch.Tensor]] = []

        def hook(start: Start, copies=copies, seen=seen, pair=pair) -> None:
            if seen:
                before, theta_CP = seen.pop()
                step_CP = (copies.theta - theta_CP).abs()
                mean = float(step_CP.sum() / (before.grad_CP != 0).sum())
                change = float((before.grad_CP.abs() * step_CP).sum(1).mean())
                loss = float(before.losses_C.mean())
                print(f"| {pair} | {before.step} | {loss:.2f} | {mean:.4f} | {change:.2f} |")
            if start.step in STEPS:
                seen.append((start, copies.theta.clone()))

        roll(copies, stepper, max(STEPS) + 2, hook=hook)


if __name__ == "__main__":
    main()
