"""SL2O on ResNet-20 and CIFAR-10 at the paper's batch and basis, as far as minutes of a GPU go.

    python -m benchmarks.paper_length FOLDER make LABEL@EPOCHS ...
    python -m benchmarks.paper_length FOLDER report

What recipe `b2-resnet20` does at its full scale, reduced to what the paper did: one seed, from the
saved start, every baseline at one rate (table 1's; AdamW's own default), nothing tuned; and to half
of the paper's meta-training. A rule without a schedule makes the same first steps whatever the
length, so its shorter training can be held against the first epochs of any other.

Trainings are kept in FOLDER as recipes keep theirs, so that several processes can share them out,
and made again at no cost; `report` gathers those that are there. On an H100 a step takes 3.6 ms
where one process trains alone, and took some 8 ms each where three shared it: basis,
meta-training and 30 epochs of SL2O should take 200 seconds alone. Data: the smaller JPEG copy of
CIFAR-10, a folder `cifar10_jpeg` below STEPSMITH_DATA_DIR.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import report, row
from stepsmith.evaluate import Records
from stepsmith.evaluate.epochs import Contest
from stepsmith.evaluate.statistics import (
    final_accuracies,
    first_reach,
    last_tenth,
    penalised,
    score,
)
from stepsmith.machine import machine, versions
from stepsmith.recipes.paper_b.comparisons import OWN, SL2O
from stepsmith.recipes.paper_b.deep import (
    FULL_SPACE,
    HALVED,
    SAVED,
    SUBSPACE,
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
RULES = (SL2O, OWN)
BASELINES = {**FULL_SPACE, **SUBSPACE, **HALVED}
SHARE = 2
"""The paper's episodes of meta-training, over those made here."""


def study_in(folder: Path) -> Study:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Study("b2-resnet20", SCALES["full"], folder / "cache", say=print, device=device)


def task_of(study: Study) -> Task:
    return study.task(f"{NETWORK}-{DATA}", batch_size=depth(study).batch)


def held(study: Study, epochs: int) -> Contest:
    named = contest(study, name_of(epochs), task_of(study), epochs=epochs)
    return replace(named, seeds=range(1))


def name_of(epochs: int) -> str:
    return f"{NETWORK}, {epochs} epochs"


def make(study: Study, contested: Contest, label: str) -> None:
    """One optimizer's training, and what it needs first."""
    if label in FULL_SPACE:  # the saved start; the basis made from there is not waited for
        task = task_of(study)
        start = task.init(torch.Generator().manual_seed(SAVED))
        entry = FULL_SPACE[label]
        contested.baseline(label, StartedTask(task, *start), entry, entry.centre)
        return
    here = place(study, NETWORK, DATA)
    if label == SL2O:
        amounts = depth(study)
        budget = amounts.episodes * amounts.episode // SHARE
        trained = learn(study, f"sl2o-{NETWORK}", here.sub, budget=budget, validations=2)
        contested.rule(label, here.sub, trained)
    elif label == OWN:
        contested.rule(label, here.sub, learn_own(study, NETWORK, here))
    else:
        entry = BASELINES[label]
        contested.baseline(label, here.sub, entry, entry.centre)


def told(records: Records, label: str, epochs: int) -> dict[str, Any]:
    """Where a training ends: its rows, and the curve they are of."""
    about = {"purpose": "test", "task": name_of(epochs), "optimizer": label}
    (block,) = records.select("train_loss", **about)
    right = final_accuracies(records, block)
    assert right is not None
    what = f"{NETWORK}, {label}, {epochs} epochs"
    losses_ST = penalised(block.values)
    loss = float(score(losses_ST, "final").mean())
    rows = [
        row(f"{what}: training loss, last tenth", loss, "nats"),
        row(f"{what}: test accuracy", 100 * float(right.mean()), "%"),
    ]
    curve = losses_ST.mean(0).astype(float).tolist()
    return {"machine": machine(), "versions": versions(), "rows": rows, "curve": curve}


def gather(folder: Path) -> None:
    """All rows, and for each training of a rule in what share of a baseline's steps it comes down
    to the loss which that ends with, whatever their lengths."""
    made = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("made/*.json"))}
    rows = [entry for one in made.values() for entry in one["rows"]]
    for name, rule in made.items():
        for other, base in made.items():
            if name.partition("@")[0] in RULES and other.partition("@")[0] in BASELINES:
                target = base["rows"][0]["value"]
                width = last_tenth(len(base["curve"]))
                steps, whole = (
                    float(first_reach(np.array(one["curve"]), target, width))
                    for one in (rule, base)
                )
                if np.isfinite(steps):
                    against = base["rows"][0]["what"]
                    what = f"{rule['rows'][0]['what']}: steps to the final loss of {other}"
                    rows.append(row(what, steps, "steps", against, steps / whole))
    first = next(iter(made.values()))
    report("paper_length", rows, first["machine"], first["versions"])


def training(text: str) -> tuple[str, int]:
    """`LABEL@EPOCHS`."""
    label, _, epochs = text.rpartition("@")
    if label not in (*RULES, *BASELINES) or not epochs.isdecimal() or int(epochs) < 1:
        known = ", ".join((*RULES, *BASELINES))
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL@EPOCHS, with a label of {known}")
    return label, int(epochs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=("make", "report"))
    parser.add_argument("trainings", nargs="*", type=training, metavar="LABEL@EPOCHS")
    chosen = parser.parse_args()
    if chosen.what == "report":
        gather(chosen.folder)
        return
    study = study_in(chosen.folder)
    (chosen.folder / "made").mkdir(parents=True, exist_ok=True)
    for label, epochs in chosen.trainings:
        make(study, held(study, epochs), label)
        about = told(study.records, label, epochs)
        (chosen.folder / "made" / f"{label}@{epochs}.json").write_text(json.dumps(about) + "\n")
        print(f"{label}, {epochs} epochs: made at {time.strftime('%X')}", flush=True)


if __name__ == "__main__":
    main()
