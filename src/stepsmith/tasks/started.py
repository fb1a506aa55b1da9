"""A task whose every run starts from the same saved weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepsmith.store import fingerprint
from stepsmith.subspace.basis import not_finite
from stepsmith.tasks.base import Buffers, Params, Task
from stepsmith.tasks.wrapped import WrappedTask


class StartedTask(WrappedTask):
    """Another task, always started from one saved start, as the protocol of SL2O has it; seeds then
    differ in their batches alone.

    Args:
        task: the other one.
        params: its parameters at the start, by name; copied.
        buffers: buffers at the start; those not named are the task's own fresh ones; copied.

    Raises:
        ValueError: parameters or buffers of other names or shapes than the task's, or not finite.
    """

    def __init__(self, task: Task, params: Params, buffers: Buffers | None = None):
        own, fresh = task.init(torch.Generator().manual_seed(0))
        given = buffers or {}
        other = task.init(torch.Generator().manual_seed(1))[1] if given else {}
        _require_fit(task.name, params, own)
        _require_fit(task.name, given, {name: fresh[name] for name in fresh if name in given})
        bad = not_finite({**params, **given})
        if bad is not None:
            raise ValueError(
                f"StartedTask: the start of {task.name} is not finite (nan or infinity in {bad!r})"
            )
        super().__init__(task)
        # A model's own tensors would move on as it is trained.
        self._params = {name: value.detach().clone() for name, value in params.items()}
        self._buffers = {name: value.detach().clone() for name, value in given.items()}
        self._moved = {
            name: value
            for name, value in self._buffers.items()
            # Where fresh ones differ from seed to seed, one that is held fast is a choice too.
            if any(not torch.equal(value.to(x[name]), x[name]) for x in (fresh, other))
        }

    @property
    def details(self) -> dict[str, Any]:
        """The other task's, and which start: its parameters, and the buffers not as they begin."""
        moved = {"start_buffers": fingerprint(self._moved)} if self._moved else {}
        return {**self.task.details, "start": fingerprint(self._params), **moved}

    def init(self, generator: torch.Generator) -> tuple[Params, Buffers]:
        """The saved start; the task's own is drawn too, so that a seed's batches are as there."""
        params, buffers = self.task.init(generator)
        return (
            {name: self._params[name].to(param).clone() for name, param in params.items()},
            {
                name: self._buffers[name].to(value).clone() if name in self._buffers else value
                for name, value in buffers.items()
            },
        )


def _require_fit(name: str, start: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for key in sorted(start.keys() | own.keys()):
        have, want = (tuple(part[key].shape) if key in part else None for part in (start, own))
        if have != want:
            raise ValueError(
                f"StartedTask: the start does not fit {name}: {key!r} {_shaped(have)} in the "
                f"start, {_shaped(want)} in the task"
            )


def _shaped(shape: tuple[int, ...] | None) -> str:
    return "is missing" if shape is None else f"has shape {shape}"
