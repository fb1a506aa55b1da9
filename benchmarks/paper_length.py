"""SL2O on ResNet-20 and CIFAR-10 at the paper's batch and basis, as far as minutes of a GPU go.

    python -m benchmarks.paper_length FOLDER make LABEL@EPOCHS ...
    python -m benchmarks.paper_length FOLDER report

What recipe `b2-resnet20` does at its full scale, reduced to what the paper did: one seed, from the
saved start, every baseline at one rate (table 1's; AdamW's own default), nothing tuned; and to half
of the paper's meta-training. A rule without a schedule makes the same first steps whatever the
length, so its shorter training can be held against the first epochs of any other.

Trainings are kept in FOLDER as recipes keep theirs, so that several processes can share them out,
and made again at no cost. `report` writes FOLDER/results from those that are there. Data: the
smaller JPEG copy of CIFAR-10, a folder `cifar10_jpeg` below STEPSMITH_DATA_DIR.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepsmith.evaluate import Records
from stepsmith.evaluate.epochs import Contest
from stepsmith.evaluate.statistics import final_accuracies, first_reach, penalised, score
from stepsmith.recipes.paper_b.comparisons import OWN, SL2O, tell
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
from stepsmith.recipes.study import SCALES, Study, core_hours
from stepsmith.report import write_results
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
    name = f"{NETWORK}, {epochs} epochs"
    return replace(contest(study, name, task_of(study), epochs=epochs), seeds=range(1))


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


def against_each(records: Records) -> list[dict[str, Any]]:
    """For every training of a rule and of a baseline, whatever their lengths: the steps in which
    each comes down to the baseline's final loss, and how much more often the rule is right."""
    blocks = records.select("train_loss", purpose="test")
    rows = []
    for rule in (block for block in blocks if block.key.kind == "learned"):
        for other in (block for block in blocks if block.key.kind == "baseline"):
            rule_ST, other_ST = penalised(rule.values), penalised(other.values)
            target = float(score(other_ST, "final").mean())
            steps, base = (float(first_reach(part.mean(0), target)) for part in (rule_ST, other_ST))
            right, base_right = (final_accuracies(records, block) for block in (rule, other))
            assert right is not None
            assert base_right is not None
            met = np.isfinite(steps)
            rows.append(
                {
                    "rule": rule.key.optimizer, "task": rule.key.task,
                    "against": other.key.optimizer, "against_task": other.key.task,
                    "target": target, "rule_final_loss": float(score(rule_ST, "final").mean()),
                    "steps": steps if met else None, "baseline_steps": base,
                    "ratio": steps / base if met else None,
                    "points_of_accuracy": 100 * float((right - base_right).mean()),
                }
            )  # fmt: skip
    return rows


def gather(folder: Path) -> None:
    study = study_in(folder)
    here = place(study, NETWORK, DATA)
    made = [path.name.rpartition("@") for path in sorted((folder / "made").iterdir())]
    for epochs in sorted({int(epochs) for _, _, epochs in made}):
        labels = [label for label, _, length in made if int(length) == epochs]
        contested = held(study, epochs)
        for label in labels:
            make(study, contested, label)
        contested.finish()
        tell(study, contested, here, [label for label in labels if label in RULES])
    study.findings["against_each"] = against_each(study.records)
    study.findings["explained"] = sum(here.basis.explained)
    config = {
        "recipe": "b2-resnet20", "what": "SL2O on ResNet-20, one seed, no rates tuned",
        "scale": "full", "source": "auto", "device": study.device,
        "core_hours": core_hours(study.records), "findings": study.findings,
    }  # fmt: skip
    write_results(
        folder / "results", study.records, recipe="b2-resnet20", scale="full",
        command="python -m benchmarks.paper_length", config=config, overwrite=True,
    )  # fmt: skip


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
        (chosen.folder / "made" / f"{label}@{epochs}").touch()
        print(f"{label}, {epochs} epochs: made at {time.strftime('%X')}", flush=True)


if __name__ == "__main__":
    main()
