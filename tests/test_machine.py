"""What a process says of itself."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from stepsmith.machine import peak_memory, require_device

PROGRAM = """
from stepsmith.machine import peak_memory
before = peak_memory()
held = bytearray(300_000_000)
print(before, peak_memory())
"""


def test_a_peak_is_the_processs_own_and_grows_by_what_it_holds():
    mine = bytearray(600_000_000)  # the child's peak must not begin with this
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert 290_000_000 < after - before < 330_000_000
    if sys.platform == "linux":
        assert before < peak_memory() - 100_000_000
    assert len(mine) == 600_000_000


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")])
def test_the_cpu_is_there(device):
    require_device(device)


@pytest.mark.parametrize(
    ("device", "match"),
    [
        ("cpu:7", "there is one CPU"), ("cpu:256", "no name of a device"),
        ("cpu:-1", "no name"), ("", "no name"), ("CPU", "no name"), ("gpu", "no name"),
        ("cuda:x", "no name"), ("meta", "not one that tasks can run on"),
        ("xla", "not one that tasks can run on"), (torch.device("meta"), "not one that tasks"),
    ],
)  # fmt: skip
def test_devices_that_are_not_there(device, match):
    with pytest.raises(ValueError, match=match):
        require_device(device)


def test_accelerators_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "cuda:0", "cuda:99"):
        with pytest.raises(ValueError, match="this PyTorch sees no GPU; use cpu"):
            require_device(device)
    with pytest.raises(ValueError, match="not one that tasks can run on"):
        require_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "cuda:1"):
        require_device(device)
    with pytest.raises(ValueError, match="this PyTorch sees 2 GPUs"):
        require_device("cuda:2")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    require_device("mps")


@pytest.mark.parametrize("device", [None, 0, True, ["cpu"]])
def test_what_is_no_device(device):
    with pytest.raises(TypeError, match="device must be a name"):
        require_device(device)
