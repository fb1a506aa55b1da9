"""A task whose every run starts from the same saved weights."""

from __future__ import annotations

from typing import Any

import torch

from stepsmith.store import fingerprint
from stepsmith.tasks.base import Buffers, Params, Task
from stepsmith.tasks.wrapped import WrappedTask


class StartedTask(WrappedTask):
    """Another task, always started from one saved start, as the protocol of SL2O has it; seeds then
    differ in their batches alone.

    Args:
        task: the other one.
        params: its parameters at the start, by name.
        buffers: buffers at the start; those not named are the task's own fresh ones.

    Raises:
        ValueError: parameters of other names or shapes than the task's.
    """

    def __init__(self, task: Task, params: Params, buffers: Buffers | None = None):
        own, fresh = task.init(torch.Generator().manual_seed(0))
        shapes = [{k: tuple(v.shape) for k, v in part.items()} for part in (own, params)]
        if shapes[0] != shapes[1]:
            wrong = sorted(shapes[0].items() ^ shapes[1].items())[0]
            raise ValueError(
                f"StartedTask: the start does not fit {task.name}: it differs in {wrong[0]!r}"
            )
        super().__init__(task)
        self._params, self._buffers = params, buffers or {}
        self._moved = {
            name: value
            for name, value in self._buffers.items()
            if name in fresh and not torch.equal(value.to(fresh[name]), fresh[name])
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
