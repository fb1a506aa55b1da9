"""Recording a training run: the parameters every so many steps, one file each."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from stepsmith import store
from stepsmith.rules.base import require_count, require_kind
from stepsmith.subspace.basis import buffers_of, require_counts
from stepsmith.subspace.layout import TypedLayout, trainable, unwrapped
from stepsmith.version import __version__

_NAME = re.compile(r"snapshot-(\d+)\.safetensors")


class Snapshots:
    """Writes a model's trainable parameters to a folder along a training run.

    Args:
        folder: made where missing.
        model: what is trained; parameters that are frozen now are left out, and which ones are may
            not change along the run.
        every: calls from one snapshot to the next. Call the recorder before every training step:
            the first call keeps the start.
        done: training steps already made, of a run that goes on from its checkpoint: snapshots go
            on in its rhythm, and those of later steps, which will be made again, are removed.

    Raises:
        ValueError: `every` no whole number above 0, `done` below 0, nothing to train, a folder that
            holds snapshots of another run, or fewer than the steps made would have left.
        TypeError: an argument of another type.

    >>> import tempfile
    >>> model = nn.Linear(3, 1)
    >>> snapshots = Snapshots(tempfile.mkdtemp(), model, every=10)
    >>> for step in range(21):
    ...     snapshots()  # then a training step
    >>> len(snapshots.paths())
    3
    """

    def __init__(
        self, folder: str | Path, model: nn.Module, every: int = 1, *, done: int | None = None
    ):
        require_counts("Snapshots", every=every)
        require_kind("Snapshots", "model", model, nn.Module)
        every = int(every)
        done = None if done is None else require_count("Snapshots", "done", done, least=0)
        self.folder = store.place("Snapshots", folder)
        self.every = every
        self._model = unwrapped(model)
        self._names = TypedLayout.of(trainable(model)).names
        there = self.listed(self.folder)
        if there and done is None:
            raise ValueError(
                f"Snapshots: {self.folder} holds {len(there)} snapshots already; choose another "
                "folder, or say by done=STEPS how many steps of that run are made"
            )
        self._calls = done or 0
        self._number = math.ceil(self._calls / every)
        kept = [path for path in there if _number(path) < self._number]
        if len(kept) < self._number:
            raise ValueError(
                f"Snapshots: {self.folder} holds {len(kept)} snapshots of the first {done} steps; "
                f"every {every} steps there would be {self._number}"
            )
        for path in there[len(kept) :]:
            path.unlink()

    def __call__(self) -> None:
        """Count a training step, which is about to be made; keep every `every`-th, the first too.

        Raises:
            CheckpointError: the disk refuses.
        """
        if self._calls % self.every == 0:
            self.record()
        self._calls += 1

    def record(self) -> Path:
        """Keep the parameters as they are now, and the buffers beside them; returns the file. A run
        that records by hand has no rhythm to go on in: give it a new folder, not `done`.

        Raises:
            CheckpointError: the disk refuses, or another run records into the folder.
            ValueError: a parameter has been frozen or unfrozen since the recorder was made.
        """
        params = trainable(self._model)
        changed = sorted({*params} ^ {*self._names})
        if changed:
            raise ValueError(
                f"Snapshots: parameter {changed[0]!r} was frozen or unfrozen along the run, and a "
                "trajectory is of the same parameters throughout; begin another recorder there"
            )
        if snapshot_path(self.folder, self._number).exists():
            raise store.CheckpointError(
                f"{self.folder}: snapshot {self._number} is there already: another run records "
                "into the folder; choose another folder"
            )
        path = write_snapshot(self.folder, self._number, params, buffers_of(self._model))
        self._number += 1
        return path

    def paths(self) -> list[Path]:
        """The files, in order of time."""
        return self.listed(self.folder)

    def __len__(self) -> int:
        return len(self.paths())

    @staticmethod
    def listed(folder: str | Path) -> list[Path]:
        """The snapshots in a folder, in order of time; none where it does not exist.

        Raises:
            ValueError: it is a file.
        """
        folder = store.place("Snapshots", folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"Snapshots: {folder} is a file; pass the folder of the snapshots")
        found = (path for path in folder.glob("snapshot-*") if _NAME.fullmatch(path.name))
        return sorted(found, key=_number)


def snapshot_path(folder: Path, number: int) -> Path:
    """The file of a snapshot."""
    return folder / f"snapshot-{number:06d}.safetensors"


def write_snapshot(
    folder: Path, number: int, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> Path:
    """One file of a trajectory: `snapshot-NUMBER.safetensors`, which says which of its tensors are
    parameters.

    Raises:
        CheckpointError: the disk refuses.
    """
    path = snapshot_path(folder, number)
    manifest = {
        "kind": "snapshot", "version": __version__, "number": number,
        "parameters": list(params), "buffers": list(buffers),
    }  # fmt: skip
    store.write(path, {**params, **buffers}, manifest)
    return path


def missing_numbers(paths: Sequence[Path]) -> list[int]:
    """Which snapshots between the first and the last of these there are not."""
    numbers = {_number(path) for path in paths}
    return sorted({*range(min(numbers), max(numbers))} - numbers)


def _number(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])
