"""What recipes share: how much to measure, rules and baselines made once, one set of records."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from stepsmith.evaluate import BASELINES, Baseline, Evaluation, Key, Records, evaluate
from stepsmith.hub import TrainedRule, load
from stepsmith.meta import meta_train, train_curriculum
from stepsmith.report import refuse_results, verdicts, write_results
from stepsmith.rules import Rule
from stepsmith.store import CheckpointError, require_place
from stepsmith.tasks import Task, make_task

_log = logging.getLogger("stepsmith")

USUAL_BATCH = 128
"""Examples of a batch where a meta-training's name in the cache says nothing else."""


@dataclass(frozen=True)
class Horizon:
    """Steps of a comparison, and runs of each optimizer and of each rate tried."""

    steps: int
    seeds: int
    tuning_seeds: int

    def times(self, runs: int, tuning: int) -> Horizon:
        """The same with so many times the runs and the tuning runs."""
        return Horizon(self.steps, self.seeds * runs, self.tuning_seeds * tuning)

    def fewer(self, share: int, tuning: int = 2) -> Horizon:
        """A share of the runs, two at least, and at most so many tuning runs."""
        return replace(
            self, seeds=max(2, self.seeds // share), tuning_seeds=min(tuning, self.tuning_seeds)
        )


@dataclass(frozen=True)
class Scale:
    """How much a recipe measures.

    Args:
        name: `full`; `hundred`, the full scale without its longer horizons; `small`, of the deep
            networks of SL2O on two cores (amounts: `DEPTHS` of `stepsmith.recipes.paper_b.deep`);
            or `quick`.
        first: the horizon of the paper's figures.
        long: a further horizon, None for none.
        longest: one more, for the MLP.
        meta: share of every meta-training's budget that is spent.
        timing_rounds: of each optimizer's step.
        source: where data come from by default.
    """

    name: str
    first: Horizon
    long: Horizon | None
    longest: Horizon | None
    meta: float
    timing_rounds: int
    source: str


FULL = Scale(
    "full", Horizon(100, 100, 4), Horizon(1000, 16, 2), Horizon(10_000, 8, 1), 1.0, 15, "auto"
)
QUICK = Scale("quick", Horizon(20, 4, 1), Horizon(40, 2, 1), Horizon(60, 2, 1), 0.002, 1, "sample")
HUNDRED = replace(FULL, name="hundred", long=None, longest=None)
SMALL = replace(HUNDRED, name="small")
SCALES = {scale.name: scale for scale in (FULL, HUNDRED, SMALL, QUICK)}


@dataclass
class Study:
    """One run of a recipe: makes its tasks, rules and comparisons, and keeps what they measured.

    Args:
        recipe: its name, for the records.
        scale: how much to measure.
        cache: folder of tuned baselines, runs and meta-trained rules, shared by recipes.
        source, data_dir: where data come from, as in `load_images`.
        say: told what is being done.
        device: where tasks run.

    Attributes:
        records: everything measured so far.
        findings: what a recipe derives from them, JSON-able; saved with the configuration.
    """

    recipe: str
    scale: Scale
    cache: Path
    source: str | None = None
    data_dir: str | None = None
    say: Callable[[str], None] = lambda message: None
    device: str = "cpu"
    records: Records = field(default_factory=Records)
    findings: dict[str, Any] = field(default_factory=dict)

    def task(self, name: str, **options: Any) -> Task:
        """A task by name, on this study's data."""
        where = self.where if self.device == "cpu" else {**self.where, "device": self.device}
        return make_task(name, **where, **options)

    @property
    def where(self) -> dict[str, Any]:
        """Where data come from, as arguments of `load_images`."""
        return {"source": self.source or self.scale.source, "data_dir": self.data_dir}

    @contextmanager
    def kept(self, kind: str, name: str, decides: Mapping[str, Any]) -> Iterator[Path]:
        """A folder of the cache for what is made once, whoever else wants it meanwhile waiting.

        Args:
            kind: of what is made there: `rules`, `bases`.
            name: to begin the folder's name with, where there is none yet.
            decides: everything that decides what is made, JSON-able.
        """
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        place = self.cache / kind
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / f".{digest}.lock"):  # recipes that run side by side share one cache
            folder = min(place.glob(f"*-{digest}"), default=place / f"{name}-{digest}")
            folder.mkdir(exist_ok=True)
            yield folder

    def meta_train(
        self,
        name: str,
        tasks: list[Task],
        start: Rule | TrainedRule,
        config: dict[str, Any],
    ) -> TrainedRule:
        """Meta-train once, and keep it in the cache, where it is found by its configuration: under
        whatever name it was made.

        Args:
            name: of the rule, and of its folder.
            tasks: to train on.
            start: a fresh rule, or one to go on from.
            config: of `meta_train`, or of `train_curriculum` where it has `horizons`.
        """
        decides: dict[str, Any] = {
            "tasks": [[task.name, task.data_name] for task in tasks], "config": config,
            "start": start.fingerprint if isinstance(start, TrainedRule) else repr(start),
        }  # fmt: skip
        if any(task.details for task in tasks):
            decides["details"] = [task.details for task in tasks]
        sizes = [getattr(task, "batch_size", None) for task in tasks]
        if any(size not in (None, USUAL_BATCH) for size in sizes):
            decides["batch_sizes"] = sizes
        with self.kept("rules", name, decides) as folder:
            made = folder / "rule.safetensors"
            if made.exists():
                try:
                    return load(made)
                except CheckpointError as error:
                    _log.warning("%s; meta-training again", error)
                    made.replace(made.with_suffix(".damaged"))
            self.say(f"meta-training {name}")
            learn = train_curriculum if "horizons" in config else meta_train
            resume = any(folder.rglob("run.safetensors"))
            return learn(tasks, start, out=folder, resume=resume, name=name, **config)

    def scaled(self, config: dict[str, Any], tasks: int) -> dict[str, Any]:
        """A meta-training's configuration with this scale's share of its budget.

        Args:
            config: of `meta_train` or `train_curriculum`, for the full scale.
            tasks: how many it trains on: each has one episode at least.
        """
        horizons = config.get("horizons", (config.get("horizon", 100),))
        least = sum(horizons) * config.get("copies", 4) * tasks
        scaled = {**config, "steps": max(least, int(config["steps"] * self.scale.meta))}
        if self.scale.name == "quick":
            scaled["validation_copies"] = 2
        return scaled

    def compare(
        self,
        task: Task,
        rules: Mapping[str, TrainedRule],
        baselines: Iterable[str | Baseline] = tuple(BASELINES),
        *,
        horizon: Horizon | None = None,
        timing: bool = False,
        **options: Any,
    ) -> Evaluation:
        """`evaluate` at a horizon, the paper's by default, its records added to the study's."""
        horizon = horizon or self.scale.first
        result = evaluate(
            task, rules, baselines, recipe=self.recipe, scale=self.scale.name,
            cache=self.cache / "baselines", say=self.say, steps=horizon.steps, seeds=horizon.seeds,
            tuning_seeds=horizon.tuning_seeds,
            timing_rounds=self.scale.timing_rounds if timing else 0, **options,
        )  # fmt: skip
        self.records.extend(result.records)
        return result


@dataclass(frozen=True)
class Recipe:
    """A figure or table as a program.

    Args:
        name: such as `a2-mlp`.
        what: one line of what it measures.
        run: does it all.
        scales: names of those it has.
    """

    name: str
    what: str
    run: Callable[[Study], None]
    scales: tuple[str, ...] = ("full", "hundred", "quick")


def run_recipe(
    recipe: Recipe,
    scale: Scale,
    *,
    folder: Path,
    cache: Path,
    command: str,
    source: str | None = None,
    data_dir: str | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Run a recipe and write its results; returns the summary.

    Args:
        recipe, scale: what, and how much.
        folder: of the results.
        cache: see `Study`.
        command: that reproduces it.
        source, data_dir: where data come from.
        overwrite: replace the results in `folder`.
        device: where tasks run.
        say: told what is being done.

    Raises:
        ValueError: the recipe has no such scale, `folder` holds results already, it or `cache`
            cannot be written to, or nothing was measured.
    """
    if scale.name not in recipe.scales:
        others = ", ".join(f"--{name}" for name in recipe.scales if name != "full")
        raise ValueError(f"{recipe.name}: has no scale --{scale.name}; it has {others}, and full")
    if not overwrite:
        refuse_results(folder, "pass --overwrite, or another --out")
    require_place(folder, "--out")
    require_place(cache, "--cache")
    study = Study(recipe.name, scale, cache, source, data_dir, say, device)
    recipe.run(study)
    if not any(study.records.select("train_loss")):
        raise ValueError(f"{recipe.name}: nothing was measured; were its data found?")
    say("drawing the report")
    config = {
        "recipe": recipe.name, "what": recipe.what, "scale": scale.name,
        "source": source or scale.source, "device": device, "core_hours": core_hours(study.records),
        "findings": study.findings,
    }  # fmt: skip
    summary = write_results(
        folder, study.records, recipe=recipe.name, scale=scale.name, command=command,
        config=config, overwrite=overwrite,
    )  # fmt: skip
    return {**summary, "verdicts": verdicts(summary["rows"])}


def core_hours(records: Records) -> dict[str, float]:
    """Processor hours of the comparisons, with their bases, and of the rules' meta-training,
    wherever they were spent: what a recipe costs from nothing. A rule that others went on from
    counts once."""
    tests = sum(float(block.values.sum()) for block in records.select("core_seconds"))
    parents: dict[Key, dict[str, float]] = {}
    for block in records.select("parent_core_seconds"):
        found = parents.setdefault(replace(block.key, checkpoint=""), {})
        found[block.key.checkpoint] = float(block.values.sum())
    meta: dict[str, float] = {}
    for block in records.select("meta_training_core_seconds"):
        whole = {block.key.checkpoint: float(block.values.sum())}
        whole |= parents.get(replace(block.key, checkpoint=""), {})
        chain = sorted(whole.items(), key=lambda entry: -entry[1])  # each holds those after it
        for (checkpoint, seconds), (_, before) in itertools.pairwise([*chain, ("", 0.0)]):
            meta[checkpoint] = seconds - before
    return {
        "comparisons": round(tests / 3600, 3),
        "meta_training": round(sum(meta.values()) / 3600, 3),
    }
