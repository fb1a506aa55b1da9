"""Files of a data set: which are looked at, how much is read of them, what is said of the rest."""

from __future__ import annotations

import logging
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT_GIB = 2.0
"""What a split may take in memory by default, in GiB; `STEPSMITH_DATA_LIMIT_GIB` changes it."""

# What systems and tools leave in folders; names that begin with a dot are left out as well.
_SYSTEM = {
    "__macosx", "__pycache__", "@eadir", "#recycle", "#snapshot", "$recycle.bin",
    "system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "validation", "valid", "val"),
}
"""What files and folders of a split may be called; the first that is there is read."""

_log = logging.getLogger("stepsmith")
_said: set[str] = set()


class DataError(ValueError):
    """A data set could not be found or read; the message is one line and says what to do."""


class DataNotFound(DataError):
    """None of the places that were looked at has the set."""


@dataclass(frozen=True)
class Listing:
    """What a folder holds, sorted by name.

    Args:
        folders, files: names, links followed.
        hidden: names of hidden files and folders and of those that systems make.
    """

    folders: list[str]
    files: list[str]
    hidden: list[str]

    @classmethod
    def of(cls, folder: Path) -> Listing:
        """A folder's; an empty one where there is no such folder.

        Raises:
            DataError: a folder that cannot be listed.
        """
        found = cls([], [], [])
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return found
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed ({reason(error)})") from None
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in _SYSTEM:
                found.hidden.append(entry.name)
            elif _is_folder(entry):
                found.folders.append(entry.name)
            else:
                found.files.append(entry.name)
        return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle: whoever opens it says so
        return False


def named(
    names: Iterable[str], split: str, pattern: str, where: Path, loose: str | None = None
) -> list[str]:
    """Those of the first name of a split (`SPLITS`) that has any; it is said where the split for
    testing is called otherwise.

    Args:
        names: of files or folders.
        split: `train` or `test`.
        pattern: a regular expression with `{}` for the split's name; capitals do not matter.
        where: the folder, for what is said.
        loose: one for names that begin with train or test, where none is of the pattern.
    """
    names = list(names)
    for word in SPLITS[split]:
        for form in (pattern, loose if word == split else None):
            found = [n for n in names if form and re.fullmatch(form.format(word), n, re.I)]
            if found:
                if split == "test" and not word.startswith("test"):
                    notice(f"{where}: no split called test, testing on {', '.join(found[:3])}")
                return found
    return []


def regular(path: Path) -> int:
    """The size in bytes of a file that may be opened.

    Raises:
        DataError: no such file; a folder, or a pipe, socket or device, which may never end.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise DataError(f"{path}: must be a file, is {kind}; replace it")
    return status.st_size


def limit() -> int:
    """What a split may take in memory, in bytes.

    Raises:
        DataError: `STEPSMITH_DATA_LIMIT_GIB` is no number above 0.
    """
    text = os.environ.get("STEPSMITH_DATA_LIMIT_GIB") or str(LIMIT_GIB)
    try:
        gib = float(text)
    except ValueError:
        gib = math.nan
    if not 0 < gib < 2**30:
        raise DataError(f"STEPSMITH_DATA_LIMIT_GIB must be a number of GiB above 0, got {text!r}")
    return int(gib * 2**30)


def require_room(where: object, size: int, what: str) -> None:
    """Refuse what would take more memory than `limit`, before it does.

    Raises:
        DataError: it would.
    """
    most = limit()
    if size > most:
        raise DataError(
            f"{where}: {what} would take {size / 2**30:.3g} GiB, and the limit is "
            f"{most / 2**30:.3g}; if you trust it, raise the limit by "
            f"STEPSMITH_DATA_LIMIT_GIB={math.ceil(size / 2**30)}"
        )


def counted(kinds: Iterable[tuple[int, str]]) -> str:
    """Numbers and what they are of, as in 1 deeper folder, 3 files of other formats."""
    words = [
        (n, what if n == 1 else re.sub("file|folder", r"\g<0>s", what, count=1))
        for n, what in kinds
    ]
    return ", ".join(f"{n} {what}" for n, what in words if n)


def suffixes(names: Sequence[str]) -> str:
    """Endings of files with how many there are of each: .gif 3, .txt 1."""
    counts = Counter(Path(name).suffix.lower() or name for name in names)
    most = [f"{suffix} {count}" for suffix, count in counts.most_common(4)]
    return ", ".join([*most, *(["..."] if len(counts) > 4 else [])])


def notice(message: str) -> None:
    """Say it in the log, once in this process."""
    if message not in _said:
        _said.add(message)
        _log.warning("%s", message)


def one_line(error: BaseException) -> str:
    """What an error says, on one line and not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def reason(error: BaseException) -> str:
    """The same without the path, which the message names anyway."""
    return getattr(error, "strerror", None) or one_line(error)
