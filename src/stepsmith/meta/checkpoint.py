"""Checkpoints of a running meta-training, from which it continues to the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stepsmith import store
from stepsmith.store import CheckpointError

if TYPE_CHECKING:
    from stepsmith.meta.trainer import Run

_MAY_DIFFER = ("seconds", "steps", "checkpoint_seconds", "validations")


def _groups(run: Run) -> dict[str, Mapping[str, Tensor]]:
    """Every tensor a run consists of, by group and key; all are written to in place on loading."""
    moments = {
        f"{key}.{name}": value
        for key, weight in run.weights.items()
        for name, value in run.adam.state.get(weight, {}).items()
    }
    return {
        "weights": run.weights, "best": run.best, "adam": moments,
        "theta": {"theta": run.copies.theta}, "buffers": run.copies.buffers,
        "state": run.stepper.state, "carry": run.stepper.carry, "measures": run.stepper.measures,
    }  # fmt: skip


def _identity(run: Run) -> dict[str, Any]:
    config = asdict(run.config)
    for key in _MAY_DIFFER:
        config.pop(key)
    return {
        "task": run.task.name, "data": run.task.data_name, "config": config,
        "rule": {"class": type(run.rule).__name__, "config": run.rule.config()},
        "parent": run.parent.fingerprint if run.parent else None,
    }  # fmt: skip


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
    for copy, generator in enumerate(run.copies.generators):
        tensors[f"generator/{copy}"] = generator.get_state()
    tensors["generator/sampler"] = run.sampler.get_state()
    manifest = {
        "kind": "run", "identity": _identity(run), "progress": asdict(run.progress),
        "ages": run.ages, "lives": run.lives,
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
    for copy, generator in enumerate(run.copies.generators):
        generator.set_state(tensors[f"generator/{copy}"])
    run.sampler.set_state(tensors["generator/sampler"])
    run.stepper.load(run.weights, run.copies.theta)
    for key, value in {"core_seconds": None, **manifest["progress"]}.items():
        setattr(run.progress, key, value)
    run.ages, run.lives = manifest["ages"], manifest["lives"]


def _difference(want: Any, have: Any) -> str:
    if isinstance(want, dict) and isinstance(have, dict):
        odd = [key for key in want | have if want.get(key) != have.get(key)]
        return ", ".join(f"{key}={have.get(key)!r} (now {want.get(key)!r})" for key in odd)
    return f"{have!r} (now {want!r})"
