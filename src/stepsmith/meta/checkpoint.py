"""Checkpoints of a running meta-training, from which it continues to the same numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepsmith import store
from stepsmith.store import CheckpointError

if TYPE_CHECKING:
    from stepsmith.meta.trainer import Run

_MAY_DIFFER = ("seconds", "steps", "checkpoint_seconds", "validations", "patience")
_COUNTERS = ("ages", "lives", "windows", "levels")


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
        "kind": "run", "identity": _identity(run), "progress": asdict(run.progress),
        "episodes": [{key: getattr(own, key) for key in _COUNTERS} for own in run.episodes],
    }  # fmt: skip
    store.write(path, tensors, manifest)


def load_run(run: Run, path: Path) -> None:
    """Continue a freshly made run from a checkpoint.

    Raises:
        CheckpointError: missing, corrupted, or of another task, rule or configuration (the message
            names what differs).
    """
    tensors, manifest = store.read(path, "run")
    want, have = _identity(run), manifest["identity"]
    for key in want:
        if want[key] != have.get(key):
            difference = _difference(want[key], have.get(key))
            raise CheckpointError(
                f"{path}: was written by a run whose {key} is {difference}; "
                "resume with the same settings or start in another folder"
            )
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
            value.data.copy_(tensors[f"{group}/{key}"])
    for key, generator in _generators(run).items():
        generator.set_state(tensors[key])
    for key, value in {"core_seconds": None, **manifest["progress"]}.items():
        setattr(run.progress, key, value)
    for episodes, counters in zip(run.episodes, manifest["episodes"], strict=True):
        for key in _COUNTERS:
            setattr(episodes, key, counters[key])


def _difference(want: Any, have: Any) -> str:
    if isinstance(want, dict) and isinstance(have, dict):
        odd = [key for key in want | have if want.get(key) != have.get(key)]
        return ", ".join(f"{key}={have.get(key)!r} (now {want.get(key)!r})" for key in odd)
    return f"{have!r} (now {want!r})"


def require_fresh(owner: str, folder: Path) -> None:
    """Raise ValueError where a folder holds an earlier meta-training, which would be lost."""
    held = [name for name in ("run.safetensors", "rule.safetensors") if (folder / name).exists()]
    if held:
        raise ValueError(
            f"{owner}: {folder} holds an earlier meta-training ({', '.join(held)}); "
            + ("continue it with resume=True, or " if "run.safetensors" in held else "")
            + "give another folder"
        )
