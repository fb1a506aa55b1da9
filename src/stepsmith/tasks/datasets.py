"""Image-classification data, held in memory as unsigned bytes.

A set comes from a local directory, from the Hugging Face hub or from the sample in this package.
A directory holds a set as parquet (``train*.parquet``, ``test*.parquet``), as idx
(``train-images-idx3-ubyte`` and its three companions, gzipped or not) or as a folder of images
(``train/CLASS/*.png``, ``test/CLASS/*.png``).

Shape letters: N = images, C = channels (1 grey, 3 RGB), H = height, W = width, in pixels.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import io
import json
import logging
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

SOURCES = ("auto", "directory", "hub", "sample")
PROBE_SECONDS = 3.0  # how long to wait for the hub's first answer

_SAMPLE_DIR = Path(__file__).resolve().parents[1] / "data"
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_log = logging.getLogger("stepsmith")
_noticed: set[str] = set()  # sets whose sample has been announced in this process


class DataError(ValueError):
    """A data set could not be found or read; the message is one line and says what to do."""


class _HubUnavailable(DataError):
    """The hub, or the set on it, cannot be had here: ``source="auto"`` goes on to the sample."""


@dataclass(frozen=True)
class _Known:
    """A set known by a short name: its repository and columns on the hub, and its classes."""

    hub_id: str
    image: str
    label: str
    classes: tuple[str, ...] | None  # None: only the files know


_DIGITS = tuple("0123456789")
# fmt: off
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
            "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer",
            "dog", "frog", "horse", "ship", "truck")
# fmt: on
_KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_KNOWN = {
    "mnist": _Known("ylecun/mnist", "image", "label", _DIGITS),
    "fashion_mnist": _Known("zalando-datasets/fashion_mnist", "image", "label", _FASHION),
    "kmnist": _Known("tanganke/kmnist", "image", "label", _KANA),
    "cifar10": _Known("uoft-cs/cifar10", "img", "label", _CIFAR10),
    "cifar100": _Known("uoft-cs/cifar100", "img", "fine_label", None),
}
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label")


@dataclass(frozen=True, eq=False)  # comparing tensors gives tensors, not a truth value
class ImageSet:
    """A labelled set of images of one shape, with its training and test split.

    Args:
        name: what the set was asked for as, in its known spelling where it has one.
        origin: where it came from: ``directory:PATH``, ``hub:OWNER/NAME`` or ``sample``.
        train_images: (N, C, H, W) uint8, 0 to 255.
        train_labels: (N,) int64, indices into `classes`.
        test_images: (N, C, H, W) uint8; C, H and W as in training.
        test_labels: (N,) int64.
        classes: the name of each class.

    Raises:
        ValueError: shapes, dtypes or labels do not fit together.
    """

    name: str
    origin: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images: Tensor = getattr(self, f"{split}_images")
            labels: Tensor = getattr(self, f"{split}_labels")
            if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
                raise ValueError(
                    f"{self.name}: {split}_images must be uint8 of shape (N, 1 or 3, H, W), "
                    f"got {images.dtype} of shape {tuple(images.shape)}"
                )
            if labels.dtype != torch.int64 or labels.dim() != 1:
                raise ValueError(
                    f"{self.name}: {split}_labels must be int64 of shape (N,), "
                    f"got {labels.dtype} of shape {tuple(labels.shape)}"
                )
            if images.numel() == 0:
                raise ValueError(f"{self.name}: {split}_images holds no pixels")
            if len(images) != len(labels):
                raise ValueError(
                    f"{self.name}: {len(images)} {split} images but {len(labels)} labels"
                )
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"{self.name}: {split}_labels must lie in 0..{self.num_classes - 1} "
                    f"(one per class), got {low}..{high}"
                )
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"{self.name}: training images are {_shape(self.train_images[0])} "
                f"but test images {_shape(self.test_images[0])}"
            )

    @property
    def num_classes(self) -> int:
        """How many classes there are, whether or not each has an image."""
        return len(self.classes)

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set with all its tensors on `device`."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return dataclasses.replace(self, **{n: getattr(self, n).to(device) for n in names})


def load_images(
    name: str,
    *,
    source: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
    cache: bool = True,
) -> ImageSet:
    """Load an image-classification set into memory.

    Args:
        name: a known name (mnist, fashion_mnist, kmnist, cifar10, cifar100; dashes and capitals do
            not matter), ``owner/name`` on the hub, or the name of a folder in the data directory.
        source: ``"directory"``, ``"hub"`` and ``"sample"`` (10,000 training and 2,000 test images
            of mnist or fashion_mnist, in this package) read only there. ``"auto"`` takes the first
            that has the set, in that order, and logs one line where it comes down to the sample.
        data_dir: holds the set in a folder of its name, or holds its files directly; the
            environment variable ``STEPSMITH_DATA_DIR`` where not given. Not read for ``"hub"``
            and ``"sample"``.
        cache: keep the decoded set in this process and hand out the same tensors again: do not
            write to them.

    Returns:
        The set, on the CPU.

    Raises:
        ValueError: unknown `source`.
        DataError: unknown `name`, or the set is not found or not readable.

    Example:
        >>> digits = load_images("mnist", source="sample")
        >>> digits.train_images.shape, digits.num_classes
        (torch.Size([10000, 1, 28, 28]), 10)
    """
    if source not in SOURCES:
        raise ValueError(f"load_images: source must be one of {', '.join(SOURCES)}, got {source!r}")
    root = data_dir or os.environ.get("STEPSMITH_DATA_DIR") or None
    path = Path(root).expanduser().absolute() if root else None
    plain = re.sub(r"[-_ ]", "", name).lower()
    known = next((key for key in _KNOWN if key.replace("_", "") == plain), name)
    return (_load_cached if cache else _load)(known, source, path)


def _load(name: str, source: str, root: Path | None) -> ImageSet:
    is_hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None
    folder = _find_folder(name, root)
    if name not in _KNOWN and not is_hub_name and folder is None:
        raise DataError(_unknown(name, root))
    if source == "sample":
        return _load_sample(name)
    if source == "hub":
        return _load_hub(name)
    missing = (
        f"{root} holds no {name} (looked for {name}/ with train*.parquet, "
        "train-images-idx3-ubyte or train/CLASS/*.png)"
        if root
        else "no data directory given (data_dir= or STEPSMITH_DATA_DIR)"
    )
    if source == "directory" and folder is None:
        raise DataError(f"{name}: {missing}; pass data_dir= the directory that holds {name}/")
    if folder is not None:
        return _load_directory(name, folder)
    try:
        return _load_hub(name)
    except _HubUnavailable as error:
        reason = str(error).removeprefix(f"{name}: ").partition(";")[0]
    if not (_SAMPLE_DIR / f"{name}_train.parquet").exists():
        raise DataError(
            f"{name}: {missing}; {reason}; no sample of it comes with this package; put its files "
            f"in DIR/{name}/ and pass data_dir=DIR, or connect (with pip install 'stepsmith[hub]')"
        )
    sample = _load_sample(name)
    if name not in _noticed:
        _noticed.add(name)
        _log.warning(
            "%s: using the bundled sample, %d training and %d test images (%s; %s); for the whole "
            "set pass data_dir=DIR or set STEPSMITH_DATA_DIR=DIR, where DIR/%s/ holds its files, "
            "or connect to the hub (with pip install 'stepsmith[hub]')",
            *(name, len(sample.train_labels), len(sample.test_labels), missing, reason, name),
        )
    return sample


_load_cached = functools.lru_cache(maxsize=8)(_load)


def _unknown(name: str, root: Path | None) -> str:
    local = [p.name for p in root.iterdir() if _holds_images(p)] if root and root.is_dir() else []
    names = list(dict.fromkeys([*_KNOWN, *sorted(local)]))
    near = difflib.get_close_matches(name.lower(), names, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    place = f"a folder in {root}" if root else "the name of a folder in data_dir"
    return f"unknown data set {name!r}: {guess}known are {', '.join(names)}, {place}, or OWNER/NAME"


# Images (N, C, H, W) uint8, labels (N,) int64, and the classes where the files name them.
_Split = tuple[np.ndarray, np.ndarray, "Sequence[str] | None"]


def _build(name: str, origin: str, train: _Split, test: _Split) -> ImageSet:
    classes = train[2] or test[2] or (_KNOWN[name].classes if name in _KNOWN else None)
    if train[2] and test[2] and list(train[2]) != list(test[2]):
        raise DataError(f"{origin}: training and test files name different classes")
    if classes is None:
        top = max(labels.max(initial=0) for labels in (train[1], test[1]))
        classes = [str(i) for i in range(top + 1)]
    arrays = (np.ascontiguousarray(a) for a in (*train[:2], *test[:2]))
    try:
        return ImageSet(name, origin, *map(torch.from_numpy, arrays), classes=tuple(classes))
    except ValueError as error:
        raise DataError(f"{origin}: {error}") from None


def _shape(image: Tensor | np.ndarray) -> str:
    return "x".join(map(str, image.shape))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# --- decoding -------------------------------------------------------------------------------------


def _decode(where: str, source: bytes | Path) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of mode {image.mode} do not fit in 8 bits")
            mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
            data = (image if image.mode == mode else image.convert(mode)).tobytes()
            pixels = np.frombuffer(data, np.uint8).reshape(image.height, image.width, -1)
            return pixels.transpose(2, 0, 1)
    # Pillow's decoders raise many kinds (SyntaxError, struct.error, ...) on damaged bytes.
    except Exception as error:
        raise DataError(f"{where}: cannot decode this image ({_line(error)}); replace it") from None


def _decode_all(rows: Sequence[tuple[str, bytes | Path]], origin: str) -> np.ndarray:
    """(N, C, H, W) uint8 from (where, encoded image) pairs."""
    if not rows:
        raise DataError(f"{origin}: holds no images")
    # Small images spend their time in Python, where threads only contend: 145 us an image with two
    # against 112 with one (28x28). A future per image would cost as much as decoding it.
    threads = min(8, os.cpu_count() or 1) if _decode(*rows[0]).size > 3 * 64 * 64 else 1
    chunks = [rows[i : i + 256] for i in range(0, len(rows), 256)]
    with ThreadPoolExecutor(threads) as pool:
        decoded = pool.map(lambda chunk: [_decode(*row) for row in chunk], chunks)
        images = [image for chunk in decoded for image in chunk]
    for (where, _), image in zip(rows, images, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"{where}: image is {_shape(image)} but {rows[0][0]} is {_shape(images[0])}; "
                "all images of a set must have one shape"
            )
    return np.stack(images)


def _table_rows(
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


# --- local directory ------------------------------------------------------------------------------


def _holds_images(folder: Path) -> bool:
    patterns = ("train*.parquet", "test*.parquet", "*-images-idx3*")
    splits = (folder / "train", folder / "test")
    return any(any(folder.glob(p)) for p in patterns) or any(_subfolders(s) for s in splits)


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def _find_folder(name: str, root: Path | None) -> Path | None:
    if root is None or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        return None
    for spelling in (name, name.replace("_", "-"), name.replace("-", "_")):
        if _holds_images(root / spelling):
            return root / spelling
    # Files lying in mnist/ are not another known set, whatever they are asked for as.
    if root.name.replace("-", "_") in set(_KNOWN) - {name}:
        return None
    return root if _holds_images(root) else None


def _load_directory(name: str, folder: Path) -> ImageSet:
    if any(folder.glob("train*.parquet")) or any(folder.glob("test*.parquet")):
        read = _read_parquet
    elif any(folder.glob("*-images-idx3*")):
        read = _read_idx
    else:
        read = _read_image_folder
    return _build(name, f"directory:{folder}", read(folder, "train"), read(folder, "test"))


def _read_parquet(folder: Path, split: str, pattern: str = "{}*.parquet") -> _Split:
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
            raise DataError(f"{path}: not a readable parquet file ({_line(error)})") from None
        more, some = _table_rows(str(path), table, image, label, folder)
        rows += more
        labels.append(some)
        classes = classes or _class_names(schema, label)
    return _decode_all(rows, f"{folder}/{split}"), np.concatenate(labels), classes


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


def _read_idx(folder: Path, split: str) -> _Split:
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
        raise DataError(f"{path}: cannot be read ({_line(error)}); fetch it again") from None
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


def _read_image_folder(folder: Path, split: str) -> _Split:
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
    return _decode_all(rows, str(folder / split)), np.array(labels, np.int64), classes


# --- bundled sample and hub -----------------------------------------------------------------------


def _load_sample(name: str) -> ImageSet:
    if not (_SAMPLE_DIR / f"{name}_train.parquet").is_file():
        have = ", ".join(sorted(p.name[:-14] for p in _SAMPLE_DIR.glob("*_train.parquet")))
        raise DataError(f"{name}: no bundled sample, only of {have or 'no set'}; use other sources")
    pattern = f"{name}_{{}}.parquet"
    train = _read_parquet(_SAMPLE_DIR, "train", pattern)
    return _build(name, "sample", train, _read_parquet(_SAMPLE_DIR, "test", pattern))


def _load_hub(name: str) -> ImageSet:
    if name not in _KNOWN and "/" not in name:
        raise _HubUnavailable(f"{name}: no hub set of this name is known; pass OWNER/NAME")
    try:
        import datasets
    except ImportError:
        reason = "package datasets is not installed"
        raise _HubUnavailable(f"{name}: {reason}; pip install 'stepsmith[hub]'") from None
    spec = _KNOWN.get(name)
    hub_id = spec.hub_id if spec else name
    origin = f"hub:{hub_id}"
    splits = _prepared_before(hub_id)
    if splits is None:
        if reason := _hub_out_of_reach():
            raise _HubUnavailable(f"{name}: {reason}; connect or use a directory")
        try:
            splits = datasets.load_dataset(hub_id)
        # What a hub, a proxy or a broken repository can raise is open-ended.
        except Exception as error:
            reason = f"hub set {hub_id} did not load ({_line(error)})".replace(";", ",")
            raise _HubUnavailable(f"{name}: {reason}; use a directory") from error
    test = next((s for s in ("test", "validation", "valid") if s in splits), None)
    if "train" not in splits or test is None:
        raise DataError(f"{origin}: needs splits train and test (or validation), has {[*splits]}")
    features = splits["train"].features
    image = spec.image if spec else _hub_column(features, datasets.Image)
    label = spec.label if spec else _hub_column(features, datasets.ClassLabel)
    if label is None and getattr(features.get("label"), "dtype", "").startswith(("int", "uint")):
        label = "label"
    if image not in features or label not in features:
        have = ", ".join(f"{k}: {type(v).__name__}" for k, v in features.items())
        raise DataError(
            f"{origin}: needs a column of type Image and one of type ClassLabel (or integers "
            f"called label), has {have}"
        )
    classes = getattr(features[label], "names", None)

    def read(split: str) -> _Split:
        table = splits[split].with_format("arrow")[:]  # encoded bytes: nothing is decoded here
        rows, labels = _table_rows(f"{origin} {split}", table, str(image), str(label), Path())
        return _decode_all(rows, f"{origin} {split}"), labels, classes

    return _build(name, origin, read("train"), read(test))


def _hub_column(features: Any, kind: type) -> str | None:
    return next((name for name, feature in features.items() if isinstance(feature, kind)), None)


def _prepared_before(hub_id: str) -> Any:
    """The set as `datasets` prepared it on this disk earlier, or None; asks no network.

    `load_dataset` finds it too, but where the network is down only after 20 seconds of retries.
    """
    try:
        from datasets.packaged_modules.cache.cache import Cache

        short = hub_id.split("/")[-1]
        return Cache(repo_id=hub_id, dataset_name=short, version="auto", hash="auto").as_dataset()
    # Nothing there, several configurations, or another release of `datasets`: ask the hub.
    except Exception:
        return None


def _hub_out_of_reach() -> str | None:
    """Why the hub cannot be asked, or None where it answers within `PROBE_SECONDS`."""
    from datasets import config
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    off = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if off or constants.HF_HUB_OFFLINE or config.HF_HUB_OFFLINE:
        return "the hub is switched off (HF_HUB_OFFLINE)"
    outcome = [f"no answer within {PROBE_SECONDS:g} s"]

    def probe() -> None:
        try:  # the hub client's own session, so with its proxies and certificates
            status = get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS).status_code
            outcome[0] = f"status {status}" if status >= 500 else ""
        except Exception as error:
            outcome[0] = _line(error).replace(";", ",")

    # In a thread, since looking up a host name obeys no timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return f"hub {constants.ENDPOINT} not reachable ({outcome[0]})" if outcome[0] else None
