"""Image files of a split, decoded into bytes: parquet, idx, folders of images.

Shape letters: N = images, C = channels (1 grey, 3 RGB), H = height, W = width, in pixels.
"""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from stepsmith.tasks.files import (
    DataError,
    DataNotFound,
    Listing,
    counted,
    named,
    notice,
    one_line,
    regular,
    require_room,
    suffixes,
)
from stepsmith.tasks.idx import holds_idx, read_idx
from stepsmith.tasks.parquet import parquet_files, read_batches, read_schema

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""The formats that Pillow may open, whatever a file is called: some of its others run programs."""

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label")
_PIECE = 2**22  # bytes of encoded images that are handed to a thread at once

Split = tuple[np.ndarray, np.ndarray, "Sequence[str] | None"]
"""Images (N, C, H, W) uint8, labels (N,) int64, and the classes where the files name them."""

Row = tuple[str, "bytes | Path"]
"""Where an encoded image comes from, for errors, and the image."""


def holds_images(folder: Path) -> bool:
    """Whether a folder holds a set in one of the formats read here."""
    return any(_forms(folder))


def _forms(folder: Path) -> tuple[bool, bool, bool]:
    """Whether it holds parquet files, idx files and folders of images."""
    listing = Listing.of(folder)
    tables = [n for n in listing.files if n.lower().endswith(".parquet")]
    return (
        any(n.lower().startswith(("train", "test")) for n in tables),
        holds_idx(folder),
        any(
            Listing.of(folder / name).folders
            for name in listing.folders
            if name.lower() in ("train", "training", "test", "testing")
        ),
    )


def read_split(folder: Path, split: str) -> Split:
    """The split (`train` or `test`) of the set in a folder, whatever its format.

    Raises:
        DataError: missing, damaged or ill-fitting files, or ones that are too large.
    """
    forms = _forms(folder)
    if sum(forms) > 1:
        names = ("parquet files", "idx files", "folders of images")
        have = [name for name, there in zip(names, forms, strict=True) if there]
        notice(f"{folder}: holds {' and '.join(have)}; reading the {have[0]}")
    if forms[0]:
        files = parquet_files(folder, split)
        if not files:
            raise DataError(f"{folder}: no {split}*.parquet; put the {split} split there")
        return read_parquet(files, f"{folder}/{split}")
    if forms[1]:
        return *read_idx(folder, split), None
    return _read_image_folder(folder, split)


def read_parquet(files: Sequence[Path], origin: str) -> Split:
    """The split in all these files, as Hugging Face `datasets` writes them.

    Images without bytes are read from the paths beside them, within the folder of the file.

    Raises:
        DataError: damaged or ill-fitting files, or ones that are too large.
    """
    labels: list[np.ndarray] = []
    images: list[tuple[Path, str]] = []
    classes = None
    for path in files:
        schema = read_schema(path)
        image = _column(path, schema, _IMAGE_COLUMNS)
        label = _column(path, schema, _LABEL_COLUMNS)
        require_columns(str(path), schema, image, label)
        batches = [batch.column(0) for batch in read_batches(path, [label])]
        column = pa.chunked_array(batches, schema.field(label).type)
        labels.append(labels_of(str(path), column, label))
        images.append((path, image))
        classes = classes or _class_names(schema, label)

    def rows() -> Iterator[Row]:
        for path, image in images:
            batches = (batch.column(0) for batch in read_batches(path, [image]))
            yield from image_rows(str(path), batches, [path.parent])

    count = sum(map(len, labels))
    return decode_all(rows(), count, origin), np.concatenate(labels), classes


def _column(path: Path, schema: pa.Schema, names: Iterable[str]) -> str:
    found = [name for name in names if name in schema.names]
    if not found:
        raise DataError(f"{path}: needs a column {' or '.join(names)}, has {schema.names}")
    return found[0]


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Class names from the metadata that Hugging Face `datasets` writes, if they are there."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    named_all = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if named_all else None


def _read_image_folder(folder: Path, split: str) -> Split:
    train, place = (_split_folder(folder, part) for part in ("train", split))
    classes = Listing.of(train).folders
    classes.sort(key=_as_numbers(classes))
    listing = Listing.of(place)
    if not listing.folders:
        raise DataError(f"{place}: no class folders; expected {split}/CLASS/*.png")
    if strange := sorted(set(listing.folders) - set(classes)):
        raise DataError(f"{place / strange[0]}: no such class among the training folders")
    rows: list[Row] = []
    labels: list[int] = []
    hidden, others, deeper = len(listing.hidden), listing.files, 0
    for label, name in enumerate(classes):
        inside = Listing.of(place / name)
        files = [place / name / n for n in inside.files if _is_image(n)]
        rows += [(str(path), path) for path in files]
        labels += [label] * len(files)
        hidden += len(inside.hidden)
        deeper += len(inside.folders)
        others = others + [n for n in inside.files if not _is_image(n)]
    if left_out := counted([
        (len(others), f"file of other formats or places ({suffixes(others)})"),
        (deeper, "folder within class folders"), (hidden, "hidden or system file"),
    ]):  # fmt: skip
        read = ", ".join(sorted(_IMAGE_SUFFIXES))
        notice(f"{place}: left out {left_out}; images are CLASS/NAME of {read}")
    numbers = np.array(labels, np.int64)
    say_lacking(str(place), classes, numbers)
    return decode_all(rows, len(rows), str(place)), numbers, classes


def say_lacking(where: str, classes: Sequence[str], labels: np.ndarray) -> None:
    """Say which classes have no image."""
    lacking = [classes[i] for i in sorted(set(range(len(classes))) - set(labels.tolist()))]
    if lacking:
        more = ", ..." if len(lacking) > 5 else ""
        notice(
            f"{where}: {len(lacking)} of {len(classes)} classes have no image "
            f"({', '.join(lacking[:5])}{more})"
        )


def _split_folder(folder: Path, split: str) -> Path:
    found = named(Listing.of(folder).folders, split, "{}", folder)
    return folder / (found[0] if found else split)


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in _IMAGE_SUFFIXES


def _as_numbers(names: Sequence[str]) -> Callable[[str], tuple[int, str]]:
    """The key that sorts classes: 2 before 10 where all of them are numbers, else as text."""
    numbers = all(name.isascii() and name.isdecimal() for name in names)
    return (lambda name: (int(name), name)) if numbers else (lambda name: (0, name))


def require_columns(where: str, schema: pa.Schema, image: str, label: str) -> None:
    """Refuse columns that do not hold encoded images and their labels.

    Raises:
        DataError: they do not.
    """
    kind = schema.field(image).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise DataError(f"{where}: column {image!r} must be struct{{bytes, path}}, got {kind}")
    content = kind.field("bytes").type
    path = kind.field("path").type if kind.get_field_index("path") >= 0 else pa.string()
    if not (pa.types.is_binary(content) or pa.types.is_large_binary(content)) or not (
        pa.types.is_string(path) or pa.types.is_large_string(path)
    ):
        raise DataError(
            f"{where}: column {image!r} must be struct{{bytes: binary, path: string}}, got {kind}"
        )
    if not pa.types.is_integer(schema.field(label).type):
        got = schema.field(label).type
        raise DataError(f"{where}: column {label!r} must be integers without gaps, got {got}")


def labels_of(where: str, labels: pa.ChunkedArray, name: str) -> np.ndarray:
    """(N,) int64 labels of a column of integers.

    Raises:
        DataError: rows without one.
    """
    if labels.null_count:
        got = f"{labels.type} with {labels.null_count} empty rows"
        raise DataError(f"{where}: column {name!r} must be integers without gaps, got {got}")
    return labels.to_numpy().astype(np.int64)


def image_rows(where: str, batches: Iterable[pa.Array], bases: Sequence[Path]) -> Iterator[Row]:
    """Encoded images of a column, one by one; a path without bytes is taken relative to the first
    of `bases` and must lie in one of them.

    Raises:
        DataError: a row has neither, or its path leads elsewhere.
    """
    i = 0
    for batch in batches:
        fields = dict(zip([f.name for f in batch.type], batch.flatten(), strict=True))
        paths = fields.get("path")
        for place, content in enumerate(fields["bytes"]):
            row = f"{where} row {i}"
            i += 1
            if content.is_valid:
                yield row, content.as_py()
            elif paths is not None and paths[place].is_valid:
                yield row, _within(row, bases, paths[place])
            else:
                raise DataError(f"{row}: neither image bytes nor a path; remove the row")


def _within(row: str, bases: Sequence[Path], path: pa.Scalar) -> Path:
    try:
        found = (bases[0] / path.as_py()).resolve()
        inside = any(found.is_relative_to(base.resolve()) for base in bases)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{row}: its path cannot be followed ({one_line(error)})") from None
    if not inside:
        raise DataError(
            f"{row}: path {path.as_py()!r} leaves {bases[0]}; put the image there, or its bytes "
            "into the file"
        )
    return found


class _Decoder:
    """Turns encoded images of one shape into arrays; `shape` is that of the first."""

    def __init__(self, where: str, source: bytes | Path):
        self._first = where
        self.animated: list[str] = []  # images with more frames than the one that is taken
        with _opened(where, source, None) as image:
            self.shape = _shape(image)
            # Some formats are opened under the name of another (MPO as JPEG).
            self._likely = image.format if image.format in FORMATS else None

    def decode(self, where: str, source: bytes | Path) -> np.ndarray:
        """(C, H, W) uint8."""
        with _opened(where, source, self._likely) as image:
            shape = _shape(image)
            if shape != self.shape:
                raise DataError(
                    f"{where}: image is {dimensions(shape)} but {self._first} is "
                    f"{dimensions(self.shape)}; all images of a set must have one shape"
                )
            if getattr(image, "is_animated", False) and image.format in FORMATS:
                self.animated.append(where)
            turned = ImageOps.exif_transpose(image) if _orientation(image) > 1 else image
            mode = "L" if shape[0] == 1 else "RGB"
            data = (turned if turned.mode == mode else turned.convert(mode)).tobytes()
        return np.frombuffer(data, np.uint8).reshape(*shape[1:], -1).transpose(2, 0, 1)


@contextmanager
def _opened(where: str, source: bytes | Path, likely: str | None) -> Iterator[Image.Image]:
    """One encoded image, probably in the `likely` format, whose header was read."""
    if isinstance(source, Path):
        require_room(where, regular(source), "an image")
    try:
        with _open(source, likely) as image:
            yield image
    except DataError:
        raise
    # Pillow's decoders raise many kinds (SyntaxError, struct.error, ...) on damaged bytes.
    except Exception as error:
        raise DataError(
            f"{where}: cannot decode this image ({one_line(error)}); replace it"
        ) from None


def _open(source: bytes | Path, likely: str | None) -> Image.Image:
    def opened(formats: Sequence[str]) -> Image.Image:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        return Image.open(file, formats=list(formats))

    # Pillow tries its formats one after another, which takes longer than to decode a small image.
    try:
        return opened([likely] if likely else FORMATS)
    except UnidentifiedImageError:
        return opened(FORMATS)


def _shape(image: Image.Image) -> tuple[int, int, int]:
    """(C, H, W) that it will have, told from its header."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of mode {image.mode} do not fit in 8 bits")
    wide, high = image.size[::-1] if _orientation(image) > 4 else image.size
    return 1 if image.mode in ("1", "L", "LA") else 3, high, wide


def _orientation(image: Image.Image) -> int:
    """How the camera was held, as EXIF numbers it: above 1 the image is to be turned, above 4 its
    sides are exchanged."""
    if "exif" not in image.info:
        return 1
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def decode_all(rows: Iterable[Row], count: int, origin: str) -> np.ndarray:
    """(N, C, H, W) uint8 from encoded images, where N is `count`.

    Raises:
        DataError: an image that cannot be decoded or has another shape, other than `count` images,
            or more than the limit of `require_room`.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{origin}: holds no images")
    with warnings.catch_warnings():
        # A single image of a size that Pillow takes for an attack.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        decoder = _Decoder(*first)
        shape = (count, *decoder.shape)
        require_room(origin, math.prod(shape), f"{count} images of {dimensions(decoder.shape)}")
        try:
            images = np.empty(shape, np.uint8)
        except MemoryError:
            raise DataError(f"{origin}: no memory for {dimensions(shape)} bytes") from None
        done = _fill(images, decoder, chain([first], rows))
    if done != count:
        raise DataError(f"{origin}: {count} labels but {done} images or more")
    if decoder.animated:
        notice(
            f"{origin}: took the first frame of {len(decoder.animated)} animated images "
            f"({decoder.animated[0]}, ...)"
        )
    return images


def _fill(images: np.ndarray, decoder: _Decoder, rows: Iterable[Row]) -> int:
    """Decode images into an array until it is full; how many there were."""

    def fill(begin: int, part: list[Row]) -> None:
        for place, (where, source) in enumerate(part, begin):
            images[place] = decoder.decode(where, source)

    # Small images spend their time in Python, where threads only contend: 145 us an image with two
    # against 112 with one (28x28). A future per image would cost as much as decoding it.
    large = math.prod(decoder.shape) > 3 * 64 * 64
    threads = min(8, os.cpu_count() or 1) if large else 1
    done, waiting = 0, deque[Future[None]]()
    with ThreadPoolExecutor(threads) as pool:
        for part in _parts(rows):
            if done + len(part) > len(images):
                return done + len(part)
            if threads == 1:
                fill(done, part)
            else:
                waiting.append(pool.submit(fill, done, part))
            done += len(part)
            # What waits holds encoded images.
            while len(waiting) > 2 * threads:
                waiting.popleft().result()
        for future in waiting:
            future.result()
    return done


def _parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
    part, size = [], 0
    for row in rows:
        part.append(row)
        size += len(row[1]) if isinstance(row[1], bytes) else 0
        if len(part) == 256 or size > _PIECE:
            yield part
            part, size = [], 0
    if part:
        yield part


def dimensions(shape: Iterable[int]) -> str:
    """A shape as text: 3x32x32."""
    return "x".join(map(str, shape))


__all__ = [
    "DataError", "DataNotFound", "Split", "decode_all", "dimensions", "holds_images", "image_rows",
    "labels_of", "one_line", "read_parquet", "read_split", "require_columns", "say_lacking",
]  # fmt: skip
