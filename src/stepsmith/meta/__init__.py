"""Meta-training: how an update rule is learned."""

from stepsmith.meta.adjoint import Window, adjoint_window
from stepsmith.meta.config import BALANCES, MetaTrainConfig
from stepsmith.meta.curriculum import train_curriculum
from stepsmith.meta.imitation import imitation_window
from stepsmith.meta.losses import META_LOSSES
from stepsmith.meta.reference import reference_window
from stepsmith.meta.trainer import meta_train

__all__ = [
    "BALANCES", "META_LOSSES", "MetaTrainConfig", "Window", "adjoint_window", "imitation_window",
    "meta_train", "reference_window", "train_curriculum",
]  # fmt: skip
