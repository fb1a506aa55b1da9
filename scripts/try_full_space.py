"""A rule meta-trained on all parameters of a deep network: the choices behind `b12-full-space`, one
meta-training a call.

    python scripts/try_full_space.py --data-dir DIR resnet8 general-warmed --steps 9000
    python scripts/try_full_space.py --data-dir DIR resnet8 joined --window 50 --lr .001

Everything that is not said is as in the recipe's small scale, but for the budget. Prints the final
loss of each validation: one training as long as a test, of meta-training's images in batches of its
own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from stepsmith import load
from stepsmith.recipes.paper_b.deep import depth, learn
from stepsmith.recipes.paper_b.full_space import SAMPLES
from stepsmith.recipes.study import SMALL, Study
from stepsmith.rules import LEARNED, make_rule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network")
    parser.add_argument(
        "rule", help="fresh: joined, rnnprop; or what to go on from: bundled, or a file"
    )
    parser.add_argument("--step-scale", type=float, help="of a fresh rule")
    parser.add_argument("--window", type=int, help="by default the episode")
    parser.add_argument("--horizon", type=int, default=1000, help="of an episode")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--validations", type=int, default=2)
    parser.add_argument("--data-dir")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    scale = {} if chosen.step_scale is None else {"step_scale": chosen.step_scale}
    start = make_rule(chosen.rule, **scale) if chosen.rule in LEARNED else load(chosen.rule)
    with tempfile.TemporaryDirectory() as cache:
        study = Study("try", SMALL, Path(cache), data_dir=chosen.data_dir)
        amounts = depth(study)
        task = study.task(f"{chosen.network}-{amounts.data}", batch_size=amounts.batch)
        trained = learn(
            study, "tried", task, start, unroll=chosen.window or chosen.horizon,
            episode=chosen.horizon, budget=chosen.steps, lr=chosen.lr, samples=chosen.samples,
            validations=chosen.validations, validation_split="meta_train",
        )  # fmt: skip
    found = trained.manifest["validations"]
    told = ", ".join(f"{one['inner_steps']:,}: {one['score']:.3f}" for one in found)
    print(f"{chosen.network}, {chosen.rule}, windows of {chosen.window or chosen.horizon}, "
          f"episodes of {chosen.horizon}, rate {chosen.lr:g}, {chosen.samples:,} samples; {told}; "
          f"{trained.manifest['seconds']:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
