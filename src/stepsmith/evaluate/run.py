"""Meta-test: any mix of rules and `torch.optim` optimizers on a task, with tuned baselines.

Shape letters: S = seeds, T = steps.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepsmith.evaluate import cost
from stepsmith.evaluate.baselines import BASELINES, Baseline, baseline, require_rate
from stepsmith.evaluate.cache import (
    Cache,
    decides_baseline,
    decides_optimizer,
    decides_rule,
    together,
)
from stepsmith.evaluate.records import Key, Records, contiguous
from stepsmith.evaluate.schedules import Scheduled
from stepsmith.evaluate.statistics import require_positive, summarise
from stepsmith.evaluate.tuning import (
    CRITERIA,
    FACTOR,
    NARROW,
    WIDEST,
    Tuned,
    hyper_parameters,
    tune,
    tuned_from,
)
from stepsmith.hub import TrainedRule, as_trained
from stepsmith.names import unknown
from stepsmith.optim import LearnedOptimizer
from stepsmith.rules import Rule
from stepsmith.rules.base import require_count, require_kind, set_checked
from stepsmith.rules.trust import usual_trust
from stepsmith.tasks.base import Task
from stepsmith.unroll import Copies, RuleStepper, Stepper, TorchStepper, TrustedStepper, roll

TUNING_SEED = 500_000
"""Tuning optimizees take seeds from here up; tests take them from 0, validation from 1,000,000."""

AnyRule = TrainedRule | Rule | str | Path
MakeStepper = Callable[[Copies], Stepper]


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Args:
        steps: T, the horizon.
        seeds: S, runs of each optimizer.
        tuning_seeds: runs of each rate.
        points: rates of the first tuning grid.
        tune_around: baseline -> a rate known to be good, such as the optimum of a shorter horizon;
            its first grid is then the few rates around it (see `tune`).
        copies: optimizees at once.
        timing_rounds: timings of each optimizer's step; 0 measures no seconds.

    Raises:
        ValueError: zero seeds or steps, or another value out of range.
        TypeError: a value of another type.
    """

    steps: int = 100
    seeds: int = 32
    tuning_seeds: int = 8
    points: int = 9
    tune_around: Mapping[str, float] | None = None
    copies: int = 16
    timing_rounds: int = 15

    def __post_init__(self):
        owner = "evaluate"
        least = {"points": 9, "timing_rounds": 0}
        # Tests take seeds from 0 up, tuning takes them from `TUNING_SEED`; records hold steps as
        # int32.
        most = {"steps": 2**31 - 1, "seeds": TUNING_SEED, "tuning_seeds": TUNING_SEED}
        for name in ("steps", "seeds", "tuning_seeds", "copies", "points", "timing_rounds"):
            bounds = {"least": least.get(name, 1), "most": most.get(name, 2**31 - 1)}
            set_checked(self, **{name: require_count(owner, name, getattr(self, name), **bounds)})
        if self.tune_around is not None:
            require_kind(owner, "tune_around", self.tune_around, Mapping, "a rate by name")
            around = {
                name: require_rate(owner, f"tune_around[{name!r}]", rate)
                for name, rate in self.tune_around.items()
            }
            set_checked(self, tune_around=around)


@dataclass
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        records: every measurement.
        tuned: the tuned baselines, by name.
    """

    records: Records = field(default_factory=Records)
    tuned: dict[str, Tuned] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """The summary's rows; see `stepsmith.evaluate.statistics.Row`."""
        return summarise(self.records)


def evaluate(
    task: Task,
    rules: AnyRule | Mapping[str, AnyRule] | Iterable[AnyRule] = (),
    baselines: str | Baseline | Iterable[str | Baseline] = tuple(BASELINES),
    *,
    optimizers: Mapping[str, cost.MakeOptimizer] | None = None,
    recipe: str = "evaluate",
    scale: str = "full",
    protocol: str = "corrected",
    cache: str | Path | None = None,
    say: Callable[[str], None] = lambda message: None,
    **settings: Any,
) -> Evaluation:
    """Compare optimizers on fresh starts of a task.

    Args:
        task: what to train. Every seed means the same start and the same batches for all.
        rules: rules to test, one or several, these with names of their own if wanted: bundled
            names, paths, `TrainedRule`s, or rules without weights.
        baselines: names from `BASELINES`, or `Baseline`s, one or several; rates are tuned on other
            seeds.
        optimizers: further optimizers taken as they are, name -> callable of parameters; the
            arguments of a `functools.partial` are recorded.
        recipe, scale, protocol: for the records.
        cache: folder where tuned baselines and the runs of rules and other optimizers are kept,
            and read where task, settings, optimizer and, for rules, weights and code are the same;
            seconds are measured anew. Folders may be shared by tasks and experiments.
        say: told what is being done.
        settings: fields of `Settings` (steps, seeds, tuning_seeds, points, copies, ...).

    Raises:
        ValueError: a bad setting, an unknown name, two optimizers of one name, nothing to compare,
            a loss that is not above zero at a start, a cache that is no folder or cannot be written
            to (one that fills up later is said, and what was measured is returned).
        TypeError: an argument of another type.
    """
    require_kind("evaluate", "task", task, Task, "stepsmith.make_task makes one of a name")
    wanted = Settings(**settings)
    for name, text in (("recipe", recipe), ("scale", scale), ("protocol", protocol)):
        require_kind("evaluate", name, text, str)
    require_kind("evaluate", "say", say, Callable)
    named = named_rules(rules)
    chosen = chosen_baselines("evaluate", baselines)
    require_kind("evaluate", "optimizers", optimizers, Mapping | None, "a callable by name")
    for name, make in (optimizers or {}).items():
        require_kind("evaluate", "a name among optimizers", name, str)
        require_kind("evaluate", f"optimizers[{name!r}]", make, Callable, "of parameters")
    if scheduled := [entry.name for entry in chosen if isinstance(entry, Scheduled)]:
        raise ValueError(
            f"evaluate: {scheduled[0]!r} has a schedule, which only a Contest over epochs follows; "
            "give a Baseline, or an optimizer that changes its own rate under `optimizers`"
        )
    names = Counter([*named, *(entry.name for entry in chosen), *(optimizers or {})])
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"evaluate: two optimizers are called {twice[0]!r}; rename one")
    for name in wanted.tune_around or {}:
        if name not in BASELINES and name not in {entry.name for entry in chosen}:
            raise unknown("baseline", name, {*BASELINES, *(entry.name for entry in chosen)})
    if not named and not chosen and not optimizers:
        raise ValueError("evaluate: nothing to compare; give rules, baselines or optimizers")
    key = Key(
        recipe=recipe, scale=scale, protocol=protocol, task=task.name, network=task.network_name,
        data=task.data_name, horizon=wanted.steps,
    )  # fmt: skip
    kept = Cache.of(cache, task)
    result = Evaluation()
    timed: dict[str, cost.MakeOptimizer] = {}
    keys: dict[str, Key] = {}
    for entry in chosen:
        say(f"{task.name}: tuning {entry.name}")
        tuned = _tuned_baseline(task, entry, key, wanted, result.records, kept)
        if tuned.at_edge:
            tried = len(tuned.tried)
            say(f"{task.name}: {entry.name}'s best rate is still the edge of {tried} rates")
        result.tuned[entry.name] = tuned
        timed[entry.name] = at_rate(entry, tuned.rates["mean"])
        keys[entry.name] = replace(key, optimizer=entry.name, kind="baseline")
    for name, make in (optimizers or {}).items():
        say(f"{task.name}: {name}")
        given = make.keywords if isinstance(make, functools.partial) else {}
        own = replace(
            key, optimizer=name, kind="baseline", hyper_parameters=json.dumps(given, default=str)
        )  # fmt: skip
        _tested_optimizer(task, make, own, wanted, result.records, kept)
        timed[name], keys[name] = make, own
    for name, trained in named.items():
        say(f"{task.name}: {name}")
        own = learned_key(key, name, trained)
        _tested_rule(task, trained, own, wanted, result.records, kept)
        add_meta_training(result.records, own, trained)
        timed[name], keys[name] = functools.partial(LearnedOptimizer, rule=trained), own
    if wanted.timing_rounds:
        say(f"{task.name}: timing steps")
        times = cost.seconds_per_step(task, timed, rounds=wanted.timing_rounds)
        add_times(result.records, times, keys)
    return result


def learned_key(key: Key, name: str, trained: TrainedRule) -> Key:
    """The key of a learned rule's measurements (of a classic rule's: kind `baseline`)."""
    learned = trained.rule.learned
    return replace(
        key, optimizer=name, kind="learned" if learned else "baseline",
        rule=type(trained.rule).__name__, meta_task=",".join(trained.manifest.get("tasks", [])),
        checkpoint=trained.fingerprint[:16] if learned else "",
        hyper_parameters=json.dumps(trained.rule.config()),
    )  # fmt: skip


def train(
    task: Task, make: MakeStepper, seeds: Sequence[int], steps: int, copies: int, test: bool = False
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Train one copy a seed.

    Args:
        task: the task.
        make: makes a stepper for some copies.
        seeds: S of them.
        steps: T.
        copies: how many at once.
        test: measure the test split at the end.

    Returns:
        (S, T) batch losses before each step, and (S,) test metrics by name.

    Raises:
        ValueError: a loss that is not above zero at a start, no seeds, or fewer than one step or
            copy.
        TypeError: an argument of another type.
    """
    require_kind("train", "task", task, Task)
    require_kind("train", "make", make, Callable, "it makes a stepper for some copies")
    seeds = require_seeds("train", seeds)
    steps, copies = require_count("train", "steps", steps), require_count("train", "copies", copies)
    losses, tests = [], []
    for start in range(0, len(seeds), copies):
        group = Copies(task, seeds[start : start + copies])
        losses.append(roll(group, make(group), steps).T.double().cpu().numpy())
        require_positive(task.name, losses[-1])
        if test:
            tests.append({k: v.double().cpu().numpy() for k, v in group.test().items()})
    metrics = {name: np.concatenate([t[name] for t in tests]) for name in tests[0]} if tests else {}
    return contiguous(np.concatenate(losses)), metrics


def cost_key(key: Key) -> Key:
    """Of what an optimizer costs, whatever it was tuned for, from the key of its measurements."""
    return replace(key, purpose="cost", tuned_for="")


def add_times(
    records: Records, times: Mapping[str, Sequence[cost.StepTime]], keys: Mapping[str, Key]
) -> None:
    """Record what steps took, by optimizer, under the key of its measurements, one round a seed."""
    metrics = ("seconds_per_step", "gradient_seconds", "core_seconds_per_step")
    for name, rounds in times.items():
        own = cost_key(keys[name])
        for metric, values in zip(metrics, zip(*rounds, strict=True), strict=True):
            records.add(own, metric, values, seeds=range(len(values)), steps=[0])


def add_meta_training(records: Records, key: Key, trained: TrainedRule) -> None:
    """Record what a rule's meta-training cost and how it went, where its manifest says so."""
    add_meta_cost(records, key, trained)
    own = replace(key, purpose="meta")
    parent = trained.manifest.get("parent")
    while parent and "core_seconds" in trained.manifest and "core_seconds" in parent:
        counted = replace(own, checkpoint=parent["fingerprint"][:16])
        records.add(counted, "parent_core_seconds", [parent["core_seconds"]], seeds=[0], steps=[0])
        parent = parent.get("parent")
    points = trained.manifest.get("validations", [])
    if points:
        steps = [point["inner_steps"] for point in points]
        scores = [point["score"] for point in points]
        split = trained.manifest.get("meta_training", {}).get("validation_split", "meta_valid")
        records.add(own, "validation_score", [scores], seeds=[0], steps=steps, split=split)


def add_meta_cost(records: Records, key: Key, trained: TrainedRule) -> None:
    """Record the seconds of a rule's meta-training, where its manifest says them."""
    for metric in ("seconds", "core_seconds"):
        if metric in trained.manifest:
            value, own = trained.manifest[metric], replace(key, purpose="meta")
            records.add(own, f"meta_training_{metric}", [value], seeds=[0], steps=[0])


def named_rules(
    rules: AnyRule | Mapping[str, AnyRule] | Iterable[AnyRule],
) -> dict[str, TrainedRule]:
    """Rules as `evaluate` takes them, loaded, by the names they have in records.

    Raises:
        TypeError: something else.
    """
    if isinstance(rules, Mapping):
        return {str(name): as_trained(rule) for name, rule in rules.items()}
    if isinstance(rules, AnyRule):
        rules = [rules]
    require_kind("evaluate", "rules", rules, Iterable, "rules, names or paths")
    named: dict[str, TrainedRule] = {}
    for rule in rules:
        trained = as_trained(rule)
        name = f"learned ({trained.name})" if trained.rule.learned else f"rule {trained.name}"
        while name in named:
            name += "'"
        named[name] = trained
    return named


def chosen_baselines(
    owner: str, baselines: str | Baseline | Iterable[str | Baseline]
) -> list[Baseline]:
    """Baselines as `evaluate` takes them.

    Raises:
        ValueError: an unknown name.
        TypeError: something else.
    """
    given = [baselines] if isinstance(baselines, str | Baseline) else baselines
    require_kind(owner, "baselines", given, Iterable, "names or Baselines")
    return [entry if isinstance(entry, Baseline) else baseline(entry) for entry in given]


def require_seeds(owner: str, seeds: Iterable[int]) -> list[int]:
    """Seeds of trainings, as Python's numbers.

    Raises:
        ValueError: none, one twice, or one below 0.
        TypeError: no whole numbers.
    """
    require_kind(owner, "seeds", seeds, Iterable, "whole numbers, such as range(4)")
    found = [require_count(owner, "each of the seeds", seed, least=0) for seed in seeds]
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{owner}: needs seeds, each once, got {found}")
    return found


def by_rule(trained: TrainedRule, *, trusted: bool = True) -> MakeStepper:
    """What makes a rule's stepper for some copies; `trusted` as far as `LearnedOptimizer` trusts
    it, else by its bare steps."""
    trust = usual_trust(trained.rule, trained.manifest) if trusted else None

    def make(group: Copies) -> Stepper:
        given = (trained.rule, trained.weights, group.theta, group.layout)
        return RuleStepper(*given) if trust is None else TrustedStepper(*given, trust=trust)

    return make


def by_torch(make: cost.MakeOptimizer) -> MakeStepper:
    """What makes a `torch.optim` optimizer's stepper for some copies."""
    return lambda group: TorchStepper(make, group.theta, group.layout)


def at_rate(entry: Baseline, rate: float) -> cost.MakeOptimizer:
    """What makes a baseline's optimizer at a rate."""
    arguments = hyper_parameters(entry, rate)

    def make(params: Iterable[Tensor]) -> torch.optim.Optimizer:
        return entry.make(params, **arguments)

    return make


def _test(task: Task, key: Key, make: MakeStepper, wanted: Settings, records: Records) -> None:
    seeds = range(wanted.seeds)
    losses_ST, metrics = train(task, make, seeds, wanted.steps, wanted.copies, task.has_test)
    steps = range(wanted.steps)
    records.add(key, "train_loss", losses_ST, seeds=seeds, steps=steps, split="train")
    for metric, values_S in metrics.items():
        records.add(
            key, f"test_{metric}", values_S, seeds=seeds, steps=[wanted.steps], split="test"
        )


def _tested_rule(
    task: Task, trained: TrainedRule, key: Key, wanted: Settings, records: Records, cache: Cache
) -> None:
    def measure() -> Records:
        found = Records()
        # A paper's protocol makes the steps that the paper made.
        trusted = key.protocol != "as-published"
        _test(task, key, by_rule(trained, trusted=trusted), wanted, found)
        return found

    decides = decides_rule(
        trained, steps=wanted.steps, seeds=wanted.seeds, protocol=key.protocol,
        **together(task, wanted.copies),
    )  # fmt: skip
    records.extend(
        cache.fetch(trained.name, decides, measure, lambda old: replace(key, purpose=old.purpose))
    )


def _tested_optimizer(
    task: Task,
    make: cost.MakeOptimizer,
    key: Key,
    wanted: Settings,
    records: Records,
    cache: Cache,
) -> None:
    def measure() -> Records:
        found = Records()
        _test(task, key, by_torch(make), wanted, found)
        return found

    decides = decides_optimizer(
        make, steps=wanted.steps, seeds=wanted.seeds, protocol=key.protocol,
        **together(task, wanted.copies),
    )  # fmt: skip
    records.extend(
        cache.fetch(key.optimizer, decides, measure, lambda old: replace(key, purpose=old.purpose))
    )


def _tuned_baseline(
    task: Task, entry: Baseline, key: Key, wanted: Settings, records: Records, cache: Cache
) -> Tuned:
    """Tune a baseline, then test it at the best rate of each criterion."""
    seeds = range(TUNING_SEED, TUNING_SEED + wanted.tuning_seeds)
    around = (wanted.tune_around or {}).get(entry.name)

    def losses(entry: Baseline, rate: float) -> np.ndarray:
        make = by_torch(at_rate(entry, rate))
        return train(task, make, seeds, wanted.steps, wanted.copies)[0]

    def measure() -> Records:
        found = Records()
        tuned = tune(entry, losses, found, key, seeds, points=wanted.points, around=around)
        for rate in sorted(set(tuned.rates.values())):
            criteria = [c for c in CRITERIA if tuned.rates[c] == rate]
            own = replace(
                key, optimizer=entry.name, kind="baseline", tuned_for=",".join(criteria),
                hyper_parameters=json.dumps(hyper_parameters(entry, rate)),
            )  # fmt: skip
            _test(task, own, by_torch(at_rate(entry, rate)), wanted, found)
        return found

    grid = {"points": wanted.points} if around is None else {"points": NARROW, "around": around}
    decides = decides_baseline(
        entry, **grid, factor=FACTOR, widest=WIDEST, steps=wanted.steps, seeds=wanted.seeds,
        tuning_seeds=[seeds.start, seeds.stop], protocol=key.protocol,
        **together(task, wanted.copies),
    )  # fmt: skip
    found = cache.fetch(
        entry.name, decides, measure,
        lambda old: replace(old, recipe=key.recipe, scale=key.scale),
    )  # fmt: skip
    records.extend(found)
    return tuned_from(entry, found)
