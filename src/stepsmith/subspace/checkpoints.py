"""Parameter snapshots, in memory or on disk, read a few numbers at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepsmith import store
from stepsmith.store import CheckpointError
from stepsmith.subspace.layout import TypedLayout
from stepsmith.subspace.snapshots import Snapshots, missing_numbers

Source = Mapping[str, Tensor] | str | Path
"""A state dict, or the path of a safetensors file of one."""

Piece = tuple[str, slice]
"""Some numbers of a tensor, flattened."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""How batch-norm's buffers end: they look like parameters in a state dict."""


class Checkpoint:
    """One snapshot of a run.

    Args:
        source: a state dict or a file.
        label: what it is called in messages.

    Raises:
        TypeError: neither, or names that are no strings.
        CheckpointError: a file that is missing or no safetensors file.
    """

    def __init__(self, source: Source, label: str):
        self.label = label
        self.manifest: dict[str, Any] = {}
        self._path: Path | None = None
        self._tensors: Mapping[str, Tensor] = {}
        self.forms: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        """Shape and dtype of each tensor; torch.int64 stands for whatever is not floating-point."""
        self._others: dict[str, Any] = {}  # a module's extra state, say
        if isinstance(source, Mapping):
            bad = next((name for name in source if not isinstance(name, str)), None)
            if bad is not None:
                raise TypeError(f"{self.label}: tensors go by names, but one is called {bad!r}")
            self._tensors = {k: v for k, v in source.items() if isinstance(v, Tensor)}
            self._others = {k: v for k, v in source.items() if k not in self._tensors}
            self.forms = {k: (tuple(v.shape), v.dtype) for k, v in self._tensors.items()}
        elif isinstance(source, str | Path):
            self._path = store.place(self.label, source)
            self.label = f"{self.label} ({self._path})"
            with store.opened(self._path) as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype(), torch.int64)
                    self.forms[name] = (tuple(part.get_shape()), dtype)
                if "stepsmith" in (metadata := file.metadata() or {}):
                    self.manifest = _manifest(self._path, metadata)
        else:
            raise TypeError(
                f"{self.label}: expected a state dict or the path of a safetensors file, got "
                f"{type(source).__name__}"
            )

    @contextmanager
    def _all(self) -> Iterator[Mapping[str, Tensor]]:
        if self._path is None:
            yield self._tensors
            return
        with store.opened(self._path) as file:
            yield _Lazy(self._path, file)

    @torch.no_grad()
    def read(self, pieces: Sequence[Piece], out_B: Tensor) -> None:
        """Write pieces of its tensors, joined, into `out_B`."""
        # Opened anew for every part: pages of a file left open would count as memory in use.
        with self._all() as tensors:
            end = 0
            for name, span in pieces:
                part = tensors[name].reshape(-1)[span]
                out_B[end : end + len(part)] = part
                end += len(part)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of some of its tensors."""
        with self._all() as tensors:
            return {name: tensors[name].detach().cpu().clone() for name in names}

    def shares(self, other: Checkpoint) -> bool:
        """Whether both hold the very same tensors in memory, not copies from different times."""
        mine, theirs = (
            {value.data_ptr() for value in checkpoint._tensors.values() if value.numel()}
            for checkpoint in (self, other)
        )
        return bool(mine) and mine == theirs

    def parameter_names(self) -> list[str]:
        """The names of what it takes for parameters: all a snapshot says are, or all there is.

        Raises:
            ValueError: a state dict that holds more than parameters, or one tensor twice.
        """
        for name, value in self._others.items():
            raise ValueError(
                f"{self.label}: {name!r} is no tensor but {type(value).__name__}; pass the state "
                "dict itself, and params=model where it holds more than parameters"
            )
        if self.manifest.get("kind") == "snapshot":
            return list(self.manifest["parameters"])
        first: dict[tuple[int, tuple[int, ...]], str] = {}
        for name, (shape, dtype) in self.forms.items():
            if name.rsplit(".", 1)[-1] in STATISTICS or not dtype.is_floating_point:
                raise ValueError(
                    f"{self.label}: {name!r} looks like a buffer, not a parameter; say which "
                    "tensors are parameters: params=model, or their names"
                )
            tensor = self._tensors.get(name)
            if tensor is None or tensor.numel() == 0:
                continue
            other = first.setdefault((tensor.data_ptr(), shape), name)
            if other != name:
                raise ValueError(
                    f"{self.label}: {other!r} and {name!r} are one tied parameter; pass "
                    "params=model, which names it once"
                )
        return list(self.forms)

    def require(self, layout: TypedLayout) -> None:
        """Check that it has the tensors of a layout.

        Raises:
            ValueError: names the checkpoint and the first tensor that is missing or differs.
        """
        for name, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes, strict=True):
            if name not in self.forms:
                raise ValueError(f"{self.label}: has no tensor {name!r}; is it of another network?")
            if self.forms[name] != (shape, dtype):
                have, kind = self.forms[name]
                raise ValueError(
                    f"{self.label}: tensor {name!r} has shape {have} and dtype {kind}, in the "
                    f"first checkpoint {shape} and {dtype}; is it of another network?"
                )


class _Lazy(Mapping[str, Tensor]):
    """The tensors of an open file, read when they are touched."""

    def __init__(self, path: Path, file: Any):
        self._path, self._file = path, file

    def __getitem__(self, name: str) -> Tensor:
        return store.tensor_of(self._path, self._file, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def _manifest(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """A file's manifest; of a snapshot, its lists of names checked."""
    size = len(metadata["stepsmith"])
    if size > store.LONGEST_MANIFEST:
        raise CheckpointError(
            f"{path}: its manifest has {size:,} characters, more than "
            f"{store.LONGEST_MANIFEST:,} (stepsmith.store.LONGEST_MANIFEST)"
        )
    manifest = store.manifest_of(path, metadata)
    if not isinstance(manifest, dict):
        raise CheckpointError(
            f"{path}: its manifest should be a mapping, is a {type(manifest).__name__}"
        )
    if manifest.get("kind") == "snapshot":
        for name in ("parameters", "buffers"):
            told = manifest.get(name)
            if not isinstance(told, list) or not all(isinstance(one, str) for one in told):
                raise CheckpointError(
                    f"{path}: {name!r} in its manifest should be a list of names, is {told!r:.60}"
                )
    return manifest


def as_checkpoints(sources: Snapshots | str | Path | Iterable[Source]) -> list[Checkpoint]:
    """Snapshots in order.

    Args:
        sources: a recorder, the folder of one, or state dicts and paths in order of time.

    Raises:
        TypeError, CheckpointError: as `Checkpoint`; a single state dict.
        ValueError: a folder that is missing, holds no snapshots, has a gap in them or is a file.
    """
    if isinstance(sources, Snapshots):
        sources = sources.paths()
    elif isinstance(sources, str | Path):
        folder, sources = sources, Snapshots.listed(sources)
        if not sources:
            holds = "holds no snapshot-*.safetensors" if Path(folder).exists() else "does not exist"
            raise ValueError(
                f"{folder}: {holds}; pass the folder that Snapshots wrote to, or a list of state "
                "dicts or of paths of safetensors files"
            )
        missing = missing_numbers(sources)
        if missing:
            raise ValueError(
                f"{folder}: of the snapshots number {missing[0]} is missing; where that is meant, "
                "pass the list of those that count"
            )
    elif isinstance(sources, Mapping):
        raise TypeError(
            "a trajectory is several checkpoints: pass a list of state dicts or paths, got one "
            "state dict"
        )
    return [Checkpoint(source, f"checkpoint {place}") for place, source in enumerate(sources)]
