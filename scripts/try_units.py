"""A trained rule in relative units under other warm-ups or floors of its steps, on paired starts.

    python scripts/try_units.py --data-dir DIR RULE TASK [TASK ...] --warmups 1 3 5 10
    python scripts/try_units.py --data-dir DIR RULE TASK --floors .03 .3 --steps 1000

For each task prints n_1 / P, the mean magnitude of the first gradient, and by how much gradients
grow from it at most (median over starts); then by warm-up and floor the mean loss, that of the last
tenth, and the largest.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace

import torch

from stepsmith import load, make_task
from stepsmith.evaluate.run import by_rule
from stepsmith.evaluate.statistics import last_tenth
from stepsmith.rules.lstm import UNITS
from stepsmith.rules.units import RelativeUnits
from stepsmith.unroll import Copies, Start, roll


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rule", help="a bundled rule or a file")
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--warmups", nargs="+", type=int, default=[1])
    parser.add_argument("--floors", nargs="+", type=float, default=[RelativeUnits.floor])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--data-dir")
    parser.add_argument("--starts", type=int, default=16)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    trained = load(chosen.rule)
    trained = replace(trained, rule=replace(trained.rule, scaling="warmed"))
    for name in chosen.tasks:
        task = make_task(name, data_dir=chosen.data_dir)
        for warmup, floor in itertools.product(chosen.warmups, chosen.floors):
            UNITS["warmed"] = RelativeUnits(floor=floor, warmup=warmup)
            copies, norms = Copies(task, range(5000, 5000 + chosen.starts)), []

            def hook(start: Start, norms=norms) -> None:
                norms.append(start.grad_CP.abs().mean(1))

            losses_TC = roll(copies, by_rule(trained)(copies), chosen.steps, hook=hook)
            norms_TC = torch.stack(norms)
            growth = float((norms_TC / norms_TC[0]).max(0).values.median())
            last = losses_TC[-last_tenth(chosen.steps) :].mean()
            print(f"{name}: warm-up {warmup}, floor {floor:g}: mean {losses_TC.mean():.4f}, "
                  f"last tenth {last:.4f}, largest {losses_TC.max():.2f}; "
                  f"n_1 / P {float(norms_TC[0].mean()):.2g}, growth {growth:.3g}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
