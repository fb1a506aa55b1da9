"""SL2O at the paper's length: ResNet-20 on CIFAR-10, 100 epochs of batch 128, on one GPU.

    python -m benchmarks.paper_length FOLDER make PART ...
    python -m benchmarks.paper_length FOLDER report

What recipe `b2-resnet20` does at its full scale, reduced to what the paper did: one seed, from the
saved start, every baseline at one rate (table 1's; AdamW's own default), nothing tuned. A part is
kept in FOLDER as recipes keep theirs, so that parts can be made side by side by several processes,
and again at no cost. `report` writes FOLDER/results from those that are there, parts not made being
left out, and says which. Data: the smaller JPEG copy of CIFAR-10, a folder `cifar10_jpeg` below
STEPSMITH_DATA_DIR.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import one_of
from stepsmith.evaluate.epochs import Contest
from stepsmith.recipes.paper_b.clock import speed
from stepsmith.recipes.paper_b.comparisons import OWN, SL2O, tell
from stepsmith.recipes.paper_b.deep import (
    FULL_SPACE,
    HALVED,
    SUBSPACE,
    Place,
    contest,
    learn,
    learn_own,
    place,
)
from stepsmith.recipes.study import SCALES, Study, core_hours
from stepsmith.report import write_results

NETWORK = "resnet20"
DATA = "cifar10_jpeg@crop@flip@standardised"
RULES = (SL2O, OWN)
BASELINES = {**FULL_SPACE, **SUBSPACE, **HALVED}
PARTS = (*RULES, *BASELINES)


def study_in(folder: Path) -> Study:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Study("b2-resnet20", SCALES["full"], folder / "cache", say=print, device=device)


def held(study: Study, here: Place) -> Contest:
    return replace(contest(study, NETWORK, here.task), seeds=range(1))


def make(study: Study, contested: Contest, here: Place, part: str) -> None:
    """One optimizer's training, and what it needs first."""
    if part == SL2O:
        contested.rule(part, here.sub, learn(study, f"sl2o-{NETWORK}", here.sub))
    elif part == OWN:
        contested.rule(part, here.sub, learn_own(study, NETWORK, here))
    else:
        entry = BASELINES[part]
        where = here.full if part in FULL_SPACE else here.sub
        contested.baseline(part, where, entry, entry.centre)


def gather(folder: Path) -> None:
    made = [part for part in PARTS if (folder / "made" / part).exists()]
    study = study_in(folder)
    here = place(study, NETWORK, DATA)
    contested = held(study, here)
    for part in made:
        make(study, contested, here, part)
    contested.finish()
    rules = [part for part in RULES if part in made]
    findings: dict[str, Any] = {
        "explained": sum(here.basis.explained),
        "left_out": [part for part in PARTS if part not in made],
    }
    for name, against in (("against_subspace", SUBSPACE), ("against_full_space", FULL_SPACE)):
        rivals = [part for part in against if part in made]
        if rivals:
            about = (study.records, NETWORK, contested.key.protocol)
            findings[name] = [speed(*about, label, rivals) for label in rules]
    tell(study, contested, here, rules)
    config = {
        "recipe": "b2-resnet20", "what": "SL2O on ResNet-20, one seed, no rates tuned",
        "scale": "full", "source": "auto", "device": study.device,
        "core_hours": core_hours(study.records), "findings": {**study.findings, **findings},
    }  # fmt: skip
    write_results(
        folder / "results", study.records, recipe="b2-resnet20", scale="full",
        command="python -m benchmarks.paper_length", config=config, overwrite=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=("make", "report"))
    parser.add_argument("parts", nargs="*", type=one_of(PARTS), metavar="PART")
    chosen = parser.parse_args()
    if chosen.what == "report":
        gather(chosen.folder)
        return
    study = study_in(chosen.folder)
    here = place(study, NETWORK, DATA)
    contested = held(study, here)
    for part in chosen.parts:
        make(study, contested, here, part)
        (chosen.folder / "made").mkdir(exist_ok=True)
        (chosen.folder / "made" / part).touch()
        print(f"{part}: made at {time.strftime('%X')}", flush=True)


if __name__ == "__main__":
    main()
