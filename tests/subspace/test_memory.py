"""A trajectory that is larger than the memory it takes to find its components."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tests.subspace.runs import seeded

COUNT, SIZE, D = 60, 2_000_000, 20

PROGRAM = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from stepsmith.machine import peak_memory
from stepsmith.subspace import Subspace, from_trajectory

def peak():
    return peak_memory() / 2**20

torch.set_num_threads(1)
folder = Path(sys.argv[1])
small = [{"w": torch.randn(300)} for _ in range(60)]
for place, state in enumerate(small):
    save_file(state, folder / f"small-{place:02d}.safetensors")
Subspace.load(from_trajectory(sorted(folder.glob("small-*")), 20).save(folder / "basis"))
base = peak()
subspace = from_trajectory(sorted(folder.glob("large-*")), int(sys.argv[2]), block=2**16)
print(peak() - base)
subspace.save(folder / "basis")
print(peak() - base)
"""


@pytest.mark.slow
def test_checkpoints_are_streamed_and_the_basis_is_not_copied(tmp_path):
    """60 snapshots of 2,000,000 numbers are 458 MiB, in float64 916; 20 directions 153 MiB."""
    generator = seeded()
    moves = torch.randn(D + 2, SIZE, generator=generator)
    for place in range(COUNT):
        theta = torch.randn(D + 2, generator=generator) @ moves
        state = {"w": theta[:-9].reshape(-1, 1).clone(), "b": theta[-9:].clone()}
        save_file(state, tmp_path / f"large-{place:02d}.safetensors")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(D)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    built, saved = map(float, done.stdout.split())
    basis = D * SIZE * 4 / 2**20
    # Above the basis: a part of all snapshots (30 MiB in float64), the components there, one
    # snapshot's pages, the origin.
    assert basis / 2 < built < basis + 130
    assert saved < basis + 200
