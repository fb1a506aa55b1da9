"""Checkpoints of a running meta-training, from which it continues to the same numbers."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepsmith import store
from stepsmith.hub import TrainedRule
from stepsmith.store import CheckpointError
from stepsmith.version import __version__

if TYPE_CHECKING:
    from stepsmith.meta.trainer import Run

_MAY_DIFFER = ("seconds", "steps", "checkpoint_seconds", "validations", "patience")
_COUNTERS = ("ages", "lives", "windows", "levels")

CHECKPOINT, RULE = "run.safetensors", "rule.safetensors"
"""Files of a meta-training's folder: what it goes on from, and its result."""

FORMAT = 1
"""Of checkpoints; raised where their tensors or counters change. Those without one are of 1."""

COST = 20
"""Checkpoints that come before `checkpoint_seconds` are apart so many times what one takes."""

_log = logging.getLogger("stepsmith")


def _groups(run: Run) -> dict[str, Mapping[str, Tensor]]:
    """Every tensor a run consists of, by group and key; all are written to in place on loading."""
    moments = {
        f"{key}.{name}": value
        for key, weight in run.weights.items()
        for name, value in run.adam.state.get(weight, {}).items()
    }
    groups = {"weights": run.weights, "best": run.best, "adam": moments}
    for place, episodes in enumerate(run.episodes):
        copies, stepper = episodes.copies, episodes.stepper
        groups |= {
            f"theta.{place}": {"theta": copies.theta}, f"buffers.{place}": copies.buffers,
            f"state.{place}": stepper.state, f"carry.{place}": stepper.carry,
            f"measures.{place}": stepper.measures,
        }  # fmt: skip
    return groups


def _generators(run: Run) -> dict[str, torch.Generator]:
    return {"generator/sampler": run.sampler} | {
        f"generator.{place}/{copy}": generator
        for place, episodes in enumerate(run.episodes)
        for copy, generator in enumerate(episodes.copies.generators)
    }


def _identity(run: Run) -> dict[str, Any]:
    config = asdict(run.config)
    for key in _MAY_DIFFER:
        config.pop(key)
    identity = {
        "task": [task.name for task in run.tasks], "data": [task.data_name for task in run.tasks],
        "config": config,
        "rule": {"class": type(run.rule).__name__, "config": run.rule.config()},
        "parent": run.parent.fingerprint if run.parent else None,
    }  # fmt: skip
    if any(task.details for task in run.tasks):
        identity["details"] = [task.details for task in run.tasks]
    # As it comes back from a file: tuples as lists.
    return json.loads(json.dumps(identity))


def save_run(run: Run, path: Path) -> None:
    """Write the whole state of a run, atomically.

    Raises:
        CheckpointError: the disk refused; the checkpoint before is untouched.
    """
    tensors = {
        f"{group}/{key}": value
        for group, members in _groups(run).items()
        for key, value in members.items()
    }
    for key, generator in _generators(run).items():
        tensors[key] = generator.get_state()
    manifest = {
        "kind": "run", "format": FORMAT, "version": __version__,
        "identity": _identity(run), "progress": asdict(run.progress),
        "episodes": [{key: getattr(own, key) for key in _COUNTERS} for own in run.episodes],
    }  # fmt: skip
    store.write(path, tensors, manifest)


def load_run(run: Run, path: Path) -> None:
    """Continue a freshly made run from a checkpoint.

    Raises:
        CheckpointError: missing, damaged, of another version's format, or of another task, rule or
            configuration (the message names what differs).
    """
    try:
        tensors, manifest = store.read(path, "run")
    except CheckpointError as error:
        if not path.exists():
            raise
        raise CheckpointError(f"{error}; or delete it to begin this run from its start") from None
    version = manifest.get("version", "before 0.2")
    if manifest.get("format", 1) != FORMAT:
        raise CheckpointError(
            f"{path}: is a checkpoint of Stepsmith {version}, which {__version__} cannot read; go "
            "on with that version, or delete it to begin this run from its start"
        )
    want, have = _identity(run), manifest.get("identity", {})
    for key in want:
        if want[key] != have.get(key):
            difference = _difference(want[key], have.get(key))
            raise CheckpointError(
                f"{path}: was written by a run whose {key} is {difference}; "
                "resume with the same settings or start in another folder"
            )
    try:
        _restore(run, tensors, manifest)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: is no whole checkpoint of this run ({type(error).__name__}: {error}; written "
            f"by Stepsmith {version}, this is {__version__}); restore a backup, or delete it to "
            "begin this run from its start"
        ) from None


def _restore(run: Run, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    for weight in run.weights.values():
        # Adam makes its state at the first step; these are the tensors it would make.
        if any(name.startswith("adam/") for name in tensors):
            run.adam.state[weight] = {
                "step": weight.new_zeros((), device="cpu"),
                "exp_avg": weight.detach().clone(),
                "exp_avg_sq": weight.detach().clone(),
            }
    for group, members in _groups(run).items():
        for key, value in members.items():
            saved = tensors[f"{group}/{key}"]
            if saved.shape != value.shape:
                raise ValueError(
                    f"{group}/{key} has shape {tuple(saved.shape)}, not {tuple(value.shape)}"
                )
            value.data.copy_(saved)
    for key, generator in _generators(run).items():
        generator.set_state(tensors[key])
    counters = {"core_seconds": None, **manifest["progress"]}
    for counter in fields(run.progress):
        setattr(run.progress, counter.name, counters[counter.name])
    for episodes, own in zip(run.episodes, manifest["episodes"], strict=True):
        for key in _COUNTERS:
            setattr(episodes, key, own[key])


def _difference(want: Any, have: Any) -> str:
    if isinstance(want, dict) and isinstance(have, dict):
        odd = [key for key in want | have if want.get(key) != have.get(key)]
        return ", ".join(f"{key}={have.get(key)!r} (now {want.get(key)!r})" for key in odd)
    return f"{have!r} (now {want!r})"


def require_fresh(owner: str, folder: Path) -> None:
    """Raise ValueError where a folder holds an earlier meta-training, which would be lost."""
    held = [name for name in (CHECKPOINT, RULE) if (folder / name).exists()]
    if held:
        raise ValueError(
            f"{owner}: {folder} holds an earlier meta-training ({', '.join(held)}); "
            + ("continue it with resume=True, or " if CHECKPOINT in held else "")
            + "give another folder"
        )


def require_begun(folder: Path) -> None:
    """Raise CheckpointError where there is no such folder to resume in."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder / CHECKPOINT}: no such file; resume where a run was begun")


def can_continue(folder: Path) -> bool:
    """Whether a folder has a checkpoint. A run that was killed before its first one begins anew."""
    found = (folder / CHECKPOINT).exists()
    if not found:
        _log.warning("%s: no checkpoint yet; the run begins from its start", folder)
    return found


@contextmanager
def alone(owner: str, folder: Path | None) -> Iterator[None]:
    """Keep a folder, made where missing, to this process while a meta-training writes there.

    Raises:
        CheckpointError: another process has it, or nothing can be written there.
    """
    if folder is None:
        yield
        return
    store.require_place(folder, f"{owner}: out")
    with store.claimed(folder):
        yield


class Saver:
    """Writes a run's checkpoints: one as soon as there is something to lose, later ones at growing
    intervals, so that a run killed at any time has lost at most about half of what it did since it
    was started. A disk that refuses is said and tried again; the run goes on.

    Args:
        path: the file; None writes nothing.
        seconds: the longest interval.
    """

    def __init__(self, path: Path | None, seconds: float):
        self._path, self._seconds = path, seconds
        self._begun = self._saved = time.perf_counter()
        self._interval = 0.0
        self._refused = ""

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written."""
        return bool(self._refused)

    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self._path is not None and time.perf_counter() - self._saved >= self._interval

    def save(self, run: Run) -> None:
        """Write a checkpoint now."""
        if self._path is None:
            return
        before = time.perf_counter()
        try:
            save_run(run, self._path)
        except CheckpointError as error:
            if str(error) != self._refused:
                _log.warning("meta_train: %s The run goes on and will try again.", error)
            self._refused = str(error)
        else:
            if self._refused:
                _log.warning("meta_train: %s: can be written again", self._path)
            self._refused = ""
        self._saved = time.perf_counter()
        cost, age = self._saved - before, self._saved - self._begun
        self._interval = min(self._seconds, max(COST * cost, age))


def save_rule(trained: TrainedRule, folder: Path) -> None:
    """Save a meta-training's result in its folder; where the disk refuses, in a folder for
    temporary files, and say so."""
    try:
        trained.save(folder / RULE)
    except CheckpointError as error:
        _log.warning("meta_train: %s %s", error, _spare(trained))


def _spare(trained: TrainedRule) -> str:
    try:
        path = trained.save(Path(tempfile.mkdtemp(prefix="stepsmith-")) / RULE)
    except (CheckpointError, OSError) as error:
        return f"Nor could it be kept elsewhere ({error})."
    return f"The trained rule is in {path}."
