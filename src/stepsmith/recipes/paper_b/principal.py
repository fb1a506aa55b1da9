"""Section 3 and figure 7 of SL2O's supplement: how the first principal directions are moved.

Shape letters: S = seeds, T = steps, K = directions looked at.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from stepsmith.evaluate import Key, Records
from stepsmith.evaluate.records import contiguous
from stepsmith.evaluate.run import (
    MakeStepper,
    add_meta_training,
    by_rule,
    by_torch,
    learned_key,
)
from stepsmith.evaluate.tuning import hyper_parameters
from stepsmith.recipes.paper_b.comparisons import SL2O
from stepsmith.recipes.paper_b.deep import (
    SUBSPACE,
    contest,
    deep_recipe,
    depth,
    fresh_places,
    learn,
    place,
)
from stepsmith.recipes.study import Study
from stepsmith.tasks import Task
from stepsmith.unroll import Copies, Start, roll

DIRECTIONS = 3
STEPS = 100
SEEDS = 5
MOMENTUM = "momentum in subspace"


def updates(
    task: Task, make: MakeStepper, seeds: Sequence[int], steps: int, directions: int = DIRECTIONS
) -> tuple[np.ndarray, np.ndarray]:
    """Train coefficients and keep how the first of them move.

    Args:
        task: in a subspace.
        make: makes the stepper.
        seeds: S.
        steps: T.
        directions: K.

    Returns:
        (S, T) losses before each step, and (S, T, K) changes of the coefficients.
    """
    copies = Copies(task, seeds)
    seen: list[torch.Tensor] = []

    def keep(start: Start) -> None:
        seen.append(copies.theta[:, :directions].detach().clone())

    losses_TC = roll(copies, make(copies), steps, hook=keep)
    seen.append(copies.theta[:, :directions].detach().clone())
    places_STK = torch.stack(seen, 1).double().cpu().numpy()
    return losses_TC.T.double().cpu().numpy(), np.diff(places_STK, axis=1)


def statements(updates_STK: np.ndarray) -> list[dict[str, Any]]:
    """What the paper says of figure 7, as numbers, one entry a seed.

    Args:
        updates_STK: of one optimizer.

    Returns:
        For each seed: `size`, the mean |update| of each direction; `spread`, the standard deviation
        of log10 |update| over steps and directions (how varied their scales are); `decay`, the mean
        |update| of the last quarter over that of the first; `half`, the step by which each
        direction has made half of its path; and whether directions 2 and 3 were before 1. None
        throughout where nothing moved, or to where is not finite.
    """
    found = []
    for sizes_TK in contiguous(np.abs(updates_STK)):
        quarter = max(1, len(sizes_TK) // 4)
        path_TK = np.cumsum(sizes_TK, 0)
        half = [int(np.argmax(path_T >= 0.5 * path_T[-1])) + 1 for path_T in path_TK.T]
        moved = sizes_TK[sizes_TK > 0]
        if not moved.size or not np.isfinite(sizes_TK).all():
            found.append(dict.fromkeys(("size", "spread", "decay", "half", "others_before_first")))
            continue
        found.append(
            {
                "size": sizes_TK.mean(0).tolist(), "spread": float(np.log10(moved).std()),
                "decay": float(sizes_TK[-quarter:].mean() / sizes_TK[:quarter].mean()),
                "half": half, "others_before_first": bool(max(half[1:]) < half[0]),
            }
        )  # fmt: skip
    return found


def principal(study: Study) -> None:
    """Momentum at its tuned rate without its schedule's drops, and SL2O, from the same start: the
    saved one with batches of several seeds, then starts and bases of which each seed has its own,
    and which neither rule nor rate has seen."""
    net = depth(study).network
    here = place(study, net)
    trained = learn(study, f"sl2o-{net}", here.sub)
    held = contest(study, net, here.task)
    rate = held.baseline(MOMENTUM, here.sub, SUBSPACE[MOMENTUM])
    steps, seeds = (8, range(2)) if study.scale.name == "quick" else (STEPS, range(SEEDS))
    momentum = hyper_parameters(SUBSPACE[MOMENTUM], rate)
    makers = {
        MOMENTUM: by_torch(partial(torch.optim.SGD, **momentum)),
        SL2O: by_rule(trained),
    }
    fresh = [other.sub for other in fresh_places(study, net, count=len(seeds))]
    for protocol, tasks in (("as-published", [here.sub] * len(seeds)), ("corrected", fresh)):
        key = Key(
            recipe=study.recipe, scale=study.scale.name, protocol=protocol,
            task=f"{net}, {DIRECTIONS} of {depth(study).directions} directions",
            network=here.task.network_name, data=here.task.data_name, horizon=steps,
        )  # fmt: skip
        keys = {
            MOMENTUM: replace(
                key, optimizer=MOMENTUM, kind="baseline", tuned_for="final",
                hyper_parameters=json.dumps(momentum),
            ),
            SL2O: learned_key(key, SL2O, trained),
        }  # fmt: skip
        add_meta_training(study.records, keys[SL2O], trained)
        said: dict[str, list[dict[str, Any]]] = {}
        for name, make in makers.items():
            study.say(f"principal directions, {protocol}: {name}")
            each = [
                updates(task, make, [seed], steps) for task, seed in zip(tasks, seeds, strict=True)
            ]
            losses_ST, updates_STK = (np.concatenate(parts) for parts in zip(*each, strict=True))
            _keep(study.records, keys[name], losses_ST, updates_STK, seeds)
            said[name] = statements(updates_STK)
        for what, entries in {**said, "claims": claims(said[SL2O], said[MOMENTUM])}.items():
            study.findings.setdefault(what, []).extend(
                {"protocol": protocol, **entry} for entry in entries
            )


def claims(
    rule: Sequence[dict[str, Any]], momentum: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The paper's three statements of figure 7, and in how many of the seeds each holds.

    Args:
        rule, momentum: what `statements` says of each, seed by seed; seeds in which either has not
            moved, or not to a finite place, count as not.
    """
    pairs = list(zip(rule, momentum, strict=True))
    moved = [(own, other) for own, other in pairs if own["size"] and other["size"]]
    holds = {
        "the scales of the rule's updates vary more than momentum's": sum(
            own["spread"] > other["spread"] for own, other in moved
        ),
        "the rule's updates decay without a schedule, and more than momentum's": sum(
            own["decay"] < min(1.0, other["decay"]) for own, other in moved
        ),
        "the rule moves directions 2 and 3 before direction 1": sum(
            own["others_before_first"] for own, _ in moved
        ),
    }
    return [{"claim": claim, "holds": count, "seeds": len(pairs)} for claim, count in holds.items()]


def _keep(
    records: Records, key: Key, losses_ST: np.ndarray, updates_STK: np.ndarray, seeds: Sequence[int]
) -> None:
    steps = range(losses_ST.shape[1])
    records.add(key, "train_loss", losses_ST, seeds=seeds, steps=steps, split="train")
    for k in range(updates_STK.shape[2]):
        records.add(key, f"update_{k + 1}", updates_STK[:, :, k], seeds=seeds, steps=steps)


RECIPES = (
    deep_recipe(
        "b11-principal-directions", "updates of the first principal directions (figure 7)",
        principal,
    ),
)  # fmt: skip
