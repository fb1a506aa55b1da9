"""Deployment: any rule as a `torch.optim.Optimizer`. Needs nothing but torch and safetensors."""

from stepsmith.optim.learned import LearnedOptimizer
from stepsmith.optim.subspace import SubspaceOptimizer

__all__ = ["LearnedOptimizer", "SubspaceOptimizer"]
