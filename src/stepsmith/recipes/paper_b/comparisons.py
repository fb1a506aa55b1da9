"""SL2O on convolutional networks: comparisons, transfers, and the choices behind the rule.

Source: Chen et al., "Scalable Learning to Optimize", ECCV 2022, and its supplement.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Mapping
from functools import partial
from typing import Any

from stepsmith.evaluate import Records
from stepsmith.evaluate.epochs import Contest
from stepsmith.hub import TrainedRule
from stepsmith.recipes.paper_b.clock import clock, speed, stability, step_seconds
from stepsmith.recipes.paper_b.deep import (
    FRESH,
    FULL_SPACE,
    SUBSPACE,
    Place,
    contest,
    depth,
    depth_name,
    learn,
    place,
)
from stepsmith.recipes.study import Recipe, Study
from stepsmith.rules import Rule, l2o_dm
from stepsmith.tasks.image_files import DataError

_log = logging.getLogger("stepsmith")

SL2O = "SL2O"
AGAIN = ("momentum", "adamw, cosine")
"""Baselines of the whole space that are run from fresh starts too."""
ARCHITECTURES = {
    "full": ("resnet18", "vgg16", "mobilenetv2"), "small": ("resnet8", "resnet20", "vgg-small"),
    "quick": ("resnet8", "vgg-small"),
}  # fmt: skip
UNROLLS = (5, 10, 15, 20)
EPISODES = (200, 500, 1000, 2000)
SCALES_OF_DM = (0.01, 0.1, 1.0)
"""Factors on L2O-DM's outputs: the published one and larger ones; the best by validation counts."""


def network(study: Study, name: str) -> None:
    """One network: SL2O, the baselines of its subspace, and those of the whole space; all from the
    saved start, then from fresh starts and bases that neither rule nor rates have seen."""
    here = place(study, name)
    trained = learn(study, f"sl2o-{name}", here.sub)
    held = contest(study, name, here.task)
    held.rule(SL2O, here.sub, trained, before=here.seconds)
    rates = {
        label: held.baseline(label, here.sub, entry, before=here.seconds)
        for label, entry in SUBSPACE.items()
    }
    rates |= {label: held.baseline(label, here.full, entry) for label, entry in FULL_SPACE.items()}
    held.finish()
    fresh = [place(study, name, seed=FRESH + seed) for seed in range(depth(study).seeds)]
    later = contest(study, name, here.task, "corrected")
    later.rule(SL2O, [other.sub for other in fresh], trained)
    for label, entry in SUBSPACE.items():
        later.baseline(label, [other.sub for other in fresh], entry, rates[label])
    for label in AGAIN:
        later.baseline(label, [other.full for other in fresh], FULL_SPACE[label], rates[label])
    study.findings[name] = told(held, here) | {
        "fresh_starts": [speed(study.records, name, "corrected", SL2O, SUBSPACE)],
        "tuned": {
            label: {"rate": found.rate, "at_edge": found.at_edge}
            for label, found in held.tuned.items()
        },
    }


def told(held: Contest, here: Place) -> dict[str, Any]:
    """What a contest from the saved start says of speed, stability and cost."""
    about = (held.records, held.name, held.key.protocol)
    return {
        "parameters": here.basis.layout.total, "explained": sum(here.basis.explained),
        "basis_seconds_when_made": here.seconds,
        "against_subspace": speed(*about, SL2O, SUBSPACE),
        "against_full_space": speed(*about, SL2O, FULL_SPACE),
        "stability": stability(*about),
        "clock": clock(
            *about, basis_seconds=basis_seconds(held, here), subspace={SL2O, *SUBSPACE}
        ),
    }  # fmt: skip


def basis_seconds(held: Contest, here: Place) -> float:
    """Seconds of making a basis at the pace at which the contest's steps were timed, so that both
    were measured in the same moments; as it was made, where no steps were timed."""
    pace = step_seconds(held.records, held.name, "sgd")
    if pace is None:
        return here.seconds
    return pace * here.basis.info["training_steps"] + here.basis.info["seconds"]


def against_subspace(
    study: Study, name: str, here: Place, rules: Mapping[str, TrainedRule]
) -> Contest:
    """Rules beside the tuned baselines of the subspace, from the saved start.

    Args:
        study: gets the records.
        name: of the task in the records.
        here: the network.
        rules: to test.
    """
    held = contest(study, name, here.task)
    for label, trained in rules.items():
        held.rule(label, here.sub, trained, before=here.seconds, meta_task=label_task(label))
    for label, entry in SUBSPACE.items():
        held.baseline(label, here.sub, entry, before=here.seconds)
    held.finish()
    return held


def label_task(label: str) -> str:
    """The contest a rule labelled `SL2O (CONTEST)` was meta-trained for; empty for other labels."""
    found = re.fullmatch(rf"{SL2O} \((.+)\)", label)
    return found[1] if found else ""


def data_transfer(study: Study) -> None:
    """Table 3, left: rules of other data sets; sets that are not at hand are named as left out."""
    net = "resnet18" if study.scale.name == "full" else "resnet8"
    amounts = depth(study)
    sets = [amounts.data, *amounts.others, *amounts.sources]
    places: dict[str, Place] = {}
    for data in sets:
        try:
            places[data] = place(study, net, data)
        except DataError as error:
            _log.warning("b6-data-transfer: without %s: %s", data, error)
    study.findings["left_out"] = [data for data in sets if data not in places]
    named = {f"{net}-{_short(data)}": where for data, where in places.items()}
    _matrix(study, named, {f"{net}-{_short(data)}" for data in amounts.sources})


def _short(data: str) -> str:
    """A set's name without what is done to its batches."""
    parts = data.split("@")
    return "@".join([parts[0], *(part for part in parts[1:] if part.startswith("classes"))])


def architecture_transfer(study: Study) -> None:
    """Table 3, right: rules of other networks."""
    places = {name: place(study, name) for name in ARCHITECTURES[depth_name(study)]}
    _matrix(study, places)


def _matrix(study: Study, places: Mapping[str, Place], untested: Container[str] = ()) -> None:
    """Each place's rule on every place but those `untested`."""
    rules = {
        f"{SL2O} ({name})": learn(study, f"sl2o-{name}", where.sub)
        for name, where in places.items()
    }
    for name, where in places.items():
        if name not in untested:
            against_subspace(study, name, where, rules)
    study.findings["accuracy"] = accuracies(study.records)


def accuracies(records: Records) -> list[dict[str, Any]]:
    """Test accuracy after the last epoch, in %, of all optimizers on all tasks: mean and range."""
    return [
        {
            "task": block.key.task, "protocol": block.key.protocol,
            "optimizer": block.key.optimizer, "mean": 100 * float(block.values[:, -1].mean()),
            "low": 100 * float(block.values[:, -1].min()),
            "high": 100 * float(block.values[:, -1].max()),
        }
        for block in records.select("test_accuracy", purpose="test")
    ]  # fmt: skip


def versus_dm(study: Study) -> None:
    """Section 2.7: one LSTM on raw gradients, as published and with the best of some scales."""
    net = depth(study).network
    here = place(study, net)
    found = {
        scale: learn(study, f"l2o-dm-{net}-{scale:g}", here.sub, _dm(scale))
        for scale in SCALES_OF_DM
    }
    best = min(found, key=lambda scale: found[scale].manifest["validation"]["score"])
    rules = {
        SL2O: learn(study, f"sl2o-{net}", here.sub), "L2O-DM as published": found[SCALES_OF_DM[0]],
    }  # fmt: skip
    if best != SCALES_OF_DM[0]:
        rules[f"L2O-DM, outputs x {best:g}"] = found[best]
    _choices(study, here, rules)
    study.findings["validations"] = {
        f"{scale:g}": trained.manifest["validation"]["score"] for scale, trained in found.items()
    }


def _dm(scale: float) -> Rule:
    return l2o_dm(hidden=20, layers=1, inputs="raw", step_scale=scale, faithful=True)


def unrolls(study: Study) -> None:
    """Section 2.8, figure 6 left: windows of 5 to 20 steps at equal budgets."""
    amounts = depth(study)
    here = place(study, amounts.network)
    known = UNROLLS if study.scale.name != "quick" else (2, 3)
    episode = 60 * (amounts.episode // 60) or amounts.episode  # 5 to 20 all divide it
    rules = {
        f"{SL2O}, windows of {steps}": learn(
            study, f"sl2o-{amounts.network}-T{steps}", here.sub, unroll=steps, episode=episode
        )
        for steps in known
    }
    _choices(study, here, rules)


def episodes(study: Study) -> None:
    """Section 2.8, figure 6 right and table 4: episodes of 200 to 2,000 steps, equal budgets."""
    amounts = depth(study)
    here = place(study, amounts.network)
    known = EPISODES if study.scale.name != "quick" else (3, 6)
    rules = {
        f"{SL2O}, episodes of {steps:,}": learn(
            study, f"sl2o-{amounts.network}-N{steps}", here.sub, episode=steps
        )
        for steps in known
    }
    _choices(study, here, rules)


def _choices(study: Study, here: Place, rules: Mapping[str, TrainedRule]) -> None:
    """Rules for one subspace beside its baselines, and all their accuracies."""
    against_subspace(study, depth(study).network, here, rules)
    study.findings["accuracy"] = accuracies(study.records)


def _network(name: str, what: str, net: str) -> Recipe:
    return Recipe(name, what, partial(network, name=net))


RECIPES = (
    _network("b1-resnet8", "SL2O on ResNet-8 (supplement, figure 1)", "resnet8"),
    _network("b2-resnet20", "SL2O on ResNet-20", "resnet20"),
    _network("b3-resnet18", "SL2O on ResNet-18", "resnet18"),
    _network("b4-vgg16", "SL2O on VGG-16", "vgg16"),
    _network("b5-mobilenetv2", "SL2O on MobileNetV2", "mobilenetv2"),
    Recipe("b6-data-transfer", "SL2O's rules on other data sets (table 3)", data_transfer),
    Recipe(
        "b7-architecture-transfer", "SL2O's rules on other networks (table 3)",
        architecture_transfer,
    ),
    Recipe("b8-versus-l2o-dm", "SL2O and L2O-DM in one subspace (section 2.7)", versus_dm),
    Recipe("b9-unroll-length", "windows of meta-training (section 2.8)", unrolls),
    Recipe("b10-episode-length", "episodes of meta-training (section 2.8, table 4)", episodes),
)  # fmt: skip
