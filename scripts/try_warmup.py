"""A trained rule in relative units whose steps are warmed up, on paired starts.

    python scripts/try_warmup.py --data-dir DIR RULE TASK [TASK ...]

For each task prints n_1 / P, the mean magnitude of the first gradient, and by how much gradients
grow from it at most (median over starts); then by the steps of the warm-up the mean loss, that of
the last ten of 100 steps, and the largest.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from stepsmith import load, make_task
from stepsmith.evaluate.run import by_rule
from stepsmith.rules.lstm import UNITS
from stepsmith.rules.units import RelativeUnits
from stepsmith.unroll import Copies, Start, roll

STEPS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rule", help="a bundled rule or a file")
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--warmups", nargs="+", type=int, default=[1, 3, 5, 10])
    parser.add_argument("--data-dir")
    parser.add_argument("--starts", type=int, default=16)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    trained = load(chosen.rule)
    trained = replace(trained, rule=replace(trained.rule, scaling="warmed"))
    for name in chosen.tasks:
        task = make_task(name, data_dir=chosen.data_dir)
        for warmup in chosen.warmups:
            UNITS["warmed"] = RelativeUnits(warmup=warmup)
            copies, norms = Copies(task, range(5000, 5000 + chosen.starts)), []

            def hook(start: Start, norms=norms) -> None:
                norms.append(start.grad_CP.abs().mean(1))

            losses_TC = roll(copies, by_rule(trained)(copies), STEPS, hook=hook)
            norms_TC = torch.stack(norms)
            growth = float((norms_TC / norms_TC[0]).max(0).values.median())
            print(f"{name}: warm-up {warmup}: mean {losses_TC.mean():.4f}, "
                  f"last ten {losses_TC[-10:].mean():.4f}, largest {losses_TC.max():.2f}; "
                  f"n_1 / P {float(norms_TC[0].mean()):.2g}, growth {growth:.3g}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
