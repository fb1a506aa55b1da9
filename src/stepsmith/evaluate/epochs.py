"""Meta-test over many epochs: scheduled baselines, the test split measured after every epoch.

Where an experiment of `evaluate` compares a hundred short runs, one of these compares a few long
ones of a deep network, in full space and in subspaces alike.

Shape letters: S = seeds, E = epochs, T = steps of all epochs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stepsmith.evaluate import cost
from stepsmith.evaluate.cache import Cache, decides_baseline, decides_rule
from stepsmith.evaluate.halving import RUNGS, Halved, Rung, halve
from stepsmith.evaluate.records import Key, Records
from stepsmith.evaluate.run import (
    TUNING_SEED,
    MakeStepper,
    add_costs,
    add_meta_training,
    learned_key,
)
from stepsmith.evaluate.schedules import Scheduled
from stepsmith.evaluate.statistics import score
from stepsmith.evaluate.tuning import CRITERIA, FACTOR, hyper_parameters
from stepsmith.hub import TrainedRule
from stepsmith.optim import LearnedOptimizer
from stepsmith.tasks.base import Task
from stepsmith.unroll import Copies, RuleStepper, TorchStepper, roll


@dataclass(frozen=True)
class Length:
    """How long a training is.

    Args:
        epochs: E; the test split is measured after each.
        steps: of an epoch.

    Raises:
        ValueError: fewer than one of either.
    """

    epochs: int
    steps: int

    def __post_init__(self):
        if self.epochs < 1 or self.steps < 1:
            raise ValueError(
                f"Length: needs an epoch and a step at least, got {self.epochs} and {self.steps}"
            )

    @property
    def total(self) -> int:
        """T."""
        return self.epochs * self.steps


@dataclass
class Contest:
    """Optimizers compared on one network and its data, wherever each of them moves it.

    Args:
        name: of the task in the records: one name for full space and subspaces.
        length: of every training.
        seeds: of the tests.
        key: recipe, scale and protocol of the records.
        records: gets every measurement.
        cache: folder as for `evaluate`, or None.
        copies: trainings at once.
        rungs: of the tuning; one tuning seed.
        timing_rounds: of each optimizer's step; 0 times none.
        say: told what is being done.

    Attributes:
        tuned: what was tried for each baseline.
    """

    name: str
    length: Length
    seeds: Sequence[int]
    key: Key
    records: Records
    cache: Any = None
    copies: int = 1
    rungs: tuple[Rung, ...] = RUNGS
    timing_rounds: int = 0
    say: Callable[[str], None] = lambda message: None
    tuned: dict[str, Halved] = field(default_factory=dict)

    def baseline(
        self, label: str, tasks: Task | Sequence[Task], entry: Scheduled, rate: float | None = None
    ) -> float:
        """Tune a baseline and test it.

        Args:
            label: its name in the records.
            tasks: where it moves the network; of several, seed number i trains the i-th, and the
                first is tuned on.
            entry: the baseline.
            rate: taken as it is, without tuning, where given.

        Returns:
            The rate tested.
        """
        tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
        first = tasks[0]
        if rate is None:
            found = self._tune(label, first, entry)
            self.tuned[label] = found
            rate = found.rate
            if found.at_edge:
                self.say(f"{self.name}: {label}'s best rate is an edge of its grid")
        make = entry.at(rate, self.length.total)
        key = replace(
            self._key(first), optimizer=label, kind="baseline", tuned_for=",".join(CRITERIA),
            hyper_parameters=json.dumps(hyper_parameters(entry, rate)),
        )  # fmt: skip
        decides = decides_baseline(entry, schedule=repr(entry.schedule), rate=rate)
        self._test(label, tasks, key, _by_torch(make), decides)
        self._time(label, first, make)
        return rate

    def rule(self, label: str, tasks: Task | Sequence[Task], trained: TrainedRule) -> None:
        """Test a learned rule: on one task, or with seed number i on the i-th of several."""
        tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
        key = learned_key(self._key(tasks[0]), label, trained)
        self._test(label, tasks, key, _by_rule(trained), decides_rule(trained))
        add_meta_training(self.records, key, trained)
        self._time(label, tasks[0], functools.partial(LearnedOptimizer, rule=trained))

    def _key(self, task: Task) -> Key:
        return replace(
            self.key, task=self.name, network=task.network_name, data=task.data_name,
            horizon=self.length.total,
        )  # fmt: skip

    def _tune(self, label: str, task: Task, entry: Scheduled) -> Halved:
        """The rate whose training ends lowest, by the mean loss of its last tenth."""

        def measure() -> Records:
            found = Records()

            def run(rate: float, share: float) -> float:
                steps = max(1, round(share * self.length.total))
                make = _by_torch(entry.at(rate, steps))
                losses, _ = train_epochs([task], make, [TUNING_SEED], Length(1, steps), test=False)
                value = float(score(losses, "final").mean())
                key = replace(
                    self._key(task), purpose="tuning", optimizer=label, kind="baseline",
                    hyper_parameters=json.dumps(
                        {**hyper_parameters(entry, rate), "share": round(share, 6)}
                    ),
                )  # fmt: skip
                found.add(key, "final_loss", [value], seeds=[TUNING_SEED], steps=[steps])
                return value

            result = halve(run, entry.centre, rungs=self.rungs)
            told = replace(found.blocks[0].key, purpose="tuned")
            found.add(told, "rate", [result.rate], seeds=[0], steps=[0])
            found.add(told, "at_edge", [float(result.at_edge)], seeds=[0], steps=[0])
            return found

        decides = decides_baseline(
            entry, schedule=repr(entry.schedule), halving=repr(self.rungs), factor=FACTOR,
            steps=self.length.total, tuning_seed=TUNING_SEED,
        )  # fmt: skip
        self.say(f"{self.name}: tuning {label}")
        kept = Cache.of(self.cache, task)
        found = kept.fetch(f"tune-{label}", decides, measure, self._adopt)
        self.records.extend(found)
        (rate,), (edge,) = (
            [float(block.values.item()) for block in found.select(metric, purpose="tuned")]
            for metric in ("rate", "at_edge")
        )
        scores = {
            (block.key.parameters["lr"], block.key.parameters["share"]): float(block.values.item())
            for block in found.select("final_loss", purpose="tuning")
        }
        return Halved(rate, scores, bool(edge))

    def _test(
        self,
        label: str,
        tasks: list[Task],
        key: Key,
        make: MakeStepper,
        decides: dict[str, Any] | None,
    ) -> None:
        def measure() -> Records:
            found = Records()
            losses_ST, tests = train_epochs(
                tasks, make, self.seeds, self.length, copies=self.copies
            )
            found.add(key, "train_loss", losses_ST, seeds=self.seeds,
                      steps=range(self.length.total), split="train")  # fmt: skip
            ends = [self.length.steps * (epoch + 1) for epoch in range(self.length.epochs)]
            for metric, values_SE in tests.items():
                found.add(key, f"test_{metric}", values_SE, seeds=self.seeds, steps=ends,
                          split="test")  # fmt: skip
            return found

        self.say(f"{self.name}: {label}")
        kept = Cache.of(self.cache, tasks[0])
        if decides is not None:
            decides = {
                **decides, "epochs": self.length.epochs, "steps": self.length.steps,
                "seeds": list(self.seeds), "protocol": key.protocol,
                "others": [Cache.of(self.cache, task).task for task in tasks[1:]],
            }  # fmt: skip
        self.records.extend(
            kept.fetch(label, decides, measure, lambda old: replace(key, purpose=old.purpose))
        )

    def _adopt(self, old: Key) -> Key:
        same = {name: getattr(self.key, name) for name in ("recipe", "scale", "protocol")}
        return replace(old, **same)

    def _time(self, label: str, task: Task, make: cost.MakeOptimizer) -> None:
        if self.timing_rounds:
            add_costs(self.records, task, {label: make}, self._key(task), self.timing_rounds)


def train_epochs(
    tasks: Sequence[Task],
    make: MakeStepper,
    seeds: Sequence[int],
    length: Length,
    *,
    copies: int = 1,
    test: bool = True,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Train one optimizee a seed, epoch by epoch.

    Args:
        tasks: seed number i trains the i-th, or the only one.
        make: makes a stepper for some copies.
        seeds: S of them.
        length: E epochs of so many steps.
        copies: how many at once, where they are of one task.
        test: measure the test split after every epoch.

    Returns:
        (S, T) batch losses before each step, and (S, E) test metrics by name.

    Raises:
        ValueError: neither one task nor one a seed.
    """
    if len(tasks) not in (1, len(seeds)):
        raise ValueError(
            f"train_epochs: give one task, or one for each of {len(seeds)} seeds; got {len(tasks)}"
        )
    at_once = copies if len(tasks) == 1 else 1
    losses, tests = [], []
    for start in range(0, len(seeds), at_once):
        task = tasks[0] if len(tasks) == 1 else tasks[start]
        group = Copies(task, seeds[start : start + at_once])
        stepper = make(group)
        parts, measured = [], []
        for _ in range(length.epochs):
            parts.append(roll(group, stepper, length.steps).T.double().cpu().numpy())
            if test and task.has_test:
                measured.append({k: v.double().cpu().numpy() for k, v in group.test().items()})
        losses.append(np.concatenate(parts, 1))
        tests.append(measured)
    names = tests[0][0] if tests[0] else {}
    return np.concatenate(losses), {
        name: np.concatenate(
            [np.stack([epoch[name] for epoch in measured], 1) for measured in tests]
        )
        for name in names
    }


def _by_torch(make: cost.MakeOptimizer) -> MakeStepper:
    return lambda group: TorchStepper(make, group.theta, group.layout)


def _by_rule(trained: TrainedRule) -> MakeStepper:
    return lambda group: RuleStepper(trained.rule, trained.weights, group.theta, group.layout)
