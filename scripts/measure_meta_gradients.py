"""How far the first-order meta-gradient is from the exact one, by the length of the window.

    python scripts/measure_meta_gradients.py RULE ... [--steps 5 10 20 50 100] [--windows 8]

RULE is a bundled rule, named after its task. Both gradients are back-propagated through the same
windows from fresh starts; exact keeps the second derivatives.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from stepsmith import load
from stepsmith.meta import reference_window
from stepsmith.tasks import make_task
from stepsmith.unroll import Copies

SEED = 2**35
"""Of the first window's optimizee, far from those of training and evaluation."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rules", nargs="+", metavar="RULE")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50, 100])
    parser.add_argument("--windows", type=int, default=8)
    chosen = parser.parse_args()
    print("| rule | steps | norm, first-order | norm, exact | cosine, median | cosine of means |")
    print("|---|---|---|---|---|---|")
    for name in chosen.rules:
        for steps in chosen.steps:
            pairs = [both(name, steps, SEED + number) for number in range(chosen.windows)]
            first, exact = (torch.stack(part) for part in zip(*pairs, strict=True))
            each = torch.cosine_similarity(first, exact, dim=1).median()
            mean = torch.cosine_similarity(first.mean(0), exact.mean(0), dim=0)
            norms = [float(part.norm(dim=1).median()) for part in (first, exact)]
            cells = (
                name,
                steps,
                f"{norms[0]:.3g}",
                f"{norms[1]:.3g}",
                f"{each:.2f}",
                f"{mean:.2f}",
            )
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def both(name: str, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """The first-order and the exact meta-gradient of one window, flattened, float64."""
    task, trained = make_task(name), load(name)
    weights = {key: value.clone().requires_grad_() for key, value in trained.weights.items()}
    found = []
    for second_order in (False, True):
        copies = Copies(task, [seed])
        _, gradients = reference_window(
            copies, trained.rule, weights, steps, second_order=second_order
        )
        found.append(torch.cat([part.reshape(-1) for part in gradients.values()]).double())
    return found[0], found[1]


if __name__ == "__main__":
    main()
