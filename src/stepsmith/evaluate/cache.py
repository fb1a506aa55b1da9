"""Test runs kept on disk, so that experiments share tuned baselines and go on where they stopped.

An entry is read only where everything that decides it is the same; its file's name holds a hash of
all of that.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import stepsmith
from stepsmith.evaluate.baselines import Baseline
from stepsmith.evaluate.records import Key, Records
from stepsmith.hub import TrainedRule
from stepsmith.names import file_name
from stepsmith.optim import LearnedOptimizer
from stepsmith.store import CheckpointError, fingerprint, require_place
from stepsmith.tasks.base import Batch, Task
from stepsmith.tasks.module import ModuleTask
from stepsmith.tasks.plain import require_graph, require_number
from stepsmith.tasks.wrapped import WrappedTask

FORMAT = 1
"""Raised where the way baselines are run or recorded changes, so that older entries are left."""

BATCHES = 100
"""Of one seed, by which tasks are told apart: some change their data in a few of them only."""

PROBES, PROBED = 3, 0.1
"""Places, and their distance from the start in each parameter, at which users' tasks are probed."""

_log = logging.getLogger("stepsmith")


@dataclass(frozen=True)
class Cache:
    """Records by what decided them.

    Args:
        folder: of the entries, made where missing; None keeps nothing.
        task: `identity` of the task they belong to.
    """

    folder: Path | None = None
    task: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: str | Path | None, task: Task) -> Cache:
        """The cache of a task's measurements in a folder.

        Raises:
            CheckpointError: `folder` is a file, or nothing can be written there.
        """
        if folder is None:
            return cls()
        require_place(folder, "cache")
        return cls(Path(folder), identity(task))

    def path(self, name: str, decides: Mapping[str, Any]) -> Path | None:
        """The entry's file: `<task>-<name>-<hash>.parquet`."""
        if self.folder is None:
            return None
        whole = {"format": FORMAT, "task": self.task, "decides": decides}
        text = json.dumps(whole, sort_keys=True, default=repr)
        digest = hashlib.sha256(text.encode()).hexdigest()[:20]
        return self.folder / f"{file_name(self.task['task'])}-{file_name(name)}-{digest}.parquet"

    def fetch(
        self,
        name: str,
        decides: Mapping[str, Any] | None,
        measure: Callable[[], Records],
        adopt: Callable[[Key], Key],
    ) -> Records:
        """What `measure` returns, from the folder where it was measured before. An entry that
        cannot be written is said, and measured again the next time.

        Args:
            name: for the file's name.
            decides: everything besides the task that decides the records, JSON-able; None where
                that cannot be told, and nothing is kept.
            measure: measures; a block `core_seconds` (processor time, purpose `spent`) is added to
                what it returns and kept with it.
            adopt: from a stored key to the present one.

        Returns:
            Records with keys as `adopt` gives them.
        """
        path = None if decides is None else self.path(name, decides)
        if path is not None and path.exists():
            try:
                return _adopted(_read(path), adopt)
            except CheckpointError as error:
                _log.warning("%s; measuring again", error)
        begun = time.process_time()
        records = measure()
        spent = time.process_time() - begun
        key = replace(records.blocks[0].key, purpose="spent", hyper_parameters="{}")
        records.add(adopt(key), "core_seconds", [spent], seeds=[0], steps=[0])
        if path is not None:
            try:
                records.save(path)
            except CheckpointError as error:
                _log.warning("%s What was measured counts, and is not kept.", error)
        return records


def identity(task: Task) -> dict[str, Any]:
    """What tells a task from another: its names and settings, and the start, batches and loss of
    one seed; of a user's own task, whose names may not say everything, also losses and gradients
    away from the start and the whole test split."""
    generator = torch.Generator().manual_seed(0)
    params, buffers = task.init(generator)
    batches = list(itertools.islice(task.stream([generator], "train"), BATCHES))
    first = tuple(part[0] for part in batches[0])
    loss = task.loss(params, buffers, first, generator, True)[0]
    require_number(type(task).__name__, loss)
    drawn = [*batches, *itertools.islice(task.test_batches(), 1)]
    told = {
        "task": task.name, "network": task.network_name, "data": task.data_name,
        "batch_size": getattr(task, "batch_size", None), "dtype": str(getattr(task, "dtype", "")),
        "device": task.device.type, "start": fingerprint({**params, **buffers}),
        # Rounded: another number of threads may move the last digits.
        "batches": [_batch_hash(batch) for batch in drawn], "loss": f"{float(loss.detach()):.3g}",
        **task.details,
    }  # fmt: skip
    return told if _is_named(task) else {**told, **_probed(task)}


def _is_named(task: Task) -> bool:
    """Whether the task is one of the library's, whose names and settings say what it does."""
    if not type(task).__module__.startswith("stepsmith."):
        return False
    return _is_named(task.task) if isinstance(task, WrappedTask) else type(task) is not ModuleTask


def _probed(task: Task) -> dict[str, Any]:
    """Where a start says little (weights of zero, labels not seen yet), what a loss function, an
    activation, dropout do shows elsewhere: at places around it, training and testing."""
    generator = torch.Generator().manual_seed(1)
    params, buffers = task.init(generator)
    seen = []
    for _ in range(PROBES):
        near = {}
        for name, value in params.items():
            away = PROBED * torch.randn(value.shape, generator=generator).to(value)
            near[name] = (value + away).detach().requires_grad_()
        for train in (True, False):
            loss = task.loss(near, buffers, task.batch(generator, "train"), generator, train)[0]
            require_number(type(task).__name__, loss)
            if train:
                require_graph(type(task).__name__, loss)
            slopes = torch.autograd.grad(loss, list(near.values()), allow_unused=True)
            norms = [0.0 if slope is None else float(slope.norm()) for slope in slopes]
            seen.append([f"{value:.3g}" for value in (float(loss.detach()), *norms)])
    return {"probed": seen, "test": [_batch_hash(batch) for batch in task.test_batches()]}


def _batch_hash(batch: Batch) -> str:
    return fingerprint({f"{place}": part for place, part in enumerate(batch)})


def decides_baseline(entry: Baseline, **settings: Any) -> dict[str, Any] | None:
    """What decides a tuned baseline; None for what `decides_optimizer` gives None for."""
    optimizer = _watched(entry.make, entry.fixed)
    if optimizer is None:
        return None
    return {
        "optimizer": optimizer, "name": entry.name, "centre": entry.centre,
        "fixed": entry.fixed, **settings,
    }  # fmt: skip


def decides_optimizer(make: Callable[..., Any], **settings: Any) -> dict[str, Any] | None:
    """What decides the runs of an optimizer taken as it is: one of torch's or this library's, or a
    `functools.partial` of one with plain keywords alone. None for any other, whose code is not
    watched, and for what runs a learned rule, whose weights a name does not tell."""
    called, given = make, {}
    if isinstance(make, functools.partial) and not make.args:
        called, given = make.func, make.keywords
    optimizer = _watched(called, given)
    if optimizer is None:
        return None
    return {"optimizer": optimizer, "arguments": given, **settings}


def _watched(make: Callable[..., Any], given: Mapping[str, Any]) -> str | None:
    """The name of an optimizer that its name and arguments say all about, else None."""
    learned = isinstance(make, type) and issubclass(make, LearnedOptimizer)
    return None if learned or not _is_plain(given) else _named(make)


def _is_plain(value: Any) -> bool:
    """Whether its text in JSON says all there is to it."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _named(make: Callable[..., Any]) -> str | None:
    module, name = (getattr(make, part, "<") for part in ("__module__", "__qualname__"))
    watched = module.partition(".")[0] in ("torch", "stepsmith") and "<" not in name
    return f"{module}:{name}" if watched else None


def decides_rule(
    trained: TrainedRule, *, deployed: bool = False, **settings: Any
) -> dict[str, Any] | None:
    """What decides a rule's runs: weights, configuration and this library's code, of runs by
    `LearnedOptimizer` (`deployed`) its too; None for a user's own rule, whose code is not watched.
    """
    cls = type(trained.rule)
    if not cls.__module__.startswith("stepsmith."):
        return None
    told = {
        "rule": f"{cls.__module__}:{cls.__qualname__}", "config": trained.rule.config(),
        "weights": trained.fingerprint, "trust": trained.manifest.get("trust"),
        "code": _code("rules", "kernels", "unroll"),
    }  # fmt: skip
    return {**told, **({"optimizer": _code("optim")} if deployed else {}), **settings}


def together(task: Task, copies: int) -> dict[str, Any]:
    """How many run at once, where that decides the numbers: stacked copies draw dropout from one
    generator."""
    draws = not isinstance(task.randomness(torch.Generator()), nullcontext)
    return {"copies": copies} if task.stacking == "vmap" and draws else {}


@functools.cache
def _code(*packages: str) -> str:
    """Hash of the code of these packages, and of the layout all share."""
    root = Path(stepsmith.__file__).parent
    digest = hashlib.sha256()
    paths = [root / "layout.py"]
    for package in packages:
        paths += sorted((root / package).rglob("*.py"))
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> Records:
    records = Records.load(path)
    if not any(block.metric in ("train_loss", "final_loss") for block in records.blocks):
        raise CheckpointError(f"{path}: holds no losses")
    return records


def _adopted(records: Records, adopt: Callable[[Key], Key]) -> Records:
    return Records([replace(block, key=adopt(block.key)) for block in records.blocks])
