"""Where named data come from: a local directory, the Hugging Face hub, or this package's sample."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from stepsmith.tasks.image_files import DataNotFound
from stepsmith.tasks.image_hub import HubUnavailable

SOURCES = ("auto", "directory", "hub", "sample")

_PART = r"[A-Za-z0-9][\w.-]*"
_log = logging.getLogger("stepsmith")
_noticed: set[str] = set()  # sets whose sample has been announced in this process

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Library(Generic[Kind]):
    """Sets of one kind, images or texts, and how each source is read.

    Args:
        what: a set of this kind, for messages.
        unit: what a set holds many of.
        looks_for: which files make a folder one of its sets.
        known: names of the sets known by name.
        holds: whether a folder holds a set of this kind.
        find: the folder of a set in or under a data directory, or None.
        folder: the name a set's folder has.
        read_folder, read_hub, read_sample: read a set; `read_hub` raises HubUnavailable.
        has_sample: whether a sample of it comes with this package.
        counts: of a set, its training and test examples.
    """

    what: str
    unit: str
    looks_for: str
    known: Collection[str]
    holds: Callable[[Path], bool]
    find: Callable[[str, Path], Path | None]
    folder: Callable[[str], str]
    read_folder: Callable[[str, Path], Kind]
    read_hub: Callable[[str], Kind]
    read_sample: Callable[[str], Kind]
    has_sample: Callable[[str], bool]
    counts: Callable[[Kind], tuple[int, int]]

    def load(self, name: str, source: str, root: Path | None) -> Kind:
        """The set from a source; from the first that has it, in the order directory, hub, sample,
        where that is `"auto"`, with one line in the log where it comes down to the sample.

        Args:
            name: as in `known`, ``owner/name`` on the hub, or a folder's name.
            source: one of `SOURCES`.
            root: the data directory, or None.

        Raises:
            DataNotFound: an unknown name, or a set that no place has.
            DataError: a set that is not readable.
        """
        folder = None if root is None or not is_name(name) else self.find(name, root)
        if (name not in self.known and "/" not in name and folder is None) or not is_name(name):
            raise DataNotFound(self._unknown(name, root))
        if source == "sample":
            return self.read_sample(name)
        if source == "hub":
            return self.read_hub(name)
        place = self.folder(name)
        missing = (
            f"{root} holds no {name} (looked for {place}/ with {self.looks_for})"
            if root
            else "no data directory given (data_dir= or STEPSMITH_DATA_DIR)"
        )
        if source == "directory" and folder is None:
            raise DataNotFound(
                f"{name}: {missing}; pass data_dir= the directory that holds {place}/"
            )
        if folder is not None:
            return self.read_folder(name, folder)
        try:
            return self.read_hub(name)
        except HubUnavailable as error:
            reason = str(error).removeprefix(f"{name}: ").partition(";")[0]
        if not self.has_sample(name):
            raise DataNotFound(
                f"{name}: {missing}; {reason}; no sample of it comes with this package; put its "
                f"files in DIR/{place}/ and pass data_dir=DIR, or connect (with pip install "
                "datasets)"
            )
        sample = self.read_sample(name)
        if name not in _noticed:
            _noticed.add(name)
            _log.warning(
                "%s: using the bundled sample, %d training and %d test %s (%s; %s); for the whole "
                "set pass data_dir=DIR or set STEPSMITH_DATA_DIR=DIR, where DIR/%s/ holds its "
                "files, or connect to the hub (with pip install datasets)",
                *(name, *self.counts(sample), self.unit, missing, reason, place),
            )
        return sample

    def _unknown(self, name: str, root: Path | None) -> str:
        found = root.iterdir() if root and root.is_dir() else ()
        local = sorted(path.name for path in found if self.holds(path))
        names = list(dict.fromkeys([*self.known, *local]))
        near = difflib.get_close_matches(name.lower(), names, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        place = f"a folder in {root}" if root else "the name of a folder in data_dir"
        return (
            f"unknown {self.what} {name!r}: {guess}known are {', '.join(names)}, {place}, or "
            "OWNER/NAME"
        )


def is_name(name: str) -> bool:
    """Whether it can be the name of a set, or of one on the hub (``owner/name``)."""
    return re.fullmatch(f"{_PART}(/{_PART})?", name) is not None


def known_spelling(name: str, known: Collection[str]) -> str:
    """The name as `known` spells it, where only dashes and capitals differ."""
    plain = re.sub(r"[-_ ]", "", name).lower()
    return next((key for key in known if re.sub(r"[-_ ]", "", key) == plain), name)


def spellings(name: str) -> tuple[str, ...]:
    """What its folder may be called."""
    return name, name.replace("_", "-"), name.replace("-", "_")


def data_root(owner: str, source: str, data_dir: str | os.PathLike[str] | None) -> Path | None:
    """The data directory: the one given, that of ``STEPSMITH_DATA_DIR``, or none.

    Raises:
        ValueError: unknown `source`, in the name of `owner`.
    """
    if source not in SOURCES:
        raise ValueError(f"{owner}: source must be one of {', '.join(SOURCES)}, got {source!r}")
    root = data_dir or os.environ.get("STEPSMITH_DATA_DIR") or None
    return Path(root).expanduser().absolute() if root else None
