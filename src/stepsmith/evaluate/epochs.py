"""Meta-test over epochs: scheduled baselines, the test split measured along the way.

Where an experiment of `evaluate` compares a hundred short runs, one of these compares a few long
ones of a deep network, in full space and in subspaces alike.

Shape letters: S = seeds, E = tests, T = steps of all epochs.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from stepsmith.evaluate import cost
from stepsmith.evaluate.baselines import require_rate
from stepsmith.evaluate.cache import Cache, decides_baseline, decides_rule
from stepsmith.evaluate.halving import RUNGS, Halved, Rung, halve
from stepsmith.evaluate.records import Key, Records, contiguous
from stepsmith.evaluate.run import (
    TUNING_SEED,
    MakeStepper,
    add_meta_training,
    add_times,
    by_rule,
    by_torch,
    cost_key,
    learned_key,
    require_seeds,
)
from stepsmith.evaluate.schedules import Schedule, Scheduled, scheduled
from stepsmith.evaluate.statistics import require_positive, score
from stepsmith.evaluate.tuning import hyper_parameters
from stepsmith.hub import TrainedRule
from stepsmith.names import unknown
from stepsmith.optim import LearnedOptimizer
from stepsmith.rules.base import require_count, require_kind, require_number, set_checked
from stepsmith.tasks.base import Task
from stepsmith.unroll import Copies, roll

CONSTANT = Schedule()


@dataclass(frozen=True)
class Length:
    """How long a training is.

    Args:
        epochs: how many.
        steps: of an epoch.
        tests: of an epoch, evenly spread, the last after it: so often the test split is measured.

    Raises:
        ValueError: no whole numbers, fewer than one of any, or more tests than steps.
    """

    epochs: int
    steps: int
    tests: int = 1

    def __post_init__(self):
        counts = (self.epochs, self.steps, self.tests)
        whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in counts)
        if whole:
            epochs, steps, tests = map(int, counts)
            set_checked(self, epochs=epochs, steps=steps, tests=tests)
        if not whole or self.epochs < 1 or not 1 <= self.tests <= self.steps:
            raise ValueError(
                "Length: needs an epoch, a step and a test at least, in whole numbers, and no more "
                f"tests than steps; got {self.epochs} epochs of {self.steps} steps and "
                f"{self.tests} tests"
            )

    @property
    def total(self) -> int:
        """T."""
        return self.epochs * self.steps

    @property
    def ends(self) -> list[int]:
        """Steps made when the test split is measured, E of them."""
        count = self.epochs * self.tests
        return [round(self.total * (number + 1) / count) for number in range(count)]


@dataclass(frozen=True)
class _Entrant:
    """An optimizer that was tested: where, how it is made, and the key of its records."""

    task: Task
    make: cost.MakeOptimizer
    key: Key


@dataclass
class Contest:
    """Optimizers compared on one network and its data, wherever each of them moves it.

    Args:
        name: of the task in the records: one name for full space and subspaces.
        length: of every training.
        seeds: of the tests, each once.
        key: recipe, scale and protocol of the records.
        records: gets every measurement.
        cache: folder as for `evaluate`, or None: every training is kept there by itself.
        copies: trainings at once.
        rungs: of the tuning; one tuning seed.
        timing_rounds: of each optimizer's step; 0 times none.
        say: told what is being done.

    Attributes:
        tuned: what was tried for each baseline.

    Raises:
        ValueError: no seeds or one twice, `copies` below 1, `timing_rounds` below 0, a cache that
            is no folder.
        TypeError: an argument of another type.
    """

    name: str
    length: Length
    seeds: Sequence[int]
    key: Key
    records: Records
    cache: str | Path | None = None
    copies: int = 1
    rungs: tuple[Rung, ...] = RUNGS
    timing_rounds: int = 0
    say: Callable[[str], None] = lambda message: None
    tuned: dict[str, Halved] = field(default_factory=dict, init=False)
    _entrants: dict[str, _Entrant] = field(default_factory=dict, init=False)
    _caches: dict[Task, Cache] = field(default_factory=dict, init=False)

    def __post_init__(self):
        require_kind("Contest", "name", self.name, str)
        require_kind(self.name, "length", self.length, Length, "Length(epochs, steps)")
        require_kind(self.name, "key", self.key, Key)
        require_kind(self.name, "records", self.records, Records)
        require_kind(self.name, "say", self.say, Callable)
        require_kind(self.name, "rungs", self.rungs, tuple, "of Rung")
        self.seeds = require_seeds(self.name, self.seeds)
        self.copies = require_count(self.name, "copies", self.copies, least=-(2**31))
        rounds = require_count(self.name, "timing_rounds", self.timing_rounds, least=-(2**31))
        self.timing_rounds = rounds
        if self.copies < 1 or self.timing_rounds < 0:
            raise ValueError(
                f"{self.name}: copies must be at least 1 and timing_rounds at least 0, got "
                f"{self.copies} and {self.timing_rounds}"
            )

    def baseline(
        self,
        label: str,
        tasks: Task | Sequence[Task],
        entry: Scheduled,
        rate: float | None = None,
        *,
        tuned_for: str = "",
    ) -> float:
        """Tune a baseline, by the final loss of its training, and test it.

        Args:
            label: its name in the records, one that no other has.
            tasks: where it moves the network; of several, seed number i trains the i-th, and the
                first is tuned on.
            entry: the baseline.
            rate: taken as it is, without tuning, where given.
            tuned_for: what a given rate was tuned for elsewhere, `final` say.

        Returns:
            The rate tested.

        Raises:
            ValueError: neither one task nor one a seed, a name taken, or a rate that is not above
                0.
            TypeError: an argument of another type.
        """
        tasks = self._one_or_one_each(tasks)
        self._require_new(label)
        require_kind(self.name, "entry", entry, Scheduled, "a Baseline with a schedule")
        require_kind(self.name, "tuned_for", tuned_for, str)
        if rate is not None:
            rate = require_rate(self.name, f"{label}'s rate", rate)
        if rate is None:
            found = self._tune(label, tasks[0], entry)
            self.tuned[label] = found
            rate, tuned_for = found.rate, "final"
            if found.at_edge:
                self.say(f"{self.name}: {label}'s best rate is an edge of its grid")
        make = entry.at(rate, self.length.total)
        key = replace(
            self._key(tasks[0]), optimizer=label, kind="baseline", tuned_for=tuned_for,
            hyper_parameters=json.dumps(hyper_parameters(entry, rate)),
        )  # fmt: skip
        decides = decides_baseline(entry, schedule=repr(entry.schedule), rate=rate)
        self._test(label, tasks, key, by_torch(make), decides)
        self._entrants[label] = _Entrant(tasks[0], make, key)
        return rate

    def rule(
        self,
        label: str,
        tasks: Task | Sequence[Task],
        trained: TrainedRule,
        *,
        schedule: Schedule = CONSTANT,
        meta_task: str = "",
        meta_subspace: float = 0.0,
    ) -> None:
        """Test a learned rule.

        Args:
            label: its name in the records, one that no other has.
            tasks: as for `baseline`.
            trained: the rule.
            schedule: of the factor on its steps, 1 at the start.
            meta_task: the contest it was meta-trained for, where that is to be told by its name.
            meta_subspace: seconds spent on a subspace for its meta-training alone.

        Raises:
            ValueError, TypeError: as `baseline`.
        """
        tasks = self._one_or_one_each(tasks)
        self._require_new(label)
        require_kind(self.name, "trained", trained, TrainedRule, "stepsmith.load gives one")
        require_kind(self.name, "schedule", schedule, Schedule)
        require_kind(self.name, "meta_task", meta_task, str)
        meta_subspace = require_number(self.name, "meta_subspace", meta_subspace, least=0)
        key = learned_key(self._key(tasks[0]), label, trained)
        key = replace(key, meta_task=meta_task or key.meta_task)
        deployed = scheduled(
            functools.partial(LearnedOptimizer, rule=trained), schedule, self.length.total
        )
        # Kept under the rule's name: one rule may be tested under several labels.
        if schedule == CONSTANT:
            make = by_rule(trained, trusted=key.protocol != "as-published")
            self._test(trained.name, tasks, key, make, decides_rule(trained))
        else:
            decides = decides_rule(trained, deployed=True, schedule=repr(schedule))
            self._test(trained.name, tasks, key, by_torch(deployed), decides)
        add_meta_training(self.records, key, trained)
        if meta_subspace:
            own, metric = replace(key, purpose="meta"), "meta_training_subspace_seconds"
            self.records.add(own, metric, [meta_subspace], seeds=[0], steps=[0])
        self._entrants[label] = _Entrant(tasks[0], deployed, key)

    def time_steps(self) -> None:
        """Time the steps of all optimizers in turn, so that a slow moment hits all of them."""
        if self.timing_rounds and self._entrants:
            self.say(f"{self.name}: timing steps")
            timed = {label: (own.task, own.make) for label, own in self._entrants.items()}
            times = cost.seconds_in_turn(timed, rounds=self.timing_rounds)
            keys = {label: own.key for label, own in self._entrants.items()}
            add_times(self.records, times, keys)

    def add_subspace_seconds(self, seconds: float, labels: Iterable[str]) -> None:
        """Record what is spent on a subspace before each training of these optimizers.

        Raises:
            ValueError: one that was not tested, or seconds below 0.
        """
        seconds = require_number(self.name, "seconds", seconds, least=0)
        for label in labels:
            if label not in self._entrants:
                raise unknown("optimizer", label, self._entrants)
            key = cost_key(self._entrants[label].key)
            self.records.add(key, "subspace_seconds", [seconds], seeds=[0], steps=[0])

    def _require_new(self, label: str) -> None:
        require_kind(self.name, "label", label, str)
        if label in self._entrants:
            raise ValueError(f"{self.name}: two optimizers are called {label!r}; rename one")

    def _cache(self, task: Task) -> Cache:
        """To tell a task from others takes a gradient: once a task."""
        if task not in self._caches:
            self._caches[task] = Cache.of(self.cache, task)
        return self._caches[task]

    def _one_or_one_each(self, tasks: Task | Sequence[Task]) -> list[Task]:
        require_kind(self.name, "tasks", tasks, Task | Iterable, "one, or one a seed")
        given = [tasks] if isinstance(tasks, Task) else list(tasks)
        for task in given:
            require_kind(self.name, "each of tasks", task, Task)
        if len(given) not in (1, len(self.seeds)):
            raise ValueError(
                f"{self.name}: give one task, or one for each of {len(self.seeds)} seeds; got "
                f"{len(given)}"
            )
        return given

    def _key(self, task: Task) -> Key:
        return replace(
            self.key, task=self.name, network=task.network_name, data=task.data_name,
            horizon=self.length.total,
        )  # fmt: skip

    def _tune(self, label: str, task: Task, entry: Scheduled) -> Halved:
        """The rate whose training ends lowest, by the mean loss of its last tenth."""
        self.say(f"{self.name}: tuning {label}")
        kept = self._cache(task)

        def run(rate: float, share: float) -> float:
            steps = max(1, round(share * self.length.total))
            key = replace(
                self._key(task), purpose="tuning", optimizer=label, kind="baseline",
                hyper_parameters=json.dumps(
                    {**hyper_parameters(entry, rate), "share": round(share, 6)}
                ),
            )  # fmt: skip

            def measure() -> Records:
                make = by_torch(entry.at(rate, steps))
                losses, _ = train_epochs(task, make, [TUNING_SEED], Length(1, steps), test=False)
                value = float(score(losses, "final").mean())
                found = Records()
                found.add(key, "final_loss", [value], seeds=[TUNING_SEED], steps=[steps])
                return found

            decides = decides_baseline(
                entry, schedule=repr(entry.schedule), rate=rate, steps=steps, tuning=TUNING_SEED
            )
            found = kept.fetch(
                f"tune-{label}", decides, measure, lambda old: replace(key, purpose=old.purpose)
            )
            self.records.extend(found)
            (block,) = found.select("final_loss", purpose="tuning")
            return float(block.values.item())

        return halve(run, entry.centre, rungs=self.rungs)

    def _test(
        self,
        label: str,
        tasks: list[Task],
        key: Key,
        make: MakeStepper,
        decides: dict[str, Any] | None,
    ) -> None:
        """Train and keep it, as many seeds at once as run at once: what is interrupted loses one
        training."""
        self.say(f"{self.name}: {key.optimizer}")
        at_once = self.copies if len(tasks) == 1 else 1
        parts = []
        for start in range(0, len(self.seeds), at_once):
            task = tasks[0] if len(tasks) == 1 else tasks[start]
            seeds = list(self.seeds[start : start + at_once])
            wanted = None
            if decides is not None:
                wanted = {
                    **decides, "epochs": self.length.epochs, "steps": self.length.steps,
                    "tests": self.length.tests, "seeds": seeds, "protocol": key.protocol,
                }  # fmt: skip
            measure = functools.partial(self._trained, task, seeds, key, make)
            parts.append(
                self._cache(task).fetch(
                    label, wanted, measure, lambda old: replace(key, purpose=old.purpose)
                )
            )
        self.records.extend(joined(parts))

    def _trained(self, task: Task, seeds: list[int], key: Key, make: MakeStepper) -> Records:
        found = Records()
        losses_ST, tests = train_epochs(task, make, seeds, self.length)
        steps = range(self.length.total)
        found.add(key, "train_loss", losses_ST, seeds=seeds, steps=steps, split="train")
        for metric, values_SE in tests.items():
            found.add(
                key, f"test_{metric}", values_SE, seeds=seeds, steps=self.length.ends, split="test"
            )
        return found


def joined(parts: Sequence[Records]) -> Records:
    """Records of the same measurements for different seeds as one; what each took, summed."""
    whole = Records()
    for place, block in enumerate(parts[0].blocks):
        like = [part.blocks[place] for part in parts]
        assert {(other.key, other.metric) for other in like} == {(block.key, block.metric)}
        values = [other.values for other in like]
        seeds = np.concatenate([other.seeds for other in like])
        if block.key.purpose == "spent":
            values, seeds = [np.sum(values, axis=0)], block.seeds
        whole.add(block.key, block.metric, np.concatenate(values), seeds=seeds.tolist(),
                  steps=block.steps.tolist(), split=block.split)  # fmt: skip
    return whole


def train_epochs(
    task: Task, make: MakeStepper, seeds: Sequence[int], length: Length, *, test: bool = True
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Train one optimizee a seed, all at once, from test to test; data that come in epochs of their
    own begin one after each.

    Args:
        task: what to train.
        make: makes a stepper for the copies.
        seeds: S of them.
        length: T steps, E tests.
        test: measure the test split.

    Returns:
        (S, T) batch losses before each step, and (S, E) test metrics by name.

    Raises:
        ValueError: a loss that is not above zero at a start, no seeds or one twice.
        TypeError: an argument of another type.
    """
    require_kind("train_epochs", "task", task, Task)
    require_kind("train_epochs", "make", make, Callable, "it makes a stepper for some copies")
    require_kind("train_epochs", "length", length, Length)
    seeds = require_seeds("train_epochs", seeds)
    group = Copies(task, seeds)
    stepper = make(group)
    losses, tests = [], []
    for start, end in itertools.pairwise([0, *length.ends]):
        losses.append(roll(group, stepper, end - start).T.double().cpu().numpy())
        if not start:
            require_positive(task.name, losses[0])
        if test and task.has_test:
            tests.append({k: v.double().cpu().numpy() for k, v in group.test().items()})
    metrics = {name: np.stack([t[name] for t in tests], 1) for name in tests[0]} if tests else {}
    return contiguous(np.concatenate(losses, 1)), metrics
