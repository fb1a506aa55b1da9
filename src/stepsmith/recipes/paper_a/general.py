"""Section 6's other wish: one rule for many architectures; and the whole matrix of transfers."""

from __future__ import annotations

from dataclasses import replace

from stepsmith.evaluate import BASELINES
from stepsmith.recipes.paper_a.rules import MANY, learned
from stepsmith.recipes.study import Recipe, Study

UNSEEN = (
    "mlp128-relu-mnist", "mlp32x32-tanh-fashion_mnist", "mlp20x20x20-gelu-mnist",
    "convnet-mnist", "convnet-sigmoid-fashion_mnist", "cnn8x16-tanh-fashion_mnist",
    "resnet-small-fashion_mnist", "mixer-small-mnist", "gru-rows-mnist", "linear-fashion_mnist",
)  # fmt: skip
"""Optimizees the general rule is tested on; it was meta-trained on none of them."""

ROWS = ("mlp-mnist", "mlp-fashion_mnist", "convnet-mnist", "convnet-fashion_mnist", "general")
COLUMNS = (
    "mlp-mnist", "mlp-fashion_mnist", "convnet-mnist", "convnet-fashion_mnist",
    "convnet5x5-mnist", "convnet-sigmoid-mnist", "mlp-mnist@shift", "mlp-mnist@rotate",
    "mlp-mnist@noise", "mlp-mnist@1000", "convnet-mnist@shift", "convnet-mnist@1000",
)  # fmt: skip


def general(study: Study) -> None:
    """The general rule, and two made for one network, on optimizees none of them saw."""
    assert not set(UNSEEN) & set(MANY)
    first = study.scale.first
    horizon = replace(first, seeds=max(2, first.seeds // 3), tuning_seeds=min(2, first.seeds))
    rules = {f"learned ({name})": learned(study, name) for name in ("general", "mlp-mnist")}
    for name in UNSEEN:
        study.compare(study.task(name), rules, BASELINES, horizon=horizon)


def matrix(study: Study) -> None:
    """Rules in rows, tasks in columns."""
    rules = {f"learned ({name})": learned(study, name) for name in ROWS}
    for name in COLUMNS:
        study.compare(study.task(name), rules, BASELINES)


RECIPES = (
    Recipe("a11-general", "one rule meta-trained on a dozen architectures (section 6)", general),
    Recipe("a14-matrix", "the matrix of transfers, with varied data (section 5.2)", matrix),
)
