"""Meta-train the bundled rules, from fixed seeds and budgets in inner steps.

    python scripts/make_rules.py --data-dir DIR [NAME ...]

DIR holds the whole MNIST (a folder `mnist`), or leave it out to take it from the hub. Interrupted
runs continue where they were. The files go to src/stepsmith/data/rules/.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from stepsmith import Rule, Task, TrainedRule, make_rule, make_task, meta_train

RULES: dict[str, dict[str, Any]] = {
    "quadratic": {
        "rule": {"hidden": 20, "step_scale": 0.3, "start": 0.03},
        # Short windows: on quadratics the first-order estimate misleads over long ones.
        "steps": 10_000_000, "window": 5, "copies": 64, "validation_copies": 256, "samples": None,
        "lr": 0.01, "validations": 40,
        # Then on longer episodes: late, tiny gradients otherwise make rare leaps.
        "further": {"steps": 3_000_000, "horizon": 300, "lr": 0.003, "validations": 10},
    },
    "mlp-mnist": {
        "rule": {},
        "steps": 300_000, "copies": 1, "validation_copies": 16, "lr": 0.02,
    },
    "convnet-mnist": {
        "rule": {},
        "steps": 240_000, "copies": 2, "validation_copies": 16, "lr": 0.01, "samples": None,
    },
}  # fmt: skip


def stage(
    task: Task, rule: Rule | TrainedRule, folder: Path, config: dict[str, Any]
) -> TrainedRule:
    """Meta-train in a folder, from where it was if it was interrupted there."""
    resume = (folder / "run.safetensors").exists()
    return meta_train(task, rule, out=folder, resume=resume, progress=True, **config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RULES)}")
    parser.add_argument("--data-dir")
    parser.add_argument("--work", type=Path, default=Path("runs/rules"))
    parser.add_argument("--out", type=Path, default=Path("src/stepsmith/data/rules"))
    parser.add_argument("--threads", type=int, default=1, help="decides the last digits")
    chosen = parser.parse_args()
    if odd := [name for name in chosen.names if name not in RULES]:
        parser.error(f"no rule {odd[0]!r}; there are {', '.join(RULES)}")
    torch.set_num_threads(chosen.threads)
    logging.basicConfig(format="%(message)s")
    for name in chosen.names or RULES:
        config = dict(RULES[name])
        rule = make_rule("joined", **config.pop("rule"))
        task = make_task(name, data_dir=chosen.data_dir)
        further = config.pop("further", None)
        trained = stage(task, rule, chosen.work / name, config)
        if further:
            trained = stage(task, trained, chosen.work / f"{name}-further", config | further)
        print(trained.save(chosen.out / f"{name}.safetensors"), trained.manifest["validation"])


if __name__ == "__main__":
    main()
