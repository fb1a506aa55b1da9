"""SL2O on convolutional networks: comparisons and transfers.

Source: Chen et al., "Scalable Learning to Optimize", ECCV 2022, and its supplement.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from stepsmith.evaluate import Records
from stepsmith.evaluate.epochs import CONSTANT, Contest
from stepsmith.evaluate.schedules import Schedule, Scheduled
from stepsmith.evaluate.statistics import final_accuracies, stability
from stepsmith.hub import TrainedRule
from stepsmith.recipes.paper_b.clock import (
    clock,
    curves,
    gradient_seconds,
    lowest,
    speed,
    step_seconds,
)
from stepsmith.recipes.paper_b.deep import (
    COSINE,
    FULL_SPACE,
    HALVED,
    SUBSPACE,
    TO_HALF,
    Place,
    contest,
    deep_recipe,
    depth,
    fresh_places,
    learn,
    learn_own,
    place,
)
from stepsmith.recipes.study import Recipe, Study
from stepsmith.tasks.image_files import DataError, DataNotFound
from stepsmith.tasks.variants import load_variant

_log = logging.getLogger("stepsmith")

SL2O = "SL2O"
OWN = "relative units in subspace"
"""This library's own rule, see `learn_own`."""
AGAIN = ("momentum", "adamw, cosine")
"""Baselines of the whole space that are run from fresh starts too, beside the best of all."""
ARCHITECTURES = {
    "full": ("resnet18", "vgg16", "mobilenetv2"), "small": ("resnet8", "resnet20", "vgg-small"),
    "quick": ("resnet8", "vgg-small"),
}  # fmt: skip


def network(study: Study, name: str) -> None:
    """One network: SL2O, with episodes as long as the paper's and with short ones, and a rule of
    this library's own, the baselines of its subspace, and those of the whole space; all from the
    saved start, then from fresh starts and bases that neither rules nor rates have seen. What lies
    in the subspace once more over fewer epochs, rates tuned for these: a schedule over all of a
    long training hides how early it could have ended. The rules run by themselves, and under a
    schedule as the baselines do."""
    here, fresh, amounts = place(study, name), fresh_places(study, name), depth(study)
    rules = {
        SL2O: learn(study, f"sl2o-{name}", here.sub),
        of_episodes(amounts.descent): learn_episodes(study, name, here, amounts.descent),
        OWN: learn_own(study, name, here),
    }
    published, corrected = contests(
        study, name, here, fresh, rules, subspace={**SUBSPACE, **HALVED}, full_space=FULL_SPACE,
        schedules={"cosine to half": TO_HALF},
    )  # fmt: skip
    study.findings[name] = {
        "parameters": here.basis.layout.total, "explained": sum(here.basis.explained),
        "basis_seconds_when_made": here.seconds,
        "tuned": [
            {"optimizer": label, "rate": found.rate, "at_edge": found.at_edge}
            for label, found in published.tuned.items()
        ],
    }  # fmt: skip
    for protocol in (published.key.protocol, corrected.key.protocol):
        about = (study.records, name, protocol)
        for finding, against in (
            ("against_subspace", SUBSPACE),
            ("against_full_space", FULL_SPACE),
        ):
            study.findings[name].setdefault(finding, []).extend(
                speed(*about, label, against) for label in learned(*about)
            )
    add_clock(study, published, here)
    sooner = f"{name}, {amounts.shorter} of {amounts.epochs} epochs"
    against_subspace(
        study, sooner, here, fresh, rules, epochs=amounts.shorter, schedules={"cosine": COSINE}
    )


class _PacedRule(NamedTuple):
    """A rule as it runs in a subspace, and the place it was meta-trained in."""

    name: str
    trained: TrainedRule
    schedule: Schedule
    meta_task: str
    home: Place


def contests(
    study: Study,
    name: str,
    here: Place,
    fresh: Sequence[Place],
    within: Mapping[str, TrainedRule],
    whole: Mapping[str, TrainedRule] | None = None,
    *,
    homes: Mapping[str, Place] | None = None,
    subspace: Mapping[str, Scheduled] = SUBSPACE,
    full_space: Mapping[str, Scheduled] | None = None,
    epochs: int | None = None,
    schedules: Mapping[str, Schedule] | None = None,
) -> tuple[Contest, Contest]:
    """Rules beside tuned baselines from the saved start, then from fresh ones at the same rates.

    Args:
        study: gets the records.
        name: of the task in the records.
        here: the network from its saved start.
        fresh: from starts that no rule has seen, one a seed.
        within, whole: rules to test in the subspace, and on all parameters.
        homes: where rules of subspaces were meta-trained, those that were not `here`.
        subspace: baselines of the subspace.
        full_space: baselines of the whole space; of these `AGAIN` and the best are run from fresh
            starts too.
        epochs: of every training, by default the scale's.
        schedules: under which the rules of the subspace run once more, by what is added to their
            names.

    Returns:
        Both contests, as published and corrected.
    """
    whole, full_space, homes = whole or {}, full_space or {}, homes or {}
    subs, wholes = [other.sub for other in fresh], [other.full for other in fresh]
    published, corrected = (
        contest(study, name, here.task, protocol, epochs=epochs)
        for protocol in ("as-published", "corrected")
    )
    paces = {"": CONSTANT} | {f", {added}": pace for added, pace in (schedules or {}).items()}
    entrants = [
        _PacedRule(f"{label}{added}", trained, schedule, label_task(label), homes.get(label, here))
        for added, schedule in paces.items()
        for label, trained in within.items()
    ]
    for rule in entrants:
        published.rule(
            rule.name, here.sub, rule.trained, schedule=rule.schedule, meta_task=rule.meta_task,
            meta_subspace=0.0 if rule.home is here else rule.home.seconds,
        )  # fmt: skip
    for label, trained in whole.items():
        published.rule(label, here.full, trained)
    rates = {
        label: published.baseline(label, task, entry)
        for task, entries in ((here.sub, subspace), (here.full, full_space))
        for label, entry in entries.items()
    }
    published.time_steps()
    published.add_subspace_seconds(
        basis_seconds(published, here), [*(rule.name for rule in entrants), *subspace]
    )
    for rule in entrants:
        corrected.rule(
            rule.name, subs, rule.trained, schedule=rule.schedule, meta_task=rule.meta_task,
            meta_subspace=rule.home.seconds,
        )  # fmt: skip
    for label, trained in whole.items():
        corrected.rule(label, wholes, trained)
    again = [*subspace, *(label for label in AGAIN if label in full_space)]
    if full_space:
        best, _ = lowest(curves(published.records, name, published.key.protocol), full_space)
        again.append(best)
    for label in dict.fromkeys(again):
        tasks = subs if label in subspace else wholes
        entry = subspace.get(label) or full_space[label]
        corrected.baseline(label, tasks, entry, rates[label], tuned_for="final")
    return published, corrected


def within_subspace(records: Records, task: str) -> list[str]:
    """Optimizers of a contest that had to have a subspace first."""
    blocks = records.select("subspace_seconds", purpose="cost", task=task)
    return [block.key.optimizer for block in blocks]


def learned(records: Records, task: str, protocol: str) -> list[str]:
    """Of these the rules that ran under a protocol."""
    found = curves(records, task, protocol)
    names = within_subspace(records, task)
    return [name for name in names if name in found and found[name].key.kind == "learned"]


def add_clock(study: Study, published: Contest, here: Place) -> None:
    """Findings of stability and cost under both protocols.

    Args:
        study: gets them.
        published: the contest from the saved start; that from fresh ones has its name.
        here: where it was held.
    """
    seconds = basis_seconds(published, here)
    subspace = within_subspace(study.records, published.name)
    for protocol in dict.fromkeys(block.key.protocol for block in study.records.select(
            "train_loss", purpose="test", task=published.name)):  # fmt: skip
        about = (study.records, published.name, protocol)
        study.findings.setdefault("stability", []).extend(stability(*about))
        study.findings.setdefault("clock", []).extend(
            clock(*about, basis_seconds=seconds, subspace=subspace)
        )


def basis_seconds(published: Contest, here: Place) -> float:
    """Seconds of making a basis at the pace at which the contest's steps were timed, so that both
    were measured in the same moments: SGD's, or of the cheapest gradient where SGD was not timed;
    as it was made, where no steps were."""
    pace = step_seconds(published.records, published.name, "sgd")
    if pace is None:
        pace = gradient_seconds(published.records, published.name)
    if pace is None:
        return here.seconds
    return pace * here.basis.info["training_steps"] + here.basis.info["seconds"]


def against_subspace(
    study: Study,
    name: str,
    here: Place,
    fresh: Sequence[Place],
    rules: Mapping[str, TrainedRule],
    homes: Mapping[str, Place] | None = None,
    epochs: int | None = None,
    schedules: Mapping[str, Schedule] | None = None,
) -> None:
    """Rules beside the tuned baselines of the subspace, from the saved start and from fresh ones.

    Args:
        study: gets the records, and findings of speed and cost.
        name: of the task in the records.
        here: the network from its saved start.
        fresh: from starts that no rule has seen, one a seed.
        rules: to test.
        homes, epochs, schedules: as in `contests`.
    """
    published, corrected = contests(
        study, name, here, fresh, rules, homes=homes, epochs=epochs, schedules=schedules
    )
    for protocol in (published.key.protocol, corrected.key.protocol):
        about = (study.records, name, protocol)
        study.findings.setdefault("against_subspace", []).extend(
            speed(*about, label, SUBSPACE) for label in learned(*about)
        )
    add_clock(study, published, here)
    study.findings["accuracy"] = accuracies(study.records)


def label_task(label: str) -> str:
    """The contest a rule labelled `SL2O (CONTEST)` was meta-trained for; empty for other labels."""
    found = re.fullmatch(rf"{SL2O} \((.+)\)", label)
    return found[1] if found else ""


def data_transfer(study: Study) -> None:
    """Table 3, left: rules of other data sets. Sets that are not at hand are named as left out, but
    not the scale's own, from which they are transfers."""
    net = "resnet18" if study.scale.name == "full" else "resnet8"
    amounts = depth(study)
    rules, homes, tested = {}, {}, {}
    for data in _at_hand(study, [amounts.data, *amounts.others, *amounts.sources]):
        here = place(study, net, data)
        name = f"{net}-{_short(data)}"
        homes[f"{SL2O} ({name})"] = here
        rules[f"{SL2O} ({name})"] = learn(study, f"sl2o-{name}", here.sub)
        if data not in amounts.sources:
            tested[name] = (here, fresh_places(study, net, data))
    for name, (here, fresh) in tested.items():
        against_subspace(study, name, here, fresh, rules, homes)


def _at_hand(study: Study, sets: Sequence[str]) -> list[str]:
    """Those that are here: looked at before anything is trained, since one that is found to be too
    small after the bases of the others would lose hours."""
    found, left_out, bases = [], [], {}
    for data in sets:
        base = data.partition("@")[0]
        try:
            images, _ = load_variant(data, **study.where)
        except DataNotFound as error:
            if data == sets[0]:
                raise
            _log.warning("%s: without %s: %s", study.recipe, data, error)
            left_out.append(data)
            continue
        other = bases.setdefault(images.origin, base)
        if other != base and images.origin != "sample":
            raise DataError(
                f"{study.recipe}: {other} and {base} would both be {images.origin}, no transfer at "
                "all; put each set into a folder of its name"
            )
        found.append(data)
    study.findings["left_out"] = left_out
    return found


def _short(data: str) -> str:
    """A set's name without what is done to its batches."""
    parts = data.split("@")
    return "@".join([parts[0], *(part for part in parts[1:] if part.startswith("classes"))])


def architecture_transfer(study: Study) -> None:
    """Table 3, right: rules of other networks."""
    places = {name: place(study, name) for name in ARCHITECTURES[study.scale.name]}
    homes = {f"{SL2O} ({name})": here for name, here in places.items()}
    rules = {
        f"{SL2O} ({name})": learn(study, f"sl2o-{name}", here.sub) for name, here in places.items()
    }
    for name, here in places.items():
        against_subspace(study, name, here, fresh_places(study, name), rules, homes)


def accuracies(records: Records) -> list[dict[str, Any]]:
    """Test accuracy after the last epoch, in %, of all optimizers on all tasks: mean and range."""
    rows = []
    for block in records.select("train_loss", purpose="test"):
        end_S = final_accuracies(records, block)
        if end_S is not None:
            mean, low, high = (100 * float(x) for x in (end_S.mean(), end_S.min(), end_S.max()))
            rows.append(
                {
                    "task": block.key.task, "protocol": block.key.protocol,
                    "optimizer": block.key.optimizer, "mean": mean, "low": low, "high": high,
                }
            )  # fmt: skip
    return rows


def of_episodes(steps: int) -> str:
    """What SL2O is called where its episodes are not as long as the paper's."""
    return f"{SL2O}, episodes of {steps:,}"


def learn_episodes(study: Study, name: str, here: Place, steps: int) -> TrainedRule:
    """SL2O's rule of episodes of so many steps, at the paper's budget."""
    return learn(study, f"sl2o-{name}-N{steps}", here.sub, episode=steps)


def _network(name: str, what: str, net: str) -> Recipe:
    return deep_recipe(name, what, partial(network, name=net))


RECIPES = (
    _network("b1-resnet8", "SL2O on ResNet-8 (supplement, figure 1)", "resnet8"),
    _network("b2-resnet20", "SL2O on ResNet-20", "resnet20"),
    _network("b3-resnet18", "SL2O on ResNet-18", "resnet18"),
    _network("b4-vgg16", "SL2O on VGG-16", "vgg16"),
    _network("b5-mobilenetv2", "SL2O on MobileNetV2", "mobilenetv2"),
    deep_recipe("b6-data-transfer", "SL2O's rules on other data sets (table 3)", data_transfer),
    deep_recipe(
        "b7-architecture-transfer", "SL2O's rules on other networks (table 3)",
        architecture_transfer,
    ),
)  # fmt: skip
