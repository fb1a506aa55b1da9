"""Tiny subspaces of big models: made from a training run or at random, saved, applied."""

from stepsmith.subspace.basis import Subspace
from stepsmith.subspace.gaussian import random
from stepsmith.subspace.layers import per_layer
from stepsmith.subspace.snapshots import Snapshots
from stepsmith.subspace.trajectory import from_trajectory

__all__ = ["Snapshots", "Subspace", "from_trajectory", "per_layer", "random"]
