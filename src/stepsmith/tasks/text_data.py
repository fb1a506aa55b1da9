"""Sentences for language tasks, held in memory.

A set comes from a local directory, from the Hugging Face hub or from the sample in this package.
A directory holds a set as parquet (``train*.parquet``, ``test*.parquet``, a column of strings) or
as text (``train.txt``, ``test.txt``, one sentence a line, UTF-8; or UTF-16 or UTF-32 that begins
with a byte-order mark). A line ends at a line feed, a carriage return or both, nowhere else.
Without a split called test, the one called validation (valid, val) is tested on; beside it, it is
not read.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from stepsmith.tasks.files import (
    DataError,
    DataNotFound,
    Listing,
    named,
    one_line,
    regular,
    require_room,
)
from stepsmith.tasks.image_hub import HubUnavailable, hub_splits
from stepsmith.tasks.parquet import parquet_files, read_batches, read_schema
from stepsmith.tasks.sources import (
    Library,
    data_root,
    known_spelling,
    named_folders,
    plain,
    required_source,
)

COLUMNS = ("text", "sentence")
"""Columns looked for where none is named; a single column of strings will do too."""

_SAMPLE_DIR = Path(__file__).resolve().parents[1] / "data" / "text"


@dataclass(frozen=True)
class KnownText:
    """A set known by a short name: its folder, its column, and its place on the hub."""

    folder: str
    column: str
    hub_id: str
    revision: str | None


# The hub's main branch of E2E is a loading script, which `datasets` no longer runs; the hub keeps
# its own conversion to parquet on this branch.
_E2E = ("tuetschek/e2e_nlg", "refs/convert/parquet")
KNOWN_TEXTS = {
    "e2e": KnownText("e2e", "human_reference", *_E2E),
    "e2e-mr": KnownText("e2e", "meaning_representation", *_E2E),
}


@dataclass(frozen=True)
class TextSet:
    """The sentences of a training and a test split.

    Args:
        name: what the set was asked for as, in its known spelling where it has one.
        origin: where it came from: ``directory:PATH``, ``hub:OWNER/NAME@COMMIT`` or ``sample``.
        train: sentences.
        test: sentences.

    Raises:
        ValueError: a split is empty or holds something else than sentences.
    """

    name: str
    origin: str
    train: tuple[str, ...] = field(repr=False)
    test: tuple[str, ...] = field(repr=False)

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            sentences: tuple[str, ...] = getattr(self, split)
            if not isinstance(sentences, tuple) or not sentences:
                raise ValueError(f"{self.name}: {split} must be a tuple of at least one sentence")
            for i, sentence in enumerate(sentences):
                if not isinstance(sentence, str) or not sentence.strip():
                    raise ValueError(
                        f"{self.name}: {split} sentence {i} must be a string that is not blank, "
                        f"got {sentence!r}"
                    )


def load_text(
    name: str,
    *,
    source: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
    column: str | None = None,
    revision: str | None = None,
    cache: bool = True,
) -> TextSet:
    """Load a set of sentences into memory.

    White space within a sentence becomes single blanks; of equal sentences of a split the first is
    kept, so that what is held out of meta-training was never seen there. A test sentence may still
    occur in training too (in E2E 23 of 4,532 references do).

    A split may take 2 GiB; the environment variable ``STEPSMITH_DATA_LIMIT_GIB`` changes the limit.

    Args:
        name: ``e2e`` (the references of the E2E set, sentences about restaurants), ``e2e-mr`` (its
            meaning representations, lists of attributes), ``owner/name`` on the hub, or the name of
            a folder in the data directory. Both known sets lie in the folder ``e2e``.
        source: ``"directory"``, ``"hub"`` and ``"sample"`` (4,000 training and 500 test sentences
            of either known set, in this package) read only there. ``"auto"`` takes the first that
            has the set, in that order, and logs one line where it comes down to the sample.
        data_dir: holds the set in a folder of its name, or holds its files directly; the
            environment variable ``STEPSMITH_DATA_DIR`` where not given. With ``"auto"`` too, what
            is named here must be there. Not read for ``"hub"`` and ``"sample"``.
        column: of parquet files and hub sets; by default a known set's own, `COLUMNS`, or the only
            column of strings.
        revision: commit or branch of the set on the hub, which it then comes from; by default a
            known set's own, else the newest when the set was first loaded here.
        cache: keep the sentences in this process and hand them out again.

    Raises:
        ValueError: unknown `source`, an empty `data_dir`, or a `revision` of another source.
        DataError: unknown `name`, or the set is not found, not readable or above the limit.

    Source: Novikova, Dusek and Rieser 2017, "The E2E Dataset", arXiv:1706.09254.

    Example:
        >>> text = load_text("e2e", source="sample")
        >>> len(text.train), len(text.test)
        (4000, 500)
    """
    path = data_root("load_text", source, data_dir)
    source = required_source("load_text", source, revision)
    return (_load_cached if cache else _load)(
        known_spelling(name, KNOWN_TEXTS), source, path, column, revision
    )


def _load(
    name: str, source: str, root: Path | None, column: str | None, revision: str | None = None
) -> TextSet:
    known = KNOWN_TEXTS.get(name)
    column = column or (known.column if known else None)
    library = dataclasses.replace(
        _LIBRARY,
        read_folder=functools.partial(_read_folder, column=column),
        read_hub=functools.partial(_read_hub, column=column, revision=revision),
        read_sample=functools.partial(_load_sample, column=column),
    )
    return library.load(name, source, root)


_load_cached = functools.lru_cache(maxsize=8)(_load)


def _holds_text(folder: Path, *, plain: bool = True) -> bool:
    names = [name.lower() for name in Listing.of(folder).files]
    tables = any(n.startswith(("train", "test")) and n.endswith(".parquet") for n in names)
    return tables or (plain and any(n in ("train.txt", "test.txt") for n in names))


def _find_folder(name: str, root: Path) -> Path | None:
    known = KNOWN_TEXTS.get(name)
    for folder in named_folders(root, name, KNOWN_TEXTS):
        if _holds_text(folder):
            return folder
    # Lines of text have no columns: those in e2e/ are the references.
    if known and _holds_text(root / known.folder, plain=False):
        return root / known.folder
    own = {plain(name), plain(known.folder if known else name)}
    # Files lying in e2e/ are not another set, whatever they are asked for as.
    if plain(root.name) in {plain(k.folder) for k in KNOWN_TEXTS.values()} - own:
        return None
    lines = known is None or root.name.lower() != known.folder or known.folder == name
    return root if _holds_text(root, plain=lines) else None


def _read_folder(name: str, folder: Path, column: str | None) -> TextSet:
    train, test = (_read_split(folder, split, column) for split in ("train", "test"))
    return TextSet(name, f"directory:{folder}", train, test)


def _read_split(folder: Path, split: str, column: str | None) -> tuple[str, ...]:
    if files := parquet_files(folder, split):
        values = (value for path in files for value in _values(path, column))
        return _distinct(values, f"{folder}/{split}*.parquet")
    found = named(Listing.of(folder).files, split, r"{}\.txt", folder)
    if not found:
        raise DataError(f"{folder}: no {split}*.parquet and no {split}.txt; put the split there")
    return _distinct(_lines(folder / found[0]), str(folder / found[0]))


# The longer first: the mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _lines(path: Path) -> Iterator[str]:
    require_room(path, regular(path), "its text")
    try:
        with path.open("rb") as file:
            begin = file.read(4)
        encoding = next((name for mark, name in _MARKS if begin.startswith(mark)), "utf-8")
        # Universal newlines: str.splitlines would break at form feeds and at U+2028 too.
        with path.open(encoding=encoding) as text:
            for line in text:
                if "\0" in line:
                    raise DataError(
                        f"{path}: not readable as UTF-8 text (it holds zeros); save it as UTF-8"
                    )
                yield line
    except (OSError, UnicodeError, MemoryError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text ({one_line(error)})") from None


def _values(path: Path, column: str | None) -> Iterator[str | None]:
    column = _column(str(path), read_schema(path), column)
    for batch in read_batches(path, [column]):
        for value in batch.column(0):
            yield value.as_py()


def _column(where: str, schema: pa.Schema, wanted: str | None) -> str:
    strings = [
        entry.name
        for entry in schema
        if pa.types.is_string(entry.type) or pa.types.is_large_string(entry.type)
    ]
    found = [name for name in ((wanted,) if wanted else COLUMNS) if name in strings]
    if not found and wanted is None and len(strings) == 1:
        found = strings
    if not found:
        need = repr(wanted) if wanted else " or ".join(map(repr, COLUMNS))
        raise DataError(
            f"{where}: needs a column {need} of strings, has {strings or 'none'} among "
            f"{schema.names}; pass column="
        )
    return found[0]


def _distinct(sentences: Iterable[str | None], where: str) -> tuple[str, ...]:
    # Files that were joined have byte-order marks within.
    joined = (" ".join((sentence or "").lstrip("\ufeff").split()) for sentence in sentences)
    try:
        distinct = tuple(sentence for sentence in dict.fromkeys(joined) if sentence)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not readable as UTF-8 text ({one_line(error)})") from None
    if not distinct:
        raise DataError(f"{where}: holds no sentences")
    return distinct


def _read_hub(name: str, column: str | None, revision: str | None = None) -> TextSet:
    known = KNOWN_TEXTS.get(name)
    if known is None and "/" not in name:
        raise HubUnavailable(f"{name}: no hub set of this name is known; pass OWNER/NAME")
    hub_id, own = (known.hub_id, known.revision) if known else (name, None)
    origin, *parts = hub_splits(name, hub_id, revision or own)
    sentences = []
    for part in parts:
        where = f"{origin} {part.split}"
        chosen = _column(where, part.data.schema, column)
        tables = part.select_columns([chosen]).with_format("arrow")
        require_room(where, tables.data.nbytes, f"column {chosen}")
        values = (
            value
            for begin in range(0, len(part), 1024)
            for value in tables[begin : begin + 1024][chosen].to_pylist()
        )
        sentences.append(_distinct(values, where))
    return TextSet(name, origin, *sentences)


def _load_sample(name: str, column: str | None) -> TextSet:
    known = KNOWN_TEXTS.get(name)
    if known is None:
        have = ", ".join(KNOWN_TEXTS)
        raise DataNotFound(f"{name}: no bundled sample, only of {have}; use other sources")
    files = [_SAMPLE_DIR / f"{known.folder}_{split}.parquet" for split in ("train", "test")]
    train, test = (_distinct(_values(path, column), str(path)) for path in files)
    return TextSet(name, "sample", train, test)


_LIBRARY = Library[TextSet](
    what="text set",
    unit="sentences",
    looks_for="train*.parquet or train.txt",
    known=KNOWN_TEXTS,
    holds=_holds_text,
    find=_find_folder,
    folder=lambda name: KNOWN_TEXTS[name].folder if name in KNOWN_TEXTS else name,
    read_folder=functools.partial(_read_folder, column=None),
    read_hub=functools.partial(_read_hub, column=None),
    read_sample=functools.partial(_load_sample, column=None),
    has_sample=lambda name: name in KNOWN_TEXTS,
    counts=lambda texts: (len(texts.train), len(texts.test)),
    origin=lambda texts: texts.origin,
)
