"""Milliseconds of one gradient of the deep networks, in each memory layout of their maps.

Images are noise of CIFAR-10's shape: what they show does not change the time.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmarks.common import in_turn, median_ratio, one_of, report, row
from stepsmith.tasks.networks import get_network

NETWORKS = ("resnet8", "resnet20", "vgg-small", "mobilenetv2", "resnet18", "vgg16")
SHAPE = torch.Size([3, 32, 32])


def gradient(name: str, batch_size: int, channels_last: bool) -> Callable[[], None]:
    network = get_network(name)(SHAPE, 10)
    images, labels = torch.rand(batch_size, *SHAPE), torch.arange(batch_size) % 10
    module = importlib.import_module(type(network).__module__)
    layout = module.channels_last if channels_last else lambda hidden: hidden

    def run() -> None:
        with patch.object(module, "channels_last", layout):
            F.cross_entropy(network(images), labels).backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--networks", type=one_of(NETWORKS), nargs="+", default=NETWORKS[:3])
    arguments = parser.parse_args()
    rows = []
    for name in arguments.networks:
        for size in arguments.batch_sizes:
            plain, last = (f"{name}, batch {size}, {way}" for way in ("plain", "channels last"))
            times = in_turn(
                {what: gradient(name, size, what == last) for what in (plain, last)},
                arguments.rounds,
            )
            for what, seconds in times.items():
                middle = 1e3 * sorted(seconds)[arguments.rounds // 2]
                rows.append(row(what, middle, "ms", plain, median_ratio(times[plain], seconds)))
    report("networks", rows)


if __name__ == "__main__":
    main()
