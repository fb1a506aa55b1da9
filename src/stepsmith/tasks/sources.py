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

from stepsmith.tasks.files import DataError, DataNotFound, Listing, notice, one_line
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
        origin: where a set came from.
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
    origin: Callable[[Kind], str]

    def load(self, name: str, source: str, root: Path | None) -> Kind:
        """The set from a source; from the first that has it, in the order directory, hub, sample,
        where that is `"auto"`, with one line in the log where it comes down to the sample. A data
        directory that was named must hold the set, but for a set called ``owner/name``.

        Args:
            name: as in `known`, ``owner/name`` on the hub, or a folder's name.
            source: one of `SOURCES`.
            root: the data directory, or None.

        Raises:
            DataNotFound: an unknown name, a set that no place has, or a data directory without it.
            DataError: a set that is not readable.
        """
        folder, place = None, self.folder(name)
        if root is not None:
            if source in ("auto", "directory") and not os.path.isdir(root):
                what = "is no folder" if os.path.exists(root) else "does not exist"
                raise DataNotFound(
                    f"{name}: the data directory {root} {what}; pass data_dir= or set "
                    "STEPSMITH_DATA_DIR to one that holds it, or leave out both"
                )
            folder = self.find(name, root) if is_name(name) else None
        mine = root is not None and is_name(name) and os.path.isdir(root / name)
        if not is_name(name) or not (name in self.known or "/" in name or folder or mine):
            raise DataNotFound(self._unknown(name, root))
        if source == "sample":
            return self.read_sample(name)
        if source == "hub":
            return self._noted(self.read_hub(name))
        if folder is not None:
            return self._noted(self.read_folder(name, folder))
        if root is not None and (source == "directory" or "/" not in name):
            raise DataNotFound(
                f"{name}: {root} holds no {name} (looked for {place}/ with {self.looks_for}); pass "
                f"data_dir= the directory that holds {place}/, or another source= than the "
                "directory"
            )
        missing = "no data directory given (data_dir= or STEPSMITH_DATA_DIR)"
        if source == "directory":
            raise DataNotFound(
                f"{name}: {missing}; pass data_dir= the directory that holds {place}/"
            )
        try:
            return self._noted(self.read_hub(name))
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

    def _noted(self, found: Kind) -> Kind:
        train, test = self.counts(found)
        if test > train:
            notice(
                f"{self.origin(found)}: {train} training and {test} test {self.unit}; are the "
                "splits exchanged?"
            )
        return found

    def _held(self, folder: Path) -> bool:
        try:
            return self.holds(folder)
        except DataError:  # a folder that may not be listed is nobody's set
            return False

    def _unknown(self, name: str, root: Path | None) -> str:
        folders = Listing.of(root).folders if root else []
        local = [folder for folder in folders if root and self._held(root / folder)]
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
    return next((key for key in known if plain(key) == plain(name)), name)


def plain(name: str) -> str:
    """A name without what may differ in spelling: dashes and capitals."""
    return re.sub(r"[-_ ]", "", name).lower()


def named_folders(root: Path, name: str, known: Collection[str]) -> list[Path]:
    """The folders in a data directory that are called as a set: exactly, or with other dashes; a
    known set's with other capitals too."""
    spelt = (name, name.replace("_", "-"), name.replace("-", "_"))
    found = [root / spelling for spelling in dict.fromkeys(spelt)]
    if name in known:
        found += [root / n for n in Listing.of(root).folders if plain(n) == plain(name)]
    return list(dict.fromkeys(found))


def where_from(origin: str) -> str:
    """Where a set came from for records and manifests, without the reader's own folders: directory,
    sample, or hub with the first digits of the commit."""
    kind, _, rest = origin.partition(":")
    commit = rest.partition("@")[2][:10]
    return f"{kind} {commit}" if kind == "hub" and commit else kind


def data_root(owner: str, source: str, data_dir: str | os.PathLike[str] | None) -> Path | None:
    """The data directory: the one given, that of ``STEPSMITH_DATA_DIR``, or none.

    Raises:
        ValueError: unknown `source`, or a `data_dir` that is no path, in the name of `owner`.
    """
    if source not in SOURCES:
        raise ValueError(f"{owner}: source must be one of {', '.join(SOURCES)}, got {source!r}")
    if data_dir is not None and not os.fspath(data_dir):
        raise ValueError(f"{owner}: data_dir is empty; pass a folder, or None for no folder")
    root = data_dir or os.environ.get("STEPSMITH_DATA_DIR")
    try:
        return Path(root).expanduser().absolute() if root else None
    except RuntimeError as error:  # a home of nobody
        raise DataError(f"{owner}: data_dir {str(root)!r}: {one_line(error)}") from None


def required_source(owner: str, source: str, revision: str | None) -> str:
    """The source, which a revision makes the hub.

    Raises:
        ValueError: a revision of what does not come from the hub.
    """
    if revision and source not in ("auto", "hub"):
        raise ValueError(f"{owner}: revision= is of sets on the hub, source is {source!r}")
    return "hub" if revision else source
