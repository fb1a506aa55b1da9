"""Shared by the tests of subspaces: small networks, a real trajectory, what is read of P."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stepsmith.subspace import Snapshots


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """6-5-3 with batch-norm: 63 numbers in 6 tensors."""
    torch.manual_seed(seed)
    layers = (nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    return nn.Sequential(*layers).to(dtype)


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    inputs = torch.randn(32, 6, generator=generator, dtype=dtype)
    return inputs, torch.randint(3, (32,), generator=generator)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    dtype = next(model.parameters()).dtype
    inputs, targets = batch(seed, dtype)
    return nn.functional.cross_entropy(model(inputs), targets)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: Iterable[int]) -> list[float]:
    losses = []
    for seed in seeds:
        optimizer.zero_grad()
        loss = loss_of(model, seed)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def recorded(folder, model: nn.Module, count: int = 12, every: int = 3) -> Snapshots:
    """Snapshots of a short training by SGD."""
    snapshots = Snapshots(folder, model, every=every)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for seed in range((count - 1) * every + 1):
        snapshots()
        train(model, optimizer, [seed])
    return snapshots


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])


class BytesRead(TorchDispatchMode):
    """Counts the bytes of some tensors that operations other than views take."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self._watched = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            for value in torch.utils._pytree.tree_leaves((args, kwargs)):
                if (
                    isinstance(value, Tensor)
                    and value.untyped_storage().data_ptr() in self._watched
                ):
                    self.count += value.numel() * value.element_size()
        return func(*args, **(kwargs or {}))
