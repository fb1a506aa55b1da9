"""SL2O on ResNet-20 and CIFAR-10 at the paper's batch and basis, as far as minutes of a GPU go.

    python -m benchmarks.paper_length FOLDER make LABEL[=RATE]@EPOCHS ...
    python -m benchmarks.paper_length FOLDER report

What recipe `b2-resnet20` does at its full scale, reduced to what the paper did: one seed, from the
saved start, baselines at the rates that are named (else table 1's; AdamW's own default), nothing
tuned. Rules run by themselves or, called `LABEL, cosine`, under a cosine. A rule without a schedule
makes the same first steps whatever the length, so its training can be held against the first epochs
of any other; those of `SOONER` are told beside its own.

Trainings are kept in FOLDER as recipes keep theirs, so that several processes can share them out,
and made again at no cost; `report` gathers those that are there. On an H100 a step takes 3.6 ms
where one process trains alone, and took some 8 ms each where three shared it. Data: the smaller
JPEG copy of CIFAR-10, a folder `cifar10_jpeg` below STEPSMITH_DATA_DIR.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.common import report, row
from stepsmith.evaluate import Records
from stepsmith.evaluate.epochs import CONSTANT
from stepsmith.evaluate.statistics import first_reach, last_tenth, penalised
from stepsmith.hub import TrainedRule
from stepsmith.machine import machine, versions
from stepsmith.names import file_name
from stepsmith.recipes.paper_b.clock import CLOSE
from stepsmith.recipes.paper_b.comparisons import OWN, SL2O, of_episodes
from stepsmith.recipes.paper_b.deep import (
    COSINE,
    DEPTHS,
    FULL_SPACE,
    HALVED,
    SAVED,
    SUBSPACE,
    Place,
    contest,
    depth,
    learn,
    learn_own,
    place,
)
from stepsmith.recipes.study import SCALES, Study
from stepsmith.tasks import Task
from stepsmith.tasks.started import StartedTask

NETWORK = "resnet20"
DATA = "cifar10_jpeg@crop@flip@standardised"
SHORT = of_episodes(DEPTHS["full"].descent)
RULES = (SL2O, SHORT, OWN)
UNDER_COSINE = {f"{label}, cosine": label for label in RULES}
BASELINES = {**FULL_SPACE, **SUBSPACE, **HALVED}
SOONER = 10
"""Epochs after which a longer training of a rule is told of too."""
TARGETS = {"the final loss": 1.0, f"within {100 * (CLOSE - 1):.0f} % of it": CLOSE}
"""Levels that trainings come down to, over the final loss of a baseline."""


class Training(NamedTuple):
    """One optimizer's training, for so many epochs; of a baseline, at a rate."""

    label: str
    epochs: int
    rate: float | None = None

    @property
    def name(self) -> str:
        """In its records."""
        return self.label if self.rate is None else f"{self.label} at {self.rate:g}"

    @property
    def contest(self) -> str:
        """Those of as many epochs."""
        return f"{NETWORK}, {self.epochs} epochs"

    @property
    def what(self) -> str:
        """In a row."""
        return f"{NETWORK}, {self.name}, {self.epochs} epochs"

    @property
    def file(self) -> str:
        """Its file's name, without an ending."""
        return file_name(f"{self.name}-{self.epochs}")


def study_in(folder: Path) -> Study:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Study("b2-resnet20", SCALES["full"], folder / "cache", say=say, device=device)


def say(message: str) -> None:
    print(f"{time.strftime('%X')} {message}", flush=True)


def task_of(study: Study) -> Task:
    return study.task(f"{NETWORK}-{DATA}", batch_size=depth(study).batch)


def make(study: Study, training: Training) -> None:
    """A training, and what it needs first."""
    label, task = training.label, task_of(study)
    held = replace(contest(study, training.contest, task, epochs=training.epochs), seeds=range(1))
    if label in BASELINES:
        if label in FULL_SPACE:  # the basis made from the saved start is not waited for
            where = StartedTask(task, *task.init(torch.Generator().manual_seed(SAVED)))
        else:
            where = place(study, NETWORK, DATA).sub
        entry = BASELINES[label]
        held.baseline(training.name, where, entry, training.rate or entry.centre)
    else:
        here = place(study, NETWORK, DATA)
        trained = learned(study, UNDER_COSINE.get(label, label), here)
        schedule = COSINE if label in UNDER_COSINE else CONSTANT
        held.rule(label, here.sub, trained, schedule=schedule)


def learned(study: Study, label: str, here: Place) -> TrainedRule:
    """A rule of `RULES`: the recipe's own, SL2O's validated half as often."""
    if label == OWN:
        return learn_own(study, NETWORK, here)
    amounts = depth(study)
    episode = amounts.descent if label == SHORT else amounts.episode
    return learn(study, f"sl2o-{NETWORK}-N{episode}", here.sub, episode=episode, validations=2)


def told(records: Records, training: Training) -> dict[str, Any]:
    """Where a training ends: its rows, and the curve they are of."""
    about = {"purpose": "test", "task": training.contest, "optimizer": training.name}
    (block,) = records.select("train_loss", **about)
    (tests,) = records.select("test_accuracy", **about)
    curve, accuracies = penalised(block.values)[0], tests.values[0]
    ends = {training.epochs}
    if training.label in RULES:
        ends |= {min(SOONER, training.epochs)}
    rows = []
    for epochs in sorted(ends):
        steps = epochs * len(curve) // training.epochs
        what = training.what if epochs == training.epochs else f"{training.what}, after {epochs}"
        loss = curve[steps - last_tenth(steps) : steps].mean()
        (right,) = accuracies[tests.steps == steps]
        rows.append(row(f"{what}: training loss, last tenth", float(loss), "nats"))
        rows.append(row(f"{what}: test accuracy", 100 * float(right), "%"))
    return {
        "machine": machine(), "versions": versions(), "what": training.what,
        "learned": training.label not in BASELINES, "rows": rows, "curve": curve.tolist(),
    }  # fmt: skip


def gather(folder: Path) -> None:
    """All rows, and in what share of a baseline's steps each of the others comes down to the loss
    which that ends with, or near it, whatever their lengths. What meets a level once may rise
    again."""
    made = [json.loads(path.read_text()) for path in sorted(folder.glob("made/*.json"))]
    if not made:
        raise SystemExit(f"{folder}: no training was made there; make some first")
    rows = [entry for one in made for entry in one["rows"]]
    curves = {one["what"]: np.array(one["curve"]) for one in made}
    bases = [one for one in made if not one["learned"]]
    for base, (target, factor) in itertools.product(bases, TARGETS.items()):
        name, level = base["what"], factor * base["rows"][0]["value"]
        width = last_tenth(len(curves[name]))
        steps = {what: float(first_reach(curve, level, width)) for what, curve in curves.items()}
        own, whole = f"{name}: steps to {target}", steps.pop(name)
        rows.append(row(own, whole, "steps"))
        rows += [
            row(f"{own}, taken by {other}", taken, "steps", own, taken / whole)
            for other, taken in steps.items()
            if math.isfinite(taken)
        ]
    report("paper_length", rows, made[0]["machine"], made[0]["versions"])


def training(text: str) -> Training:
    """Of `LABEL[=RATE]@EPOCHS`."""
    named, _, epochs = text.rpartition("@")
    label, has_rate, rate = named.partition("=")
    try:
        found = Training(label, int(epochs), float(rate) if has_rate else None)
    except ValueError:
        found = None
    known = (*RULES, *UNDER_COSINE, *BASELINES)
    if (
        found is None or label not in known or found.epochs < 1
        or (found.rate is not None and (label not in BASELINES or not 0 < found.rate < math.inf))
    ):  # fmt: skip
        raise argparse.ArgumentTypeError(
            f"{text!r} is not LABEL@EPOCHS, nor LABEL=RATE@EPOCHS of a baseline, with a label of "
            + "; ".join(known)
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=("make", "report"))
    parser.add_argument("trainings", nargs="*", type=training, metavar="LABEL[=RATE]@EPOCHS")
    chosen = parser.parse_args()
    if chosen.what == "report":
        gather(chosen.folder)
        return
    study = study_in(chosen.folder)
    (chosen.folder / "made").mkdir(parents=True, exist_ok=True)
    for wanted in chosen.trainings:
        make(study, wanted)
        about = json.dumps(told(study.records, wanted))
        (chosen.folder / "made" / f"{wanted.file}.json").write_text(about + "\n")
        say(f"{wanted.what}: made")


if __name__ == "__main__":
    main()
