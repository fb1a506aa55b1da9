"""Stepsmith: learned optimizers for PyTorch.

Meta-train an update rule, deploy it as a `torch.optim.Optimizer`, measure how it transfers.
"""

from stepsmith.hub import BUNDLED, TrainedRule, load, save
from stepsmith.meta.trainer import MetaTrainConfig, meta_train
from stepsmith.optim import LearnedOptimizer
from stepsmith.rules import Rule, make_rule, register
from stepsmith.store import CheckpointError
from stepsmith.tasks import Task, load_images, make_task
from stepsmith.version import __version__

__all__ = [
    "BUNDLED", "CheckpointError", "LearnedOptimizer", "MetaTrainConfig", "Rule", "Task",
    "TrainedRule", "__version__", "load", "load_images", "make_rule", "make_task", "meta_train",
    "register", "save",
]  # fmt: skip
