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
from collections.abc import Callable

import torch

from benchmarks.common import in_turn, median_ratio, report, row
from stepsmith import make_rule, make_task
from stepsmith.meta import adjoint_window, reference_window
from stepsmith.rules import Rule
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
    network, rule = Cells(), make_rule("l2o_dm")

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


def engine(task: Task, rule: Rule, copies: int, fraction: float) -> Callable[[], None]:
    weights = {key: value.requires_grad_() for key, value in rule.init().items()}

    def run() -> None:
        group = Copies(task, range(copies))
        stepper = RuleStepper(rule, weights, group.theta, group.layout)
        adjoint_window(group, stepper, weights, UNROLL, losses="before", fraction=fraction)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    task = make_task("mlp-mnist", source="sample")
    big, small = make_rule("l2o_dm"), make_rule("joined")
    base = "usual retain-graph loop, LSTM 2x20"
    work = {
        base: (cell_loop(task, lean=False), 1),
        "lean retain-graph loop, LSTM 2x20": (cell_loop(task, lean=True), 1),
        "reference_window, LSTM 2x20": (loop(task, big), 1),
        "reference_window, LSTM 8 joined": (loop(task, small), 1),
        "adjoint, LSTM 2x20, 10 %": (engine(task, big, 1, 0.1), 1),
        "adjoint, LSTM 2x20, 10 %, 4 copies": (engine(task, big, 4, 0.1), 4),
        "adjoint, LSTM 8 joined, 10 %": (engine(task, small, 1, 0.1), 1),
        "adjoint, LSTM 8 joined, 10 %, 4 copies": (engine(task, small, 4, 0.1), 4),
        "adjoint, LSTM 8 joined, 100 %": (engine(task, small, 1, 1.0), 1),
    }
    times = in_turn({name: run for name, (run, _) in work.items()}, rounds)
    rows = []
    for name, (_, copies) in work.items():
        rates = [UNROLL * copies / seconds for seconds in times[name]]
        slow = [UNROLL / seconds for seconds in times[base]]
        rows.append(
            row(name, sorted(rates)[len(rates) // 2], "inner steps/s", base,
                median_ratio(rates, slow))
        )  # fmt: skip
    report("meta_training", rows)


if __name__ == "__main__":
    main()
