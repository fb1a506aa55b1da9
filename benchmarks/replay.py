"""The replay, forward and backward, against the platform's sequence LSTM, in one run."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import in_turn, median_ratio, report, row
from stepsmith import kernels
from stepsmith.rules import joined, l2o_dm
from stepsmith.rules.lstm import LSTMRule

RULES = {"LSTM 2x20": l2o_dm(), "LSTM 8 joined": joined(scaling="absolute")}
SAMPLES = ((20, 1600), (100, 400))
"""(steps, coordinates) of a sample."""


def platform(rule: LSTMRule, steps: int, sampled: int) -> Callable[[], object]:
    module = torch.nn.LSTM(rule.feature_set.count, rule.hidden, rule.layers)
    head = torch.nn.Linear(rule.hidden, 1)
    features = torch.randn(steps, sampled, rule.feature_set.count)
    adjoint = torch.randn(steps, sampled)

    def run() -> object:
        hidden, _ = module(features)
        loss = (head(hidden)[..., 0].tanh() * adjoint).sum()
        return torch.autograd.grad(loss, [*module.parameters(), *head.parameters()])

    return run


def ours(rule: LSTMRule, steps: int, sampled: int, backend: str) -> Callable[[], object]:
    features = torch.randn(steps, rule.feature_set.count, sampled)
    adjoint, carry, weights = torch.randn(steps, sampled), rule.init_carry(sampled), rule.init()
    return lambda: kernels.replay(rule, weights, features, carry, adjoint, None, backend)


def measure(rounds: int) -> list[dict[str, Any]]:
    work: dict[str, tuple[Callable[[], object], int]] = {}
    for name, rule in RULES.items():
        for steps, sampled in SAMPLES:
            size = f"{steps} steps of {sampled:,}"
            work[f"{name}, {size}, torch.nn.LSTM"] = (
                platform(rule, steps, sampled), steps * sampled
            )  # fmt: skip
            for way in kernels.available(rule, torch.float32, torch.device("cpu"))[:-1]:
                work[f"{name}, {size}, {way}"] = (
                    ours(rule, steps, sampled, way), steps * sampled
                )  # fmt: skip
    times = in_turn({name: run for name, (run, _) in work.items()}, rounds)
    rows = []
    for name, seconds in times.items():
        base = f"{name.rsplit(', ', 1)[0]}, torch.nn.LSTM"
        value = statistics.median(seconds) / work[name][1] * 1e9
        ratio = median_ratio(times[base], seconds)
        rows.append(row(name, value, "ns/coordinate-step", base, ratio))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    report("replay", measure(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
