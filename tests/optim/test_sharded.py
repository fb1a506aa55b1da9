"""Parameters sharded over two processes: FullyShardedDataParallel trains, rules and all."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from stepsmith import LearnedOptimizer


def train(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    net = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = LearnedOptimizer(net.parameters(), "mlp-mnist", nonfinite="ignore")
    inputs, labels = torch.randn(32, 6), torch.randint(3, (32,))
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(net(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    distributed.destroy_process_group()


@pytest.mark.slow
def test_a_rule_trains_sharded_parameters(tmp_path):
    # As a program of its own: the processes it starts find their function in the file.
    subprocess.run([sys.executable, __file__, f"file://{tmp_path / 'meeting'}"], check=True)


if __name__ == "__main__":
    torch.multiprocessing.spawn(train, (sys.argv[1],), nprocs=2)
