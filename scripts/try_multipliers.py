"""A trained rule with its step multiplier changed, on paired starts.

    python scripts/try_multipliers.py --data-dir DIR RULE TASK [FACTOR ...]

Prints the mean loss and that of the last ten of 100 steps, and the difference to the multiplier as
it is with its standard error over starts.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch

from stepsmith import load, make_task
from stepsmith.evaluate import train
from stepsmith.evaluate.run import by_rule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rule", help="a bundled rule or a file")
    parser.add_argument("task")
    parser.add_argument("factors", nargs="*", type=float, default=[0.8, 0.9, 1.1, 1.25, 1.5])
    parser.add_argument("--data-dir")
    parser.add_argument("--starts", type=int, default=32)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    task, trained = make_task(chosen.task, data_dir=chosen.data_dir), load(chosen.rule)
    scale = trained.rule.config()["step_scale"]
    base_S = None
    for factor in (1.0, *chosen.factors):
        rule = dataclasses.replace(trained.rule, step_scale=scale * factor)
        changed = dataclasses.replace(trained, rule=rule)
        starts = range(5000, 5000 + chosen.starts)
        losses_ST, _ = train(task, by_rule(changed), starts, 100, 8)
        mean_S = losses_ST.mean(1)
        base_S = mean_S if base_S is None else base_S
        change_S = mean_S - base_S
        print(f"{factor:g}: mean {mean_S.mean():.4f}, last ten {losses_ST[:, 90:].mean():.4f}, "
              f"difference {change_S.mean():+.4f} +- {change_S.std() / len(change_S) ** 0.5:.4f}",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
