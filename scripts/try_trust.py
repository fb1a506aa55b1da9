"""What trust changes of a rule's runs: paired starts, with it and without.

    python scripts/try_trust.py --data-dir DIR RULE:TASK [RULE:TASK ...] --steps 100 --starts 32

Prints for each the mean loss and that of the last tenth with trust over those without, with the
means themselves, how many runs it changed at all, and by how much of the rule's step the runs went
on at the end.
"""

from __future__ import annotations

import argparse

import torch

from stepsmith import load, make_task
from stepsmith.evaluate.run import by_rule, train
from stepsmith.evaluate.statistics import diverged, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="+", help="a bundled rule or a file, a colon, a task")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--starts", type=int, default=32)
    parser.add_argument("--copies", type=int, default=16)
    parser.add_argument("--data-dir")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for pair in chosen.pairs:
        rule, _, name = pair.partition(":")
        trained, task = load(rule), make_task(name, data_dir=chosen.data_dir)
        runs = {
            trusted: train(task, by_rule(trained, trusted=trusted), range(chosen.starts),
                           chosen.steps, chosen.copies)[0]
            for trusted in (False, True)
        }  # fmt: skip
        bare, held = runs[False], runs[True]
        told = []
        for criterion in ("mean", "final"):
            without, with_it = score(bare, criterion).mean(), score(held, criterion).mean()
            told.append(f"{criterion} {without:.4g} -> {with_it:.4g} ({with_it / without:.4f})")
        # Rounding aside: the two paths multiply in another order.
        changed = (abs(held - bare) > 0.01 * abs(bare)).any(1).sum()
        print(f"{pair}, {chosen.steps} steps: {', '.join(told)}; {changed} of {len(bare)} runs "
              f"differ by a hundredth; diverged {diverged(bare).sum()} -> {diverged(held).sum()}",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
