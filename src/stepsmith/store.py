"""Safetensors with a JSON manifest in the same file, written atomically. Never pickle."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepsmith.names import shown

_KEY = "stepsmith"
_DIGEST = "stepsmith-sha256"

LONGEST_MANIFEST = 2**24
"""Characters of a manifest that a trained rule, a subspace or a snapshot may have. The largest
manifests there are have some ten thousand; a megabyte of JSON takes up to thirty of memory."""

_PART = 2**22
"""Numbers hashed at a time: a tensor of gigabytes is not copied for it."""


_WORKSHOP = ".stepsmith-part-"
"""How folders begin that hold what is being written, or was when its process was killed."""

_LEFT = re.compile(rf"{re.escape(_WORKSHOP)}(\d+)-[a-z0-9_]{{8}}")
_LEFT_BEFORE = re.compile(r"\..+\.(?:safetensors|parquet|json|svg|html)\.(\d+)-\d+")
"""The first versions wrote files `.NAME.PROCESS-THREAD`, without a lock."""

_FRESH, _OLD = 60, 86_400
"""Seconds within which a folder may not be locked yet, and after which nobody writes a file any
more, whoever has the process's number by now."""


_log = logging.getLogger("stepsmith")


class CheckpointError(ValueError):
    """A file that cannot be written, or is not what it should be; the message is one line."""

    def __init__(self, message: str):
        super().__init__(shown(message))


def place(owner: str, path: str | Path) -> Path:
    """A path as someone gave it.

    Raises:
        TypeError: no text and no path.
        ValueError: an empty text, which would stand for the working folder, or one that no file can
            have.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"{owner}: expected the path of a file or folder, got {type(path).__name__}"
        )
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f"{owner}: {text!r} is no path; give that of a file or folder, . for here")
    return Path(path)


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

    A file that is replaced keeps its mode and, where the system lets us, its owner; a link is
    followed. What killed processes left in the folder is removed.

    Raises:
        CheckpointError: the system refused (no space, no permission, no such folder), or something
            other than a file has that name.
    """
    _atomically(path, lambda part: part.write_bytes(data))


def _atomically(path: Path, put: Callable[[Path], object]) -> None:
    try:
        target = Path(os.path.realpath(path, strict=True)) if path.is_symlink() else path
    except FileNotFoundError:  # a link to what is still to be made
        target = Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise _refused(path, error) from None
    try:
        before = target.stat() if target.exists() else None
        if before is not None and not stat.S_ISREG(before.st_mode):
            raise OSError(errno.EINVAL, f"it is a {_kind(before.st_mode)}, not a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target.parent)
        with _workshop(target.parent) as folder:
            part = folder / "part"
            part.touch()
            mode = part.stat().st_mode
            put(part)
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            if before is not None and hasattr(os, "chown"):  # not on Windows
                for owner in ((-1, before.st_gid), (before.st_uid, -1)):
                    with suppress(PermissionError):  # only root gives files away
                        os.chown(part, *owner)
            # safetensors' own files are for their owner alone; ours are as any other.
            part.chmod(mode if before is None else stat.S_IMODE(before.st_mode))
            os.replace(part, target)
    except (OSError, ValueError, SafetensorError) as error:
        raise _refused(path, error) from None
    _sync(target.parent)


def _refused(path: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or str(error)
    return CheckpointError(
        f"{path}: could not be written ({reason}); what was there before is untouched. "
        "Make room or choose another folder."
    )


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket",
        stat.S_ISREG: "file",
    }  # fmt: skip
    return next((name for test, name in kinds.items() if test(mode)), "device")


@contextmanager
def _workshop(parent: Path) -> Iterator[Path]:
    """A folder beside the file to be, for its parts: ours, and those that safetensors makes. A lock
    in it says that its process lives, on this machine or another."""
    folder = Path(tempfile.mkdtemp(prefix=f"{_WORKSHOP}{os.getpid()}-", dir=parent))
    lock = FileLock(folder / "lock")
    try:
        with suppress(OSError, NotImplementedError):  # where there are no locks, none is looked for
            lock.acquire(timeout=0)
        yield folder
    finally:
        lock.release()
        # What stopped the writing is the error to tell; the next save tries again to clean up.
        shutil.rmtree(folder, ignore_errors=True)


def _clean(folder: Path) -> None:
    """Remove what killed processes left. Another process may do the same at once, and one without
    the right to leaves it."""
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        return  # one may write in a folder and not list it
    for entry in entries:
        locked, before = _LEFT.fullmatch(entry.name), _LEFT_BEFORE.fullmatch(entry.name)
        with suppress(OSError, NotImplementedError):  # Timeout, of a lock that is held, is one
            if locked and entry.is_dir(follow_symlinks=False):
                if _gone(entry, int(locked[1]), _FRESH):
                    with FileLock(Path(entry.path) / "lock", timeout=0):
                        pass
                    shutil.rmtree(entry.path)
            elif before and entry.is_file(follow_symlinks=False):
                if not _gone(entry, int(before[1]), _OLD):
                    continue
                os.unlink(entry.path)


def _gone(entry: os.DirEntry[str], process: int, seconds: float) -> bool:
    """Whether a process has ended, or something is older than so many seconds."""
    return not _lives(process) or time.time() - entry.stat().st_mtime > seconds


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # of another user
    return True


def _sync(folder: Path) -> None:
    """Make a new name in a folder outlast a power cut, on systems that open folders."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # one may write in a folder and not read it; the file itself is safe
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise CheckpointError(
                f"{folder}: a file was written there, but may not outlast a power cut "
                f"({error.strerror})"
            ) from None
    finally:
        os.close(opened)


@contextmanager
def claimed(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Keep a folder, which is made where missing, to one writer at a time.

    Args:
        folder: of a run.
        wait: seconds to wait for another one's end.

    Raises:
        CheckpointError: another process or thread has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(folder, error) from None
    lock = FileLock(folder / ".lock", timeout=wait)
    try:
        lock.acquire()
    except Timeout:
        raise CheckpointError(
            f"{folder}: another process is writing there; wait for its end, or choose another "
            "folder"
        ) from None
    except (OSError, NotImplementedError) as error:  # some network file systems know no locks
        _log.warning("%s: cannot be locked (%s); let one process write there", folder, error)
    try:
        yield
    finally:
        lock.release()


_TRIED = 2**16
"""Bytes written to try a folder: a full disk may still take an empty file."""


def require_place(folder: str | Path, use: str) -> None:
    """Try a folder before work begins for it: make it, write a small file there, and undo both.

    Args:
        folder: where something will be saved.
        use: what for, to begin the message with, such as `"--out"`.

    Raises:
        CheckpointError: the folder cannot be made, or nothing can be written there.
        TypeError, ValueError: as `place`.
    """
    folder = place(use, folder)
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
    """The file that something is saved in: `.safetensors` is added where there is no suffix.

    Raises:
        TypeError, ValueError: as `place`.
    """
    path = place("save", path)
    return path if path.suffix or not path.name else path.with_suffix(".safetensors")


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
    except (TypeError, ValueError, RecursionError) as error:
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
    require_file(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def require_file(path: Path) -> None:
    """Check that a path is a file's, before something that may wait for ever is opened.

    Raises:
        CheckpointError: it is not.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read ({reason})") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: no such file; it is a {_kind(mode)}")


def read_json(path: Path) -> Any:
    """What a file of JSON says.

    Raises:
        CheckpointError: missing, or not readable as JSON.
    """
    require_file(path)
    try:
        return parsed(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None


def parsed(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, says something twice, or nests deeper than Python follows.
    """
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it says {twice!r} twice")
    return found


def tensor_of(path: Path, file: Any, name: str) -> Tensor:
    """A tensor of an open file.

    Raises:
        CheckpointError: of a shape that PyTorch cannot have: numbers beyond its own, of a dimension
            beside one of zero.
    """
    try:
        return file.get_tensor(name)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(
        f"{path}: not a readable safetensors file (truncated or corrupted: {reason}); "
        "copy it again or restore a backup"
    )


def manifest_of(path: Path, metadata: Mapping[str, str]) -> Any:
    """The manifest in a file's metadata.

    Raises:
        CheckpointError: there is none, or it was changed.
    """
    if _KEY not in metadata:
        raise CheckpointError(
            f"{path}: a safetensors file, but it has no Stepsmith manifest; it was written by "
            "another program"
        )
    try:
        manifest = parsed(metadata[_KEY])
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its Stepsmith manifest is not readable as JSON ({error}); use the original "
            "file"
        ) from None
    # Files from before the digest was written lack it.
    digest = _sha256(metadata[_KEY])
    if metadata.get(_DIGEST, digest) != digest:
        raise CheckpointError(
            f"{path}: the manifest was changed or corrupted after saving; use the original file"
        )
    return manifest


def read(
    path: Path, kind: str, longest: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote.

    Args:
        path: the file.
        kind: the manifest's `kind` must be this, such as `"rule"`.
        longest: characters the manifest may have; None, as many as the format holds.

    Raises:
        CheckpointError: missing, truncated, corrupted, not Stepsmith's, of another kind, or with
            tensors that do not match the manifest.
    """
    path = Path(path)
    try:
        with opened(path) as file:
            metadata = file.metadata() or {}
            size = len(metadata.get(_KEY, ""))
            if longest is not None and size > longest:
                raise CheckpointError(
                    f"{path}: its manifest has {size:,} characters, that of a {kind} at most "
                    f"{longest:,} (stepsmith.store.LONGEST_MANIFEST); raise it for a file you trust"
                )
            manifest = manifest_of(path, metadata)
            if not isinstance(manifest, dict) or manifest.get("kind") != kind:
                is_one = isinstance(manifest, dict)
                found = manifest.get("kind") if is_one else type(manifest).__name__
                raise CheckpointError(f"{path}: holds a {found!r}, not a {kind!r}")
            tensors = {key: tensor_of(path, file, key) for key in file.keys()}  # noqa: SIM118
    except CheckpointError:
        raise
    except ValueError as error:
        raise _unreadable(path, error) from None
    if manifest.get("fingerprint") != fingerprint(tensors):
        raise CheckpointError(
            f"{path}: the manifest does not match the weights (they were changed or mixed up "
            "after saving); use the original file"
        )
    return tensors, manifest
