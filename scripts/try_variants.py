"""The meta-training variants that `docs/what-did-not-work.md` reports on, one at a time.

    python scripts/try_variants.py --data-dir DIR NAME ...

Prints the validations, and the mean loss and that of the last ten of 100 steps on the test starts.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from stepsmith import load, make_rule, make_task, meta_train
from stepsmith.evaluate import train
from stepsmith.unroll import Copies, RuleStepper

CONVNET: dict[str, Any] = {"copies": 1, "samples": None, "validation_copies": 32}
FURTHER = {**CONVNET, "start": "convnet-mnist", "steps": 30_000, "lr": 0.002, "validations": 3}
EPISODES = {"start": "quadratic", "window": 5, "copies": 64, "validation_copies": 256,
            "samples": None, "lr": 0.003, "validations": 10}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "convnet-two-copies": ("convnet-mnist", {
        **CONVNET, "steps": 240_000, "copies": 2, "validation_copies": 16, "lr": 0.01}),
    "convnet-hidden-20": ("convnet-mnist", {
        **CONVNET, "hidden": 20, "steps": 120_000, "validation_copies": 24, "lr": 0.005,
        "validations": 10}),
    "convnet-fast": ("convnet-mnist", {
        **CONVNET, "steps": 120_000, "validation_copies": 16, "lr": 0.02, "validations": 48}),
    "convnet-further": ("convnet-mnist", {**FURTHER, "steps": 40_000}),
    "convnet-further-windows": ("convnet-mnist", {
        **FURTHER, "steps": 40_000, "window": 20, "copies": 5, "lr": 0.003}),
    "convnet-further-discount-97": ("convnet-mnist", {**FURTHER, "discount": 0.97}),
    "convnet-further-discount-90": ("convnet-mnist", {**FURTHER, "discount": 0.9}),
    "quadratic-episodes-500": ("quadratic", {**EPISODES, "horizon": 500, "steps": 6_000_000}),
    "quadratic-episodes-1000": ("quadratic", {**EPISODES, "horizon": 1000, "steps": 3_000_000}),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--data-dir")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="decides the last digits")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for name in chosen.names:
        task_name, config = VARIANTS[name][0], dict(VARIANTS[name][1])
        task = make_task(task_name, data_dir=chosen.data_dir)
        start, hidden = config.pop("start", None), config.pop("hidden", 8)
        rule = load(start) if start else make_rule("joined", hidden=hidden, scaling="absolute")
        trained = meta_train(task, rule, progress=True, seed=chosen.seed, **config)

        def by_rule(group: Copies, trained=trained) -> RuleStepper:
            return RuleStepper(trained.rule, trained.weights, group.theta, group.layout)

        losses_ST, _ = train(task, by_rule, range(32), 100, 8)
        scores = [round(v["score"], 4) for v in trained.manifest["validations"]]
        print(f"{name}: validations {scores}; 32 test starts: mean {losses_ST.mean():.4f}, "
              f"last ten {losses_ST[:, 90:].mean():.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
