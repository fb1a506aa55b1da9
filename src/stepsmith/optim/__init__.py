"""Deployment: any rule as a `torch.optim.Optimizer`. Needs nothing but torch and safetensors."""

from stepsmith.optim.learned import LearnedOptimizer

__all__ = ["LearnedOptimizer"]
