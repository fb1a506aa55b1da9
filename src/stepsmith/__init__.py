"""Stepsmith: learned optimizers for PyTorch.

Meta-train an update rule, deploy it as a `torch.optim.Optimizer`, measure how it transfers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stepsmith.version import __version__

if TYPE_CHECKING:
    from stepsmith.hub import BUNDLED, TrainedRule, load, save
    from stepsmith.meta.config import MetaTrainConfig
    from stepsmith.meta.trainer import meta_train
    from stepsmith.optim.learned import LearnedOptimizer
    from stepsmith.optim.subspace import SubspaceOptimizer
    from stepsmith.rules import Rule, make_rule, register
    from stepsmith.store import CheckpointError
    from stepsmith.subspace import Subspace
    from stepsmith.tasks import Task, load_images, make_task

# Loaded on first use: deploying a rule must not wait for plotting and data libraries.
_HOMES = {
    "hub": ("BUNDLED", "TrainedRule", "load", "save"),
    "meta.config": ("MetaTrainConfig",),
    "meta.trainer": ("meta_train",),
    "optim.learned": ("LearnedOptimizer",),
    "optim.subspace": ("SubspaceOptimizer",),
    "rules": ("Rule", "make_rule", "register"),
    "store": ("CheckpointError",),
    "subspace": ("Subspace",),
    "tasks": ("Task", "load_images", "make_task"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'stepsmith' has no attribute {name!r}")
    return getattr(importlib.import_module(f"stepsmith.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_HOME, "__version__"])


__all__ = [
    "BUNDLED", "CheckpointError", "LearnedOptimizer", "MetaTrainConfig", "Rule", "Subspace",
    "SubspaceOptimizer", "Task", "TrainedRule", "__version__", "load", "load_images", "make_rule",
    "make_task", "meta_train", "register", "save",
]  # fmt: skip
