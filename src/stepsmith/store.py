"""Safetensors with a JSON manifest in the same file, written atomically. Never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_KEY = "stepsmith"
_DIGEST = "stepsmith-sha256"

_PART = 2**22
"""Numbers hashed at a time: a tensor of gigabytes is not copied for it."""


class CheckpointError(ValueError):
    """A file that cannot be written, or is not what it should be; the message is one line."""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        for part in tensor.reshape(-1).split(_PART):
            # Not `contiguous`: a tensor of one number counts as such whatever its stride, and an
            # expanded one (stride 0) cannot be viewed as bytes.
            held = part.cpu().clone(memory_format=torch.contiguous_format)
            digest.update(held.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a kill or a full disk leaves the old one, or none, but never half a one.

    Raises:
        CheckpointError: the system refused (no space, no permission, no such folder).
    """
    _atomically(path, lambda temporary: temporary.write_bytes(data))


def _atomically(path: Path, put: Callable[[Path], object]) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
        temporary.touch()
        mode = temporary.stat().st_mode
        put(temporary)
        # safetensors' own files are for their owner alone; ours are as any other.
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"{path}: could not be written ({reason}); what was there before is untouched. "
            "Make room or choose another folder."
        ) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


_TRIED = 2**16
"""Bytes written to try a folder: a full disk may still take an empty file."""


def require_place(folder: str | Path, use: str) -> None:
    """Try a folder before work begins for it: make it, write a small file there, and undo both.

    Args:
        folder: where something will be saved.
        use: what for, to begin the message with, such as `"--out"`.

    Raises:
        CheckpointError: the folder cannot be made, or nothing can be written there.
    """
    folder = Path(folder)
    made = [one for one in (folder, *folder.parents) if not os.path.lexists(one)]
    tried = folder / f".tried-{os.getpid()}-{threading.get_ident()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tried.write_bytes(bytes(_TRIED))
    except OSError as error:
        raise CheckpointError(
            f"{use} {folder}: is no folder that can be written to ({error.strerror or error}); "
            "make room or choose another folder"
        ) from None
    finally:
        with suppress(OSError):
            tried.unlink()
        for one in made:
            with suppress(OSError):  # another process may use it by now
                one.rmdir()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def suffixed(path: str | Path) -> Path:
    """The file that something is saved in: `.safetensors` is added where there is no suffix."""
    path = Path(path)
    return path if path.suffix else path.with_suffix(".safetensors")


def write(path: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write tensors and a manifest as one safetensors file, atomically.

    Raises:
        CheckpointError: as `write_bytes`.
        TypeError: the manifest holds something that JSON does not know.
    """
    held: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in tensors.items():
        held[key] = value.detach().cpu().contiguous()
        # The format refuses tensors that share memory. Others are not copied: they may be large.
        place = held[key].untyped_storage().data_ptr()
        if place in seen:
            held[key] = held[key].clone()
        seen.add(place)
    manifest = {**manifest, "fingerprint": fingerprint(held)}
    try:
        text = json.dumps(manifest)
    except TypeError as error:
        raise TypeError(
            f"{path}: the manifest must hold plain JSON values ({error}); convert tensors and "
            "arrays to lists and numbers"
        ) from None
    metadata = {_KEY: text, _DIGEST: _sha256(text)}
    _atomically(path, lambda temporary: save_file(held, temporary, metadata=metadata))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, whoever wrote it, as `safetensors.safe_open` gives it: its tensors are
    views of the file, read when they are touched.

    Raises:
        CheckpointError: missing, or not a readable safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a readable safetensors file (truncated or corrupted: {error}); "
        "copy it again or restore a backup"
    )


def manifest_of(path: Path, metadata: Mapping[str, str]) -> Any:
    """The manifest in a file's metadata.

    Raises:
        CheckpointError: there is none, or it was changed.
    """
    try:
        manifest = json.loads(metadata[_KEY])
    except (KeyError, json.JSONDecodeError):
        raise CheckpointError(
            f"{path}: a safetensors file, but it has no Stepsmith manifest; it was written by "
            "another program"
        ) from None
    # Files from before the digest was written lack it.
    digest = _sha256(metadata[_KEY])
    if metadata.get(_DIGEST, digest) != digest:
        raise CheckpointError(
            f"{path}: the manifest was changed or corrupted after saving; use the original file"
        )
    return manifest


def read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote.

    Args:
        path: the file.
        kind: the manifest's `kind` must be this, such as `"rule"`.

    Raises:
        CheckpointError: missing, truncated, corrupted, not Stepsmith's, of another kind, or with
            tensors that do not match the manifest.
    """
    path = Path(path)
    try:
        with opened(path) as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except CheckpointError:
        raise
    except ValueError as error:
        raise _unreadable(path, error) from None
    manifest = manifest_of(path, metadata)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(f"{path}: holds a {found!r}, not a {kind!r}")
    if manifest.get("fingerprint") != fingerprint(tensors):
        raise CheckpointError(
            f"{path}: the manifest does not match the weights (they were changed or mixed up "
            "after saving); use the original file"
        )
    return tensors, manifest
