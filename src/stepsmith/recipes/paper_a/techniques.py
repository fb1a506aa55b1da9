"""What the field offers for meta-training, one technique at a time: which of it earns its place.

Shape letters: S = test seeds, M = seeds of meta-training, R = resamples.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from stepsmith.evaluate import BASELINES, Records
from stepsmith.evaluate.statistics import interval, resamples, score
from stepsmith.recipes.paper_a.horizons import longer
from stepsmith.recipes.paper_a.rules import TECHNIQUE_SEEDS, TECHNIQUES, learned, technique
from stepsmith.recipes.study import Recipe, Study

PLAIN = "plain"


def techniques(study: Study) -> None:
    """Each technique's rules on the MLP, at ten times its horizon, and, a third of the seeds, on a
    network none saw."""
    rules = {
        f"{name}, seed {seed}": learned(study, technique(name, seed))
        for name in TECHNIQUES
        for seed in TECHNIQUE_SEEDS
    }
    mlp, other = study.task("mlp-mnist"), study.task("cnn8-fashion_mnist")
    first = study.compare(mlp, rules, BASELINES)
    study.compare(other, rules, BASELINES, horizon=study.scale.first.fewer(3))
    longer(study, mlp, rules, first, study.scale.long)
    study.findings["techniques"] = against_plain(study.records, TECHNIQUES, TECHNIQUE_SEEDS)


def against_plain(
    records: Records, names: Iterable[str], seeds: Iterable[int]
) -> list[dict[str, Any]]:
    """Each technique's losses over those of the plain meta-training of the same seed.

    Args:
        records: with `train_loss` of rules named `NAME, seed SEED`.
        names: of the techniques, `PLAIN` among them.
        seeds: of the meta-trainings.

    Returns:
        For each task, horizon, criterion (mean or final loss) and technique: `ratio`, the geometric
        mean over seeds of meta-training of the ratios of mean losses; `low` and `high`, its 95 %
        interval from a paired bootstrap over test seeds, which leaves the seeds of meta-training as
        they are; and `ratios`, one a seed of meta-training, whose spread is that of meta-training.
    """
    names, seeds = list(names), list(seeds)
    blocks = {
        (block.key.task, block.key.horizon, block.key.optimizer): block.values
        for block in records.select("train_loss", purpose="test")
        if block.key.kind == "learned"
    }
    found = []
    for task, horizon in dict.fromkeys((task, horizon) for task, horizon, _ in blocks):
        for criterion in ("mean", "final"):
            losses_MS = {
                name: np.stack(
                    [
                        score(blocks[task, horizon, f"{name}, seed {seed}"], criterion)
                        for seed in seeds
                    ]
                )
                for name in names
            }
            index_RS = resamples(losses_MS[PLAIN].shape[1])
            plain_MR = losses_MS[PLAIN][:, index_RS].mean(2)
            for name in names:
                ratios_M = losses_MS[name].mean(1) / losses_MS[PLAIN].mean(1)
                low, high = interval(_geometric(losses_MS[name][:, index_RS].mean(2) / plain_MR))
                found.append(
                    {
                        "task": task, "horizon": horizon, "criterion": criterion,
                        "technique": name, "ratio": float(_geometric(ratios_M)), "low": low,
                        "high": high, "ratios": ratios_M.tolist(),
                    }
                )  # fmt: skip
    return found


def _geometric(ratios: np.ndarray) -> np.ndarray:
    """The geometric mean along the first axis."""
    return np.exp(np.log(ratios).mean(0))


RECIPES = (
    Recipe(
        "a15-techniques", "curriculum, imitation, scaling, mixing, meta-losses: ablations",
        techniques,
    ),
)  # fmt: skip
