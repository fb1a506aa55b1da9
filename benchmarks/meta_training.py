"""Inner steps per second of meta-training against the usual retain-graph loop, in one run.

MLP 784-20-10, batch 128, unroll 20, losses "before" in all, one optimizee unless said, so that
like is compared with like; the engine replays a tenth of the coordinates. The base is the loop that
the field's PyTorch code shares, paper A's included: `l2o_dm` as two `torch.nn.LSTMCell`, and
`loss.backward(retain_graph=True)` at every step, which walks back through the whole unroll so far
to find one gradient. The lean loop differs in that one line: it asks `torch.autograd.grad` for the
optimizee's gradient alone. `stepsmith.meta.reference_window` is the lean loop by the library's own
reference.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import in_turn, median_ratio, report, row
from stepsmith import kernels, make_task
from stepsmith.meta import adjoint_window, reference_window
from stepsmith.rules import Rule, joined, l2o_dm
from stepsmith.rules.lstm import LSTMRule
from stepsmith.tasks import Task
from stepsmith.unroll import Copies, RuleStepper

UNROLL = 20


class Cells(torch.nn.Module):
    """Two LSTM cells of 20 over log and sign of the gradient, and a linear head."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.LSTMCell(2, 20)
        self.second = torch.nn.LSTMCell(20, 20)
        self.head = torch.nn.Linear(20, 1)

    def forward(self, features, first, second):
        """One step: (N, 2) features to (N,) steps and both cells' states."""
        first = self.first(features, first)
        second = self.second(first[0], second)
        return self.head(second[0])[:, 0], first, second


def cell_loop(task: Task, *, lean: bool) -> Callable[[], None]:
    network, rule = Cells(), l2o_dm()

    def run() -> None:
        copies = Copies(task, [1])
        theta = copies.theta[0].clone().requires_grad_()
        state, total = rule.init_state(theta.detach()), torch.zeros(())
        first = second = (torch.zeros(len(theta), 20), torch.zeros(len(theta), 20))
        for _ in range(UNROLL):
            batch = task.batch(copies.generators[0], "meta_train")
            loss, _, _ = task.loss(copies.layout.views(theta), {}, batch, None, True)
            total = total + loss
            if lean:
                (grad,) = torch.autograd.grad(loss, theta, retain_graph=True)
            else:
                theta.retain_grad()
                loss.backward(retain_graph=True)
                assert theta.grad is not None
                grad = theta.grad.clone()
            features, _, state = rule.features(grad, theta.detach(), state, (len(theta),))
            step, first, second = network(features.t().contiguous(), first, second)
            theta = theta - rule.step_scale * step
        network.zero_grad()
        total.backward()

    return run


def loop(task: Task, rule: Rule) -> Callable[[], None]:
    weights = {key: value.requires_grad_() for key, value in rule.init().items()}

    def run() -> None:
        reference_window(Copies(task, [1]), rule, weights, UNROLL, losses="before")

    return run


def engine(
    task: Task, rule: Rule, copies: int, fraction: float, unroll: int = UNROLL
) -> Callable[[], None]:
    weights = {key: value.requires_grad_() for key, value in rule.init().items()}
    draw = torch.Generator().manual_seed(0)

    def run() -> None:
        group = Copies(task, range(copies))
        stepper = RuleStepper(rule, weights, group.theta, group.layout)
        adjoint_window(
            group, stepper, weights, unroll, losses="before", fraction=fraction, generator=draw
        )

    return run


def gradients(task: Task) -> Callable[[], None]:
    def run() -> None:
        group = Copies(task, [0])
        for _ in range(UNROLL):
            group.gradients(group.batches("meta_train"))

    return run


def steps(task: Task, rule: Rule) -> Callable[[], None]:
    group = Copies(task, [0])
    stepper = RuleStepper(rule, rule.init(), group.theta, group.layout)
    _, grad_CP = group.gradients(group.batches("meta_train"))

    def run() -> None:
        for _ in range(UNROLL):
            stepper(group.theta, grad_CP)

    return run


def replays(task: Task, rule: LSTMRule, fraction: float) -> Callable[[], None]:
    sampled = int(fraction * Copies(task, [0]).layout.total)
    grads_TCS = torch.randn(UNROLL, 1, sampled) * 1e-2
    state = kernels.init_state(rule, grads_TCS[0])
    carry, weights = rule.init_carry(sampled), rule.init()

    def run() -> None:
        features, scale = kernels.sample_features(rule, grads_TCS, grads_TCS, state)
        kernels.replay(rule, weights, features, carry, grads_TCS[:, 0], scale)

    return run


def floors(times: dict[str, list[float]], what: str, label: str) -> list[dict[str, Any]]:
    """Where an inner step's milliseconds go: gradient, step and replay alone, and the whole."""
    parts = {
        "gradient": times["gradient alone"], "step": times[f"step alone, {label}"],
        "replay": times[f"replay alone, {label}"],
    }  # fmt: skip
    total = [sum(round_) for round_ in zip(*parts.values(), strict=True)]
    rows = [
        row(f"{what}: {part}", statistics.median(seconds) / UNROLL * 1e3, "ms/inner step",
            f"{what}: whole", median_ratio(seconds, times[what]))
        for part, seconds in parts.items()
    ]  # fmt: skip
    whole = statistics.median(times[what]) / UNROLL * 1e3
    sum_ = f"{what}: sum of the three"
    rows.append(
        row(sum_, statistics.median(total) / UNROLL * 1e3, "ms/inner step", f"{what}: whole",
            median_ratio(total, times[what]))
    )  # fmt: skip
    rows.append(row(f"{what}: whole", whole, "ms/inner step"))
    return rows


def measure(rounds: int) -> list[dict[str, Any]]:
    task = make_task("mlp-mnist", source="sample")
    big, small = l2o_dm(), joined(scaling="absolute")
    base, lean = "usual retain-graph loop, LSTM 2x20", "lean retain-graph loop, LSTM 2x20"
    long = 5 * UNROLL
    work = {
        base: (cell_loop(task, lean=False), UNROLL),
        lean: (cell_loop(task, lean=True), UNROLL),
        "reference_window, LSTM 2x20": (loop(task, big), UNROLL),
        "reference_window, LSTM 8 joined": (loop(task, small), UNROLL),
        "adjoint, LSTM 2x20, 10 %": (engine(task, big, 1, 0.1), UNROLL),
        "adjoint, LSTM 2x20, 10 %, 4 copies": (engine(task, big, 4, 0.1), 4 * UNROLL),
        "adjoint, LSTM 2x20, windows of 100, 4 %": (engine(task, big, 1, 0.04, long), long),
        "adjoint, LSTM 8 joined, 10 %": (engine(task, small, 1, 0.1), UNROLL),
        "adjoint, LSTM 8 joined, 10 %, 4 copies": (engine(task, small, 4, 0.1), 4 * UNROLL),
        "adjoint, LSTM 8 joined, 100 %": (engine(task, small, 1, 1.0), UNROLL),
        "adjoint, LSTM 8 joined, windows of 100, 4 %": (engine(task, small, 1, 0.04, long), long),
        "gradient alone": (gradients(task), UNROLL),
    }
    for label, rule in (("LSTM 2x20", big), ("LSTM 8 joined", small)):
        work[f"step alone, {label}"] = (steps(task, rule), UNROLL)
        work[f"replay alone, {label}"] = (replays(task, rule, 0.1), UNROLL)
    times = in_turn({name: run for name, (run, _) in work.items()}, rounds)
    rows = []
    for name, (_, made) in work.items():
        if "alone" in name:
            continue
        rates = [made / seconds for seconds in times[name]]
        for against in (base, lean):
            slow = [UNROLL / seconds for seconds in times[against]]
            rows.append(
                row(name, statistics.median(rates), "inner steps/s", against,
                    median_ratio(rates, slow))
            )  # fmt: skip
    for label in ("LSTM 2x20", "LSTM 8 joined"):
        rows += floors(times, f"adjoint, {label}, 10 %", label)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    report("meta_training", measure(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
