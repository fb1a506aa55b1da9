"""Shared by all tests: one thread each, so that tests may run side by side; small tasks."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from stepsmith.tasks import ModuleTask

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    monkeypatch.delenv("STEPSMITH_DATA_DIR", raising=False)
    torch.manual_seed(0)


@pytest.fixture
def tiny_task() -> ModuleTask:
    """A float64 network of 53 numbers in 4 tensors, on 60 random examples of 3 classes."""
    return make_tiny_task()


def make_tiny_task(**options) -> ModuleTask:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (60,), generator=generator)
    test = (inputs[:9] + 0.1, targets[:9])

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    options = {"batch_size": 8, "dtype": torch.float64, "name": "tiny", **options}
    return ModuleTask(make, nn.functional.cross_entropy, ((inputs, targets), test), **options)
