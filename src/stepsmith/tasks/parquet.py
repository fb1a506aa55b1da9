"""Parquet files of a split, read in pieces that fit in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stepsmith.tasks.files import (
    SPLITS,
    DataError,
    Listing,
    counted,
    named,
    notice,
    one_line,
    regular,
    require_room,
)

# A split's name alone or with the number of a part, as in train-00000-of-00002-0123abc.parquet; a
# train_notes.parquet beside is none.
_PART = r"{}([-_.]?\d[\w.-]*)?\.parquet"
_ROWS = 1024  # of a batch at most
_PIECE = 2**27  # bytes that a batch has at most, where its rows are of one size
_BROKEN = (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError)


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The split's files in a folder, in order; none where it has no parquet files of the split.

    Raises:
        DataError: parts are missing, or the split is there twice.
    """
    names = [name for name in Listing.of(folder).files if name.lower().endswith(".parquet")]
    found = named(names, split, _PART, folder, loose=r"{}.*\.parquet")
    if found:
        others = [n for n in names if n.lower().startswith(split) and n not in found]
        if others:
            notice(
                f"{folder}: the {split} split is {', '.join(found[:3])}; left out "
                f"{counted([(len(others), 'other file')])} ({', '.join(others[:3])})"
            )
    _require_each_part_once(folder, split, found)
    return [folder / name for name in found]


def _require_each_part_once(folder: Path, split: str, names: Sequence[str]) -> None:
    parts = [(int(m[1]), int(m[2])) for n in names if (m := re.search(r"(\d+)-of-(\d+)", n))]
    totals = {total for _, total in parts}
    whole = any(name.lower().removesuffix(".parquet") in SPLITS[split] for name in names)
    if len(totals) > 1 or len(set(parts)) < len(parts) or (whole and len(names) > 1):
        raise DataError(
            f"{folder}: the {split} split is there more than once ({', '.join(names[:4])}); "
            "keep one"
        )
    for total in totals:
        missing = next((i for i in range(total) if (i, total) not in parts), None)
        if missing is not None:
            raise DataError(
                f"{folder}: the {split} split has {len(parts)} of {total} parts, number "
                f"{missing:05} is missing; fetch it"
            )


def read_schema(path: Path) -> pa.Schema:
    """The columns of a file.

    Raises:
        DataError: no readable parquet file.
    """
    regular(path)
    try:
        with pq.ParquetFile(path) as file:
            return file.schema_arrow
    except _BROKEN as error:
        raise _unreadable(path, error) from None


def read_batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a file, a batch of rows at a time; text or bytes may come as dictionaries.

    Raises:
        DataError: no readable parquet file, or columns larger than the limit of `require_room`.
    """
    regular(path)
    try:
        with pq.ParquetFile(path) as file:
            metadata = file.metadata
        rows, shared = _plan(path, metadata, columns)
        with pq.ParquetFile(path, metadata=metadata, read_dictionary=shared) as file:
            yield from file.iter_batches(rows, columns=list(columns))
    except _BROKEN as error:
        raise _unreadable(path, error) from None


def _plan(path: Path, metadata: pq.FileMetaData, columns: Sequence[str]) -> tuple[int, list[str]]:
    """How many rows to read at once, and which columns as dictionaries."""
    rows, total, shared = metadata.num_rows, 0, set[str]()
    require_room(path, 8 * rows, f"{rows} rows")
    for group in range(metadata.num_row_groups):
        for place in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(place)
            if chunk.path_in_schema.partition(".")[0] in columns:
                size = chunk.total_uncompressed_size
                total += size
                # A value of a dictionary is stored once and may stand in every row.
                largest = min(_ROWS, chunk.num_values) * size
                if chunk.physical_type == "BYTE_ARRAY" and chunk.has_dictionary_page:
                    shared |= {chunk.path_in_schema} if largest > _PIECE else set()
    require_room(path, total, f"columns {', '.join(columns)}")
    return max(1, min(_ROWS, _PIECE * rows // max(total, 1))), sorted(shared)


def _unreadable(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path}: not a readable parquet file ({one_line(error)})")
