"""One step of the LSTM rules on a CPU, by every way there is to make one, in one run.

Of 200,000 coordinates (or `--coordinates`), each with a recurrent state of its own:

- `torch.nn.LSTM`, the base: one step of the platform's LSTM, without features;
- the reference and the chunked PyTorch operations;
- `torch.compile` of the reference, and a C++ extension (`lstm_step.cpp`), where there is a
  compiler; neither computes features;
- the native backend: features, gates, state and step in one pass;
- `torch.optim.AdamW(fused=True)` beside them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import in_turn, median_ratio, report, row
from stepsmith import kernels
from stepsmith.kernels import lstm
from stepsmith.rules import joined, l2o_dm, rnnprop
from stepsmith.rules.lstm import LSTMRule

CPU = torch.device("cpu")
RULES = {
    "LSTM 2x20": l2o_dm(),
    "LSTM 8 raw": LSTMRule(8, 1, "raw", frame="none"),
    "LSTM 8": rnnprop(),
    "LSTM 8 joined": joined(scaling="absolute"),
}


def platform(rule: LSTMRule, n: int) -> Callable[[], object]:
    module = torch.nn.LSTM(rule.feature_set.count, rule.hidden, rule.layers)
    features = torch.randn(1, n, rule.feature_set.count)
    state = tuple(torch.zeros(rule.layers, n, rule.hidden) for _ in "hc")

    @torch.no_grad()
    def run() -> object:
        return module(features, state)

    return run


def backend(rule: LSTMRule, n: int, name: str) -> Callable[[], object]:
    advance = kernels.advance_function(rule, rule.init(), torch.float32, CPU, name)
    grad = torch.randn(1, n) * 1e-2
    state, carry = kernels.init_state(rule, grad), rule.init_carry(n)
    return lambda: advance(grad, grad, state, carry)


def compiled(rule: LSTMRule, n: int) -> Callable[[], object]:
    network = torch.compile(rule.network, dynamic=False)
    weights, features = rule.init(), torch.randn(rule.feature_set.count, n)
    carry = rule.init_carry(n)

    @torch.no_grad()
    def run() -> object:
        return network(weights, features, carry)

    return run


def extension(rule: LSTMRule, n: int) -> Callable[[], object]:
    from torch.utils.cpp_extension import load

    # Importing the interpreter's own tools by name: a virtual environment may not be on the path.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    built = load(
        "stepsmith_lstm_step", str(Path(__file__).with_name("lstm_step.cpp")),
        extra_cflags=["-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fopenmp"],
        extra_ldflags=["-fopenmp"],
    )  # fmt: skip
    packed = lstm.pack(rule, rule.init(), torch.float32, CPU)
    layers = range(rule.layers)
    weights = [packed[f"lstm{layer}.weight"].contiguous() for layer in layers]
    biases = [packed[f"lstm{layer}.bias"][:, 0].contiguous() for layer in layers]
    carry, features = rule.init_carry(n), torch.randn(rule.feature_set.count, n)
    hidden, cell = ([carry[f"{kind}{layer}"] for layer in layers] for kind in "hc")
    head = packed["head.weight"][0].contiguous()
    return lambda: built.step(features, weights, biases, hidden, cell, head)


def adamw(n: int) -> Callable[[], object]:
    param = torch.nn.Parameter(torch.randn(n))
    param.grad = torch.randn(n)
    optimizer = torch.optim.AdamW([param], fused=True)
    return optimizer.step


def measure(rounds: int, coordinates: int = 200_000, shipped: bool = False) -> list[dict[str, Any]]:
    """Rows of every way; `shipped`: only of what the package ships."""
    n = coordinates
    work: dict[str, Callable[[], object]] = {}
    for name, rule in RULES.items():
        work[f"{name}, torch.nn.LSTM"] = platform(rule, n)
        for way in kernels.available(rule, torch.float32, CPU):
            work[f"{name}, {way}"] = backend(rule, n, way)
        if shutil.which("g++") and not shipped:
            work[f"{name}, torch.compile, no features"] = compiled(rule, n)
            work[f"{name}, C++ extension, no features"] = extension(rule, n)
    work["AdamW, fused"] = adamw(n)
    times = in_turn(work, rounds)
    rows = []
    for name, seconds in times.items():
        base = f"{name.split(',')[0]}, torch.nn.LSTM"
        if base not in times:
            base = "LSTM 8 joined, torch.nn.LSTM"
        value = statistics.median(seconds) / n * 1e9
        rows.append(row(name, value, "ns/coordinate", base, median_ratio(times[base], seconds)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--coordinates", type=int, default=200_000)
    chosen = parser.parse_args()
    report("step", measure(chosen.rounds, chosen.coordinates))


if __name__ == "__main__":
    main()
