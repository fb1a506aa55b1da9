"""Images and labels in idx files, the form of MNIST and its kin.

Shape letters: N = images, H = height, W = width, in pixels.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from stepsmith.tasks.files import DataError, Listing, one_line, regular, require_room

_STEMS = {"train": "train", "test": "t10k|test"}
_NAME = r"({})[-_.]{}[-_.]idx{}[-_.]?ubyte(\.gz)?"
_PIECE = 2**20  # bytes read at once
_RATIO = 1032  # by which deflate makes a file smaller at best


def holds_idx(folder: Path) -> bool:
    """Whether a folder holds images as idx files of any customary name."""
    form = _NAME.format("|".join(_STEMS.values()), "images", 3)
    return any(re.fullmatch(form, name, re.I) for name in Listing.of(folder).files)


def read_idx(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, 1, H, W) uint8 images and (N,) int64 labels of a split in a folder.

    Raises:
        DataError: missing or damaged files, or ones larger than the limit (`require_room`).
    """
    images_path, images = _parse(folder, split, "images", dims=3)
    labels_path, labels = _parse(folder, split, "labels", dims=1)
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path}: {len(labels)} labels but {images_path.name} has {len(images)} images"
        )
    return images[:, None], labels.astype(np.int64)


def _find(folder: Path, split: str, what: str, dims: int) -> Path:
    form = _NAME.format(_STEMS[split], what, dims)
    names = [name for name in Listing.of(folder).files if re.fullmatch(form, name, re.I)]
    if not names:
        path = folder / f"{_STEMS[split].split('|')[0]}-{what}-idx{dims}-ubyte"
        raise DataError(f"{path}: no such file, nor with .gz; all four idx files must be")
    return folder / min(names, key=lambda name: (name.lower().endswith(".gz"), name))


def _parse(folder: Path, split: str, what: str, dims: int) -> tuple[Path, np.ndarray]:
    path = _find(folder, split, what, dims)
    size, zipped = regular(path), path.suffix.lower() == ".gz"
    try:
        with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) if zipped else raw as file:
            return path, _array(path, _pieces(file), dims, size, zipped)
    except (OSError, zlib.error, MemoryError) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}); fetch it again") from None


def _pieces(file: Any) -> Iterator[bytes]:
    try:
        while piece := file.read1(_PIECE):
            yield piece
    except EOFError:  # the end of a truncated gzip file: what it still holds is counted
        return


def _array(path: Path, pieces: Iterator[bytes], dims: int, size: int, zipped: bool) -> np.ndarray:
    """The numbers after the header, whose promise is held against the file before it is trusted."""
    header, begin = 4 + 4 * dims, b""
    while len(begin) < header and (piece := next(pieces, b"")):
        begin += piece
    want, magic = 0x0800 + dims, int.from_bytes(begin[:4], "big")
    if len(begin) >= 4 and magic != want:
        raise DataError(
            f"{path}: magic number must be 0x{want:08x} (unsigned bytes, {dims} dimensions), "
            f"got 0x{magic:08x}"
        )
    if len(begin) < header:
        raise DataError(f"{path}: truncated, expected {header} bytes of header, got {len(begin)}")
    shape = struct.unpack(f">{dims}I", begin[4:header])
    # Python integers: the product of three damaged dimensions may pass 2^64.
    count, form = math.prod(shape), "x".join(map(str, shape))

    def damaged(got: str) -> DataError:
        return DataError(
            f"{path}: truncated or damaged, expected {header + count} bytes for shape {form}, "
            f"got {got}; fetch it again"
        )

    if not zipped and size != header + count:
        raise damaged(str(size))
    if header + count > _RATIO * size:
        raise damaged(f"{size} packed, which cannot hold them")
    require_room(path, count, f"numbers of shape {form}")
    numbers, filled = np.empty(count, np.uint8), 0
    for piece in chain([begin[header:]], pieces):
        filled += len(piece)
        if filled > count:
            raise damaged(f"{header + filled} or more")
        numbers[filled - len(piece) : filled] = np.frombuffer(piece, np.uint8)
    if filled < count:
        raise damaged(str(header + filled))
    return numbers.reshape(shape)
