"""Section 6's other wish: one rule for many architectures; and the whole matrix of transfers."""

from __future__ import annotations

from stepsmith.evaluate import BASELINES
from stepsmith.recipes.paper_a.horizons import longer
from stepsmith.recipes.paper_a.rules import MANY, learned
from stepsmith.recipes.study import Recipe, Study

UNSEEN = (
    "mlp128-relu-mnist", "mlp32x32-tanh-fashion_mnist", "mlp20x20x20-gelu-mnist",
    "convnet-mnist", "convnet-sigmoid-fashion_mnist", "cnn8x16-tanh-fashion_mnist",
    "resnet-small-fashion_mnist", "mixer-small-mnist", "gru-rows-mnist", "linear-fashion_mnist",
)  # fmt: skip
"""Optimizees the general rule is tested on; it was meta-trained on none of them."""

THIRD = 3
"""This share of the runs where there are many tasks to measure."""

ROWS = (
    "mlp-mnist", "mlp-fashion_mnist", "convnet-mnist", "convnet-fashion_mnist", "general",
    "quadratic",
)  # fmt: skip
COLUMNS = (
    "mlp-mnist", "mlp-fashion_mnist", "convnet-mnist", "convnet-fashion_mnist",
    "convnet5x5-mnist", "convnet-sigmoid-mnist", "quadratic",
)  # fmt: skip
FURTHER = (
    "mlp-mnist@shift", "mlp-mnist@rotate", "mlp-mnist@noise", "mlp-mnist@1000",
    "convnet-sigmoid-fashion_mnist", "convnet5x5-fashion_mnist", "convnet-mnist@shift",
    "convnet-mnist@1000",
)  # fmt: skip
"""Further columns of the matrix, with a third of the seeds: varied data, and the variants of the
ConvNet on the other set."""


def general(study: Study) -> None:
    """The general rule, as it was meta-trained and with a warm-up, and one made for one network,
    on optimizees none of them saw."""
    assert not set(UNSEEN) & set(MANY)
    names = ("general-warmed", "general", "mlp-mnist")
    rules = {f"learned ({name})": learned(study, name) for name in names}
    for name in UNSEEN:
        task, horizon = study.task(name), study.scale.first.fewer(THIRD)
        first = study.compare(task, rules, BASELINES, horizon=horizon, timing=True)
        longer(study, task, rules, first, study.scale.long and study.scale.long.fewer(THIRD))


def matrix(study: Study) -> None:
    """Rules in rows, tasks in columns."""
    rules = {f"learned ({name})": learned(study, name) for name in ROWS}
    for name in COLUMNS:
        study.compare(study.task(name), rules, BASELINES, timing=True)
    horizon = study.scale.first.fewer(THIRD)
    for name in FURTHER:
        study.compare(study.task(name), rules, BASELINES, horizon=horizon, timing=True)


RECIPES = (
    Recipe("a11-general", "one rule meta-trained on a dozen architectures (section 6)", general),
    Recipe("a14-matrix", "the matrix of transfers, with varied data (section 5.2)", matrix),
)
