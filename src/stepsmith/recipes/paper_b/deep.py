"""What the recipes of SL2O share: networks in full space and in subspaces, bases, contests.

Source: Chen et al., "Scalable Learning to Optimize", ECCV 2022, and its supplement.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from stepsmith import store
from stepsmith.evaluate import Key
from stepsmith.evaluate.cache import identity
from stepsmith.evaluate.epochs import Contest, Length
from stepsmith.evaluate.halving import RUNGS, Rung
from stepsmith.evaluate.schedules import Schedule, Scheduled
from stepsmith.hub import TrainedRule
from stepsmith.recipes.study import Recipe, Study
from stepsmith.rules import Rule, make_rule, rnnprop
from stepsmith.subspace import Snapshots, Subspace, from_trajectory
from stepsmith.subspace.snapshots import write_snapshot
from stepsmith.tasks import SubspaceTask, Task
from stepsmith.tasks.started import StartedTask
from stepsmith.tasks.wrapped import WrappedTask
from stepsmith.unroll import Copies, TorchStepper, roll

SAVED = 0
"""Seed of the saved start from which, as published, everything begins."""
FRESH = 100
"""Seeds of fresh starts follow this one."""
BATCHES = 3_000_000
"""Seeds from here up draw the batches that bases are made with: tests draw others."""

SNAPSHOTS = "snapshots"
"""Folder of those that a basis is made of, until it is."""

META_RATE = 0.01
"""Of meta-Adam, as published."""

_STEPS = Schedule("steps", (0.5, 0.75))
_EARLY = Schedule("steps", (0.3, 0.5))
COSINE = Schedule("cosine")
"""Down to 0 at the end of a training."""

FULL_SPACE: dict[str, Scheduled] = {
    "sgd": Scheduled("sgd", torch.optim.SGD, 0.1, {}, _STEPS),
    "momentum": Scheduled("momentum", torch.optim.SGD, 0.1, {"momentum": 0.9}, _STEPS),
    "adam": Scheduled("adam", torch.optim.Adam, 0.001, {"betas": (0.9, 0.99)}, _STEPS),
    "rmsprop": Scheduled("rmsprop", torch.optim.RMSprop, 0.01, {}, _STEPS),
    "adamw, cosine": Scheduled("adamw", torch.optim.AdamW, 0.002, {}, COSINE),
}
"""Baselines of the whole space: table 1 of the supplement with its rates and drops, and AdamW."""

SUBSPACE: dict[str, Scheduled] = {
    "sgd in subspace": Scheduled("sgd", torch.optim.SGD, 1.0, {}, _EARLY),
    "momentum in subspace": Scheduled(
        "momentum", torch.optim.SGD, 1.0, {"momentum": 0.9}, _EARLY
    ),
    "adamw in subspace, cosine": Scheduled("adamw", torch.optim.AdamW, 0.05, {}, COSINE),
}  # fmt: skip
"""Baselines of the subspace: table 1's, and AdamW."""

TO_HALF = Schedule("cosine", (0.5,))
"""Down to 0 by the middle of a training. From there the parameters are held, so that what half of
the steps reach is measured at the end, on the batches that the others' ends are measured on."""
HALVED = {
    "adamw in subspace, cosine to half": Scheduled("adamw", torch.optim.AdamW, 0.05, {}, TO_HALF)
}
"""The same of a baseline of the subspace."""


@dataclass(frozen=True)
class Depth:
    """How much is measured of a deep network.

    Args:
        network: on which choices behind the rule are compared.
        data: image set, with the variants every task has.
        others: further sets, for transfers of data.
        sources: sets that rules are meta-trained on for these transfers, and not tested on.
        batch: examples of a batch.
        basis_epochs, basis_drop: of the training whose snapshots make the basis; at this share of
            it the rate drops to a tenth.
        snapshots: of an epoch.
        directions: d.
        unroll, episode, episodes: steps of a window and of an episode of meta-training, and how
            many episodes.
        window: as `unroll`, for rules of this library's own: memory does not grow with it.
        descent: steps of a short episode within the subspace: about what it takes to come down,
            where longer ones teach a rule mostly to stand still at the lowest loss.
        epochs: of a test.
        shorter: epochs of a further test within the subspace, where training may end much sooner.
        tests: of an epoch: so often its accuracy is measured.
        seeds: of a test; fresh starts and bases too.
        rungs: of the tuning.
        copies: trainings at once.
        timing_rounds: of each optimizer's step.
    """

    network: str
    data: str
    others: tuple[str, ...]
    sources: tuple[str, ...]
    batch: int
    basis_epochs: int
    basis_drop: float
    snapshots: int
    directions: int
    unroll: int
    episode: int
    episodes: int
    window: int
    descent: int
    epochs: int
    shorter: int
    tests: int
    seeds: int
    rungs: tuple[Rung, ...]
    copies: int
    timing_rounds: int


_TRAIN = "@crop@flip@standardised"
DEPTHS: dict[str, Depth] = {
    "full": Depth(
        "resnet20", f"cifar10{_TRAIN}", (f"cifar100{_TRAIN}",), (f"imagenet32@50000{_TRAIN}",),
        batch=128, basis_epochs=60, basis_drop=50 / 60, snapshots=1, directions=40, unroll=10,
        episode=1000, episodes=20, window=50, descent=200, epochs=100, shorter=10, tests=1, seeds=3,
        rungs=RUNGS, copies=1, timing_rounds=15,
    ),
    "small": Depth(
        "resnet8", f"cifar10@10000@test4000{_TRAIN}",
        (
            f"cifar10@classes0-4@10000@test4000{_TRAIN}",
            f"cifar10@classes5-9@10000@test4000{_TRAIN}",
            "fashion_mnist@rgb32@10000@test4000@crop@flip@standardised",
        ),
        (), batch=32, basis_epochs=12, basis_drop=0.8, snapshots=5, directions=40, unroll=10,
        episode=1000, episodes=12, window=50, descent=200, epochs=3, shorter=1, tests=3, seeds=3,
        rungs=(Rung(0.25, 5), Rung(1.0, 2)), copies=3, timing_rounds=9,
    ),
    "quick": Depth(
        "resnet8", "fashion_mnist@classes0-1@rgb32@8@test8@crop@flip@standardised",
        ("mnist@classes0-1@rgb32@8@test8@standardised",), ("nowhere@rgb32@8",),
        batch=4, basis_epochs=2, basis_drop=0.5, snapshots=3, directions=4, unroll=3, episode=6,
        episodes=2, window=3, descent=3, epochs=2, shorter=1, tests=2, seeds=2,
        rungs=(Rung(0.5, 3), Rung(1.0, 1)), copies=2, timing_rounds=1,
    ),
}  # fmt: skip
"""Amounts by scale: the paper's, for a GPU; for two cores; for tests."""


deep_recipe = partial(Recipe, scales=tuple(DEPTHS))
"""A recipe of these scales."""


def depth(study: Study) -> Depth:
    """The amounts of a study's scale."""
    return DEPTHS[study.scale.name]


@dataclass(frozen=True)
class Place:
    """A network on a data set, with a start and the subspace of a training from there.

    Attributes:
        task: with fresh starts.
        basis: the subspace, its origin the start.
    """

    task: Task
    basis: Subspace

    @property
    def seconds(self) -> float:
        """What it took to find the basis: the training and the decomposition."""
        return self.basis.info["training_seconds"] + self.basis.info["seconds"]

    @cached_property
    def full(self) -> Task:
        """The whole space, from the start."""
        basis = self.basis
        return StartedTask(self.task, basis.layout.tensors(basis.origin), basis.buffers)

    @cached_property
    def sub(self) -> Task:
        """The subspace."""
        return SubspaceTask(self.task, self.basis)


def place(study: Study, network: str, data: str | None = None, seed: int = SAVED) -> Place:
    """A network with the basis of one start, made once and kept in the cache.

    Args:
        study: says how much, and where everything is kept.
        network: a name `stepsmith.tasks.networks` knows.
        data: an image set with its variants; the scale's own by default.
        seed: of the start and of the batches that the basis is made with.
    """
    amounts = depth(study)
    task = study.task(f"{network}-{data or amounts.data}", batch_size=amounts.batch)
    decides = {
        "task": identity(task), "seed": seed, "epochs": amounts.basis_epochs,
        "drop": amounts.basis_drop, "snapshots": amounts.snapshots, "d": amounts.directions,
        "batches": BATCHES,
    }  # fmt: skip
    with study.kept("bases", f"{network}-{seed}", decides) as folder:
        path = folder / "basis.safetensors"
        if not path.exists():
            study.say(f"{task.name}: training for the basis of start {seed}")
            _make_basis(task, seed, amounts, folder, path)
        if (folder / SNAPSHOTS).exists():
            shutil.rmtree(folder / SNAPSHOTS)
    basis = Subspace.load(path, task.device)
    spent = Key(
        recipe=study.recipe, scale=study.scale.name, purpose="spent", task=task.name,
        optimizer=f"basis of start {seed}", kind="baseline",
    )  # fmt: skip
    if not any(block.key == spent for block in study.records.blocks):
        seconds = basis.info["core_seconds"]
        study.records.add(spent, "core_seconds", [seconds], seeds=[seed], steps=[0])
    return Place(task, basis)


def fresh_places(
    study: Study, network: str, data: str | None = None, count: int | None = None
) -> list[Place]:
    """As `place`, from starts that neither rules nor rates have seen, by default one a seed of a
    test."""
    seeds = range(depth(study).seeds if count is None else count)
    return [place(study, network, data, FRESH + seed) for seed in seeds]


def epoch_steps(task: Task, batch: int) -> int:
    """Steps in which as many examples are drawn as there are."""
    while isinstance(task, WrappedTask):
        task = task.task
    data = getattr(task, "data", None)
    assert data is not None, "a ModuleTask"
    return max(1, len(data.train[0]) // batch)


def _length(amounts: Depth, task: Task, epochs: int | None = None) -> Length:
    """Of a test, or of one of other epochs."""
    return Length(epochs or amounts.epochs, epoch_steps(task, amounts.batch), amounts.tests)


def _make_basis(task: Task, seed: int, amounts: Depth, folder: Path, path: Path) -> None:
    """SGD at .1 with weight decay 1e-4, its parameters kept a few times an epoch, their principal
    components. Interrupted, it goes on from the last snapshot: this SGD has no state."""
    epoch = epoch_steps(task, amounts.batch)
    every = max(1, epoch // amounts.snapshots)
    count = amounts.basis_epochs * amounts.snapshots
    begun, begun_cores = time.perf_counter(), time.process_time()
    copies = Copies(task, [seed])
    copies.generators[0].manual_seed(BATCHES + seed)
    snapshots = folder / SNAPSHOTS
    state = snapshots / "state.safetensors"
    done, spent, cores = 0, 0.0, 0.0
    if state.exists():
        tensors, manifest = store.read(state, "basis-training")
        done, spent, cores = (manifest[key] for key in ("done", "seconds", "core_seconds"))
        copies.theta.copy_(tensors.pop("theta"))
        copies.generators[0].set_state(tensors.pop("generator"))
        for name, value in copies.buffers.items():
            value.copy_(tensors[name])
    else:
        _snapshot(snapshots, copies, 0)
    drop = Schedule("steps", (amounts.basis_drop,))
    while done < count:
        sgd = partial(torch.optim.SGD, lr=0.1 * drop.at(done / count), weight_decay=1e-4)
        roll(copies, TorchStepper(sgd, copies.theta, copies.layout), every)
        done += 1
        _snapshot(snapshots, copies, done)
        told = {
            "kind": "basis-training", "done": done,
            "seconds": spent + time.perf_counter() - begun,
            "core_seconds": cores + time.process_time() - begun_cores,
        }  # fmt: skip
        tensors = {"theta": copies.theta, "generator": copies.generators[0].get_state()}
        store.write(state, {**tensors, **copies.buffers}, told)
    trained = spent + time.perf_counter() - begun
    files = Snapshots.listed(snapshots)
    assert len(files) == count + 1, f"{snapshots}: {len(files)} snapshots of {count + 1}"
    basis = from_trajectory(files, amounts.directions, source=task.name)
    told = {
        "training_seconds": trained, "training_steps": count * every,
        "core_seconds": cores + time.process_time() - begun_cores,
    }  # fmt: skip
    basis = replace(basis, info={**basis.info, **told})
    basis.save(path)


def _snapshot(folder: Path, copies: Copies, number: int) -> None:
    buffers = {name: value[0] for name, value in copies.buffers.items()}
    write_snapshot(folder, number, copies.layout.views(copies.theta[0]), buffers)


def sl2o_rule() -> Rule:
    """The rule of the supplement: steps of at most 1 in each coefficient."""
    return rnnprop(step_scale=1.0, faithful=True)


def learn(
    study: Study,
    label: str,
    tasks: Task | Sequence[Task],
    rule: Rule | TrainedRule | None = None,
    *,
    unroll: int | None = None,
    episode: int | None = None,
    budget: int | None = None,
    **changes: Any,
) -> TrainedRule:
    """Meta-train a rule where it will run, once, and keep it in the cache.

    Args:
        study: says how much.
        label: of the rule.
        tasks: where: a place's subspace, say.
        rule: fresh, or one to go on from; `sl2o_rule` by default.
        unroll, episode: steps of a window and of an episode, by default the scale's.
        budget: inner steps, by default the scale's episodes of the scale's length.
        changes: to the configuration of `meta_train`.
    """
    amounts = depth(study)
    given = [tasks] if isinstance(tasks, Task) else list(tasks)
    length = _length(amounts, given[0])
    config = {
        "steps": budget or amounts.episode * amounts.episodes,
        "horizon": episode or amounts.episode, "window": unroll or amounts.unroll, "copies": 1,
        "samples": None, "lr": META_RATE,
        # Whole trainings of a deep network are dear: a validation is one, as long as a test or an
        # episode, and judged as tests are.
        "validations": 4, "validation_copies": 1, "validation_loss": "final",
        "validation_horizon": min(length.total, amounts.episode), **changes,
    }  # fmt: skip
    return study.meta_train(label, given, rule or sl2o_rule(), config)


def learn_own(study: Study, network: str, here: Place) -> TrainedRule:
    """This library's own rule for a subspace: relative units, longer windows, episodes that are
    mostly descent, half of SL2O's budget, kept by its mean loss over the shorter test."""
    amounts = depth(study)
    return learn(
        study, f"relative-{network}", here.sub, make_rule("joined"), unroll=amounts.window,
        episode=amounts.descent, budget=amounts.episode * amounts.episodes // 2,
        validation_loss="mean",
        validation_horizon=_length(amounts, here.task, amounts.shorter).total,
    )  # fmt: skip


def contest(
    study: Study,
    name: str,
    task: Task,
    protocol: str = "as-published",
    *,
    epochs: int | None = None,
    copies: int | None = None,
) -> Contest:
    """A contest of the scale's length or of other epochs, its records the study's.

    Args:
        study: gets the records.
        name: of the task in the records.
        task: the whole task, for the length of an epoch.
        protocol: `as-published` where all begins from one saved start, `corrected` where starts
            and bases are fresh.
        epochs, copies: by default the scale's.
    """
    amounts = depth(study)
    length = _length(amounts, task, epochs)
    key = Key(recipe=study.recipe, scale=study.scale.name, protocol=protocol)
    return Contest(
        name, length, range(amounts.seeds), key, study.records, study.cache / "deep",
        copies=copies or amounts.copies, rungs=amounts.rungs, say=study.say,
        timing_rounds=amounts.timing_rounds if protocol == "as-published" else 0,
    )  # fmt: skip
