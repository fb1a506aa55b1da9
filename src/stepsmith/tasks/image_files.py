"""Image files of a split, decoded into bytes: parquet, idx, folders of images.

Shape letters: N = images, C = channels (1 grey, 3 RGB), H = height, W = width, in pixels.
"""

from __future__ import annotations

import functools
import io
import json
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label")


class DataError(ValueError):
    """A data set could not be found or read; the message is one line and says what to do."""


class DataNotFound(DataError):
    """None of the places that were looked at has the set."""


Split = tuple[np.ndarray, np.ndarray, "Sequence[str] | None"]
"""Images (N, C, H, W) uint8, labels (N,) int64, and the classes where the files name them."""


def holds_images(folder: Path) -> bool:
    """Whether a folder holds a set in one of the formats read here."""
    patterns = ("train*.parquet", "test*.parquet", "*-images-idx3*")
    splits = (folder / "train", folder / "test")
    return any(any(folder.glob(p)) for p in patterns) or any(_subfolders(s) for s in splits)


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def read_split(folder: Path, split: str) -> Split:
    """The split (`train` or `test`) of the set in a folder, whatever its format.

    Raises:
        DataError: missing, damaged or ill-fitting files.
    """
    if any(folder.glob("train*.parquet")) or any(folder.glob("test*.parquet")):
        return read_parquet(folder, split)
    if any(folder.glob("*-images-idx3*")):
        return _read_idx(folder, split)
    return _read_image_folder(folder, split)


def read_parquet(folder: Path, split: str, pattern: str = "{}*.parquet") -> Split:
    """The split in all parquet files of the pattern, as Hugging Face `datasets` writes them."""
    files = sorted(folder.glob(pattern.format(split)))
    if not files:
        raise DataError(f"{folder}: no {pattern.format(split)}; put the {split} split there")
    rows: list[tuple[str, bytes | Path]] = []
    labels: list[np.ndarray] = []
    classes = None
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                image = _column(path, schema, _IMAGE_COLUMNS)
                label = _column(path, schema, _LABEL_COLUMNS)
                table = file.read(columns=[image, label])
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable parquet file ({one_line(error)})") from None
        more, some = table_rows(str(path), table, image, label, folder)
        rows += more
        labels.append(some)
        classes = classes or _class_names(schema, label)
    return decode_all(rows, f"{folder}/{split}"), np.concatenate(labels), classes


def _column(path: Path, schema: pa.Schema, names: Iterable[str]) -> str:
    found = [name for name in names if name in schema.names]
    if not found:
        raise DataError(f"{path}: needs a column {' or '.join(names)}, has {schema.names}")
    return found[0]


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Class names from the metadata that Hugging Face `datasets` writes, if they are there."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return None


def _read_idx(folder: Path, split: str) -> Split:
    stem = {"train": "train", "test": "t10k"}[split]
    images_path, images = _parse_idx(folder, f"{stem}-images-idx3-ubyte", dims=3)
    labels_path, labels = _parse_idx(folder, f"{stem}-labels-idx1-ubyte", dims=1)
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path}: {len(labels)} labels but {images_path.name} has {len(images)} images"
        )
    return images[:, None], labels.astype(np.int64), None


def _parse_idx(folder: Path, name: str, dims: int) -> tuple[Path, np.ndarray]:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise DataError(f"{folder / name}: no such file, nor with .gz; all four idx files must be")
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            # Unlike gzip.open, this gives what a truncated file still holds, to be counted below.
            data = zlib.decompressobj(wbits=31).decompress(data)
    except (OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}); fetch it again") from None
    header = 4 + 4 * dims
    want, magic = 0x0800 + dims, int.from_bytes(data[:4], "big")
    if len(data) >= 4 and magic != want:
        raise DataError(
            f"{path}: magic number must be 0x{want:08x} (unsigned bytes, {dims} dimensions), "
            f"got 0x{magic:08x}"
        )
    if len(data) < header:
        raise DataError(f"{path}: truncated, expected {header} bytes of header, got {len(data)}")
    shape = struct.unpack(f">{dims}I", data[4:header])
    # Python integers: the product of three damaged dimensions may pass 2^64.
    expected = header + functools.reduce(lambda a, b: a * b, shape)
    if len(data) != expected:
        raise DataError(
            f"{path}: truncated or damaged, expected {expected} bytes for shape "
            f"{'x'.join(map(str, shape))}, got {len(data)}; fetch it again"
        )
    return path, np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def _read_image_folder(folder: Path, split: str) -> Split:
    classes, present = _subfolders(folder / "train"), _subfolders(folder / split)
    if not present:
        raise DataError(f"{folder / split}: no class folders; expected {split}/CLASS/*.png")
    if strange := sorted(set(present) - set(classes)):
        raise DataError(f"{folder / split / strange[0]}: no such class among the training folders")
    rows: list[tuple[str, bytes | Path]] = []
    labels: list[int] = []
    for name in present:
        files = sorted((folder / split / name).iterdir())
        files = [p for p in files if p.suffix.lower() in _IMAGE_SUFFIXES]
        rows += [(str(p), p) for p in files]
        labels += [classes.index(name)] * len(files)
    return decode_all(rows, str(folder / split)), np.array(labels, np.int64), classes


def _decode(where: str, source: bytes | Path, likely: str | None = None) -> np.ndarray:
    """(C, H, W) uint8 from one encoded image, probably in the `likely` format."""
    try:
        with _open(source, likely) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of mode {image.mode} do not fit in 8 bits")
            mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
            data = (image if image.mode == mode else image.convert(mode)).tobytes()
            pixels = np.frombuffer(data, np.uint8).reshape(image.height, image.width, -1)
            return pixels.transpose(2, 0, 1)
    # Pillow's decoders raise many kinds (SyntaxError, struct.error, ...) on damaged bytes.
    except Exception as error:
        raise DataError(
            f"{where}: cannot decode this image ({one_line(error)}); replace it"
        ) from None


def _open(source: bytes | Path, likely: str | None) -> Image.Image:
    def opened(formats: list[str] | None) -> Image.Image:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        return Image.open(file, formats=formats)

    # Pillow tries its formats one after another, which takes longer than to decode a small image.
    try:
        return opened([likely] if likely else None)
    except UnidentifiedImageError:
        return opened(None)


def _format(source: bytes | Path) -> str | None:
    """The format to try first on images like this one, or None."""
    try:
        with _open(source, None) as image:
            # Some formats are opened under the name of another (MPO as JPEG).
            return image.format if image.format in Image.OPEN else None
    # Whatever is wrong with it, decoding will say so, and where.
    except Exception:
        return None


def decode_all(rows: Sequence[tuple[str, bytes | Path]], origin: str) -> np.ndarray:
    """(N, C, H, W) uint8 from (where, encoded image) pairs."""
    if not rows:
        raise DataError(f"{origin}: holds no images")
    first, likely = _decode(*rows[0]), _format(rows[0][1])
    images = np.empty((len(rows), *first.shape), np.uint8)

    def fill(begin: int) -> None:
        for place, (where, source) in enumerate(rows[begin : begin + 256], begin):
            image = _decode(where, source, likely)
            if image.shape != first.shape:
                raise DataError(
                    f"{where}: image is {dimensions(image.shape)} but {rows[0][0]} is "
                    f"{dimensions(first.shape)}; all images of a set must have one shape"
                )
            images[place] = image

    # Small images spend their time in Python, where threads only contend: 145 us an image with two
    # against 112 with one (28x28). A future per image would cost as much as decoding it.
    threads = min(8, os.cpu_count() or 1) if first.size > 3 * 64 * 64 else 1
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(fill, range(0, len(rows), 256)):
            pass
    return images


def table_rows(
    where: str, table: pa.Table, image: str, label: str, base: Path
) -> tuple[list[tuple[str, bytes | Path]], np.ndarray]:
    """Encoded images and labels of a table; a path without bytes is taken relative to `base`."""
    kind = table.schema.field(image).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise DataError(f"{where}: column {image!r} must be struct{{bytes, path}}, got {kind}")
    fields = table.select([image]).flatten()
    data: list[bytes | None] = fields[f"{image}.bytes"].to_pylist()
    paths: list[str | None] = [None] * len(data)
    if kind.get_field_index("path") >= 0:
        paths = fields[f"{image}.path"].to_pylist()
    rows: list[tuple[str, bytes | Path]] = []
    for i, (content, path) in enumerate(zip(data, paths, strict=True)):
        if content is not None:
            rows.append((f"{where} row {i}", content))
        elif path is not None:
            rows.append((f"{where} row {i}", base / path))
        else:
            raise DataError(f"{where} row {i}: neither image bytes nor a path; remove the row")
    labels = table[label]
    if not pa.types.is_integer(labels.type) or labels.null_count:
        got = f"{labels.type} with {labels.null_count} empty rows"
        raise DataError(f"{where}: column {label!r} must be integers without gaps, got {got}")
    return rows, labels.to_numpy().astype(np.int64)


def dimensions(shape: Iterable[int]) -> str:
    """A shape as text: 3x32x32."""
    return "x".join(map(str, shape))


def one_line(error: BaseException) -> str:
    """What an error says, on one line and not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__
