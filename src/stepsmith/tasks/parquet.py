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
_PIECE = 2**29  # bytes that a batch may have where each of its rows may be the largest
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
    """Some columns of a file, a batch of rows at a time.

    Raises:
        DataError: no readable parquet file, or columns larger than the limit of `require_room`.
    """
    regular(path)
    try:
        with pq.ParquetFile(path) as file:
            rows = _rows_at_once(path, file.metadata, columns)
            yield from file.iter_batches(rows, columns=list(columns))
    except _BROKEN as error:
        raise _unreadable(path, error) from None


def _rows_at_once(path: Path, metadata: pq.FileMetaData, columns: Sequence[str]) -> int:
    require_room(path, 8 * metadata.num_rows, f"{metadata.num_rows} rows")
    total, largest = 0, 1
    for group in range(metadata.num_row_groups):
        for place in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(place)
            if chunk.path_in_schema.partition(".")[0] in columns:
                total += chunk.total_uncompressed_size
                # Values of a dictionary are stored once and may stand in every row.
                if chunk.has_dictionary_page and chunk.physical_type == "BYTE_ARRAY":
                    largest = max(largest, chunk.total_uncompressed_size)
    require_room(path, total, f"columns {', '.join(columns)}")
    return max(1, min(_ROWS, _PIECE // largest, _PIECE * metadata.num_rows // max(total, 1)))


def _unreadable(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path}: not a readable parquet file ({one_line(error)})")
