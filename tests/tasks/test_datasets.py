"""Image sets from a directory, the hub and the bundled sample."""

import gzip
import importlib.util
import io
import json
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from stepsmith.tasks import datasets as module
from stepsmith.tasks import image_hub, sources
from stepsmith.tasks.datasets import DataError, ImageSet, load_images
from stepsmith.tasks.standardise import Standardise

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
SAMPLES = ("mnist", "fashion_mnist")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No directory from the environment, nothing cached or announced, and no network."""
    monkeypatch.delenv("STEPSMITH_DATA_DIR", raising=False)
    monkeypatch.setattr(sources, "_noticed", set())
    monkeypatch.setattr(image_hub, "_hub_out_of_reach", lambda: "hub not reachable (test)")
    monkeypatch.setattr(image_hub, "_prepared_before", lambda hub_id: None)
    module._load_cached.cache_clear()
    yield
    module._load_cached.cache_clear()


def pixels(count, shape=(6, 5), seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, *shape)).astype(np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


TRAIN, TEST = pixels(12), pixels(4, seed=1)
TRAIN_LABELS, TEST_LABELS = np.arange(12) % 3, np.arange(4) % 3


def write_parquet(path, images, labels, *, image="image", label="label", names=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [i if isinstance(i, dict) else {"bytes": png(i), "path": None} for i in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(rows, kind), label: pa.array(labels)})
    if names:
        features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
        meta = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": meta})
    pq.write_table(table, path)


def parquet_set(folder, **columns):
    write_parquet(folder / "train.parquet", TRAIN, TRAIN_LABELS, **columns)
    write_parquet(folder / "test.parquet", TEST, TEST_LABELS, **columns)
    return folder


def idx_bytes(array):
    head = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


def idx_set(folder, *, zipped=False):
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": (TRAIN, TRAIN_LABELS), "t10k": (TEST, TEST_LABELS)}
    for stem, (images, labels) in splits.items():
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            data, path = idx_bytes(array), folder / f"{stem}-{name}-ubyte"
            if zipped:
                data, path = gzip.compress(data), path.with_name(path.name + ".gz")
            path.write_bytes(data)
    return folder


def image_folder(folder, train=TRAIN, test=TEST):
    for split, images in (("train", train), ("test", test)):
        for i, image in enumerate(images):
            path = folder / split / f"class_{i % 3}" / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))
    return folder


def assert_holds_the_set(loaded, name, classes):
    """Pixels and labels equal the written ones, in any order (a folder sorts by class)."""
    assert (loaded.name, loaded.classes) == (name, classes)
    for images, labels, want, want_labels in (
        (loaded.train_images, loaded.train_labels, TRAIN, TRAIN_LABELS),
        (loaded.test_images, loaded.test_labels, TEST, TEST_LABELS),
    ):
        assert images.shape == (len(want), 1, 6, 5)
        got = {(i.numpy().tobytes(), int(y)) for i, y in zip(images, labels, strict=True)}
        assert got == {(i.tobytes(), int(y)) for i, y in zip(want, want_labels, strict=True)}


def refusal(*args, **kwargs):
    """The message of the DataError that loading raises, checked to be one line."""
    with pytest.raises(DataError) as caught:
        load_images(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- ImageSet -------------------------------------------------------------------------------------


def image_set(**changes):
    fields = {
        "name": "toy",
        "origin": "test",
        "train_images": torch.zeros(4, 1, 3, 2, dtype=torch.uint8),
        "train_labels": torch.tensor([0, 1, 2, 0]),
        "test_images": torch.zeros(2, 1, 3, 2, dtype=torch.uint8),
        "test_labels": torch.tensor([1, 2]),
        "classes": ("a", "b", "c"),
    }
    return ImageSet(**{**fields, **changes})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_image_set_moves_all_its_tensors(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    original = image_set()
    moved = original.to(device)
    assert moved.num_classes == 3
    for split in ("train_images", "train_labels", "test_images", "test_labels"):
        assert getattr(moved, split).device.type == device
        assert torch.equal(getattr(moved, split).cpu(), getattr(original, split))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": torch.zeros(4, 1, 3, 2)}, "train_images must be uint8"),
        ({"test_images": torch.zeros(2, 3, 2, dtype=torch.uint8)}, "test_images must be uint8"),
        ({"train_images": torch.zeros(4, 2, 3, 2, dtype=torch.uint8)}, "1 or 3"),
        ({"train_labels": torch.tensor([0, 1, 2, 0], dtype=torch.int32)}, "must be int64"),
        ({"train_labels": torch.tensor([[0, 1, 2, 0]])}, r"shape \(N,\)"),
        ({"test_labels": torch.tensor([0])}, "2 test images but 1 labels"),
        ({"train_labels": torch.tensor([0, 1, 3, 0])}, r"lie in 0..2 .*got 0..3"),
        ({"train_labels": torch.tensor([0, 1, -1, 0])}, "got -1..1"),
        ({"test_images": torch.zeros(2, 3, 3, 2, dtype=torch.uint8)}, "1x3x2 but test .* 3x3x2"),
        (
            {
                "test_images": torch.zeros(0, 1, 3, 2, dtype=torch.uint8),
                "test_labels": torch.zeros(0, dtype=torch.int64),
            },
            "test_images holds no pixels",
        ),
    ],
)
def test_an_image_set_refuses_parts_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=f"toy: .*{message}"):
        image_set(**changes)


# --- sample ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_the_sample_is_balanced_and_whole(name):
    sample = load_images(name, source="sample")
    assert sample.origin == "sample"
    assert sample.train_images.shape == (10_000, 1, 28, 28)
    assert sample.test_images.shape == (2_000, 1, 28, 28)
    assert torch.bincount(sample.train_labels).tolist() == [1000] * 10
    assert torch.bincount(sample.test_labels).tolist() == [200] * 10
    assert sample.classes == image_hub.KNOWN[name].classes
    # Shuffled: the first hundred images have every class, and are not sorted by it.
    assert sample.train_labels[:100].unique().numel() == 10


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_samples_rows_are_distinct_and_their_files_small(name, split):
    path = module._SAMPLE_DIR / f"{name}_{split}.parquet"
    index = pq.read_table(path, columns=["index"])["index"].to_numpy()
    assert len(np.unique(index)) == len(index)
    assert path.stat().st_size < 6 * 2**20


def test_hugging_face_datasets_reads_the_samples_features(tmp_path):
    hf = pytest.importorskip("datasets")
    path = module._SAMPLE_DIR / "fashion_mnist_test.parquet"
    rows = hf.load_dataset("parquet", data_files=str(path), cache_dir=tmp_path)["train"]
    assert isinstance(rows.features["image"], hf.Image)
    assert rows.features["label"].names[9] == "Ankle boot"
    assert rows[0]["image"].size == (28, 28)


@pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason="needs the whole MNIST")
def test_the_samples_rows_equal_the_original_rows():
    whole = load_images("mnist", source="directory", data_dir=SHARED, cache=False)
    sample = load_images("mnist", source="sample")
    assert whole.train_images.shape == (60_000, 1, 28, 28)
    for split in ("train", "test"):
        path = module._SAMPLE_DIR / f"mnist_{split}.parquet"
        index = torch.from_numpy(pq.read_table(path)["index"].to_numpy().copy())
        for part in ("images", "labels"):
            have, original = (getattr(s, f"{split}_{part}") for s in (sample, whole))
            assert torch.equal(have, original[index])


def test_drawing_the_sample_twice_gives_the_same_bytes(tmp_path):
    spec = importlib.util.spec_from_file_location("make_sample", ROOT / "scripts/make_sample.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    write_parquet(tmp_path / "x.parquet", TRAIN, TRAIN_LABELS, names=["a", "b", "c"])
    table = pq.read_table(tmp_path / "x.parquet")
    first, second = (script.sample(table, per_class=2, seed=3) for _ in range(2))
    assert first.equals(second, check_metadata=True)
    assert sorted(first["label"].to_pylist()) == [0, 0, 1, 1, 2, 2]
    assert first["image"].to_pylist() == [
        table["image"][i].as_py() for i in first["index"].to_pylist()
    ]
    with pytest.raises(ValueError, match="class 0: 5 images wanted, 4 there"):
        script.sample(table, per_class=5, seed=3)


def test_a_set_without_a_sample_says_which_have_one():
    assert "only of fashion_mnist, mnist" in refusal("kmnist", source="sample")


# --- directory ------------------------------------------------------------------------------------

DIGITS = tuple("0123456789")
PLAIN = ("0", "1", "2")


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_round_trip(tmp_path, zipped):
    idx_set(tmp_path / "mnist", zipped=zipped)
    loaded = load_images("mnist", source="directory", data_dir=tmp_path)
    assert loaded.origin == f"directory:{tmp_path / 'mnist'}"
    assert_holds_the_set(loaded, "mnist", DIGITS)
    assert torch.equal(loaded.train_labels, torch.from_numpy(TRAIN_LABELS))
    loaded.train_images.add_(1)  # not a read-only view of the file's bytes


@pytest.mark.parametrize(
    ("columns", "classes"),
    [
        ({}, PLAIN),
        ({"image": "img", "label": "fine_label"}, PLAIN),
        ({"names": ["x", "y", "z"]}, ("x", "y", "z")),
    ],
)
def test_parquet_files_round_trip(tmp_path, columns, classes):
    parquet_set(tmp_path / "mine", **columns)
    loaded = load_images("mine", source="directory", data_dir=tmp_path)
    assert_holds_the_set(loaded, "mine", classes)
    assert torch.equal(loaded.train_images[:, 0], torch.from_numpy(TRAIN))


def test_the_fine_labels_are_read_where_there_are_coarse_ones(tmp_path):
    for split, images, labels in (("train", TRAIN, TRAIN_LABELS), ("test", TEST, TEST_LABELS)):
        path = tmp_path / f"cifar100/{split}.parquet"
        write_parquet(path, images, labels, image="img", label="fine_label")
        table = pq.read_table(path)
        coarse = pa.array(np.zeros(len(labels), np.int64))
        pq.write_table(table.append_column("coarse_label", coarse), path)
    loaded = load_images("CIFAR-100", source="directory", data_dir=tmp_path)
    assert_holds_the_set(loaded, "cifar100", PLAIN)


def test_images_of_several_formats_make_one_set(tmp_path):
    def encoded(array, kind):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
        return {"bytes": buffer.getvalue(), "path": None}

    colour = pixels(12, (6, 5, 3))
    kinds = ("WEBP", "PNG", "BMP", "WEBP") * 3
    rows = [encoded(array, kind) for array, kind in zip(colour, kinds, strict=True)]
    for split in ("train", "test"):
        write_parquet(tmp_path / f"mine/{split}.parquet", rows, TRAIN_LABELS)
    images = load_images("mine", data_dir=tmp_path).train_images
    assert torch.equal(images, torch.from_numpy(colour).permute(0, 3, 1, 2))


def test_a_format_that_is_opened_as_another_is_read(tmp_path):
    images = [Image.fromarray(array) for array in pixels(2, (16, 8, 3))]
    buffer = io.BytesIO()
    images[0].save(buffer, "MPO", save_all=True, append_images=images[1:])  # opened as a JPEG
    rows = [{"bytes": buffer.getvalue(), "path": None}] * 2
    for split in ("train", "test"):
        write_parquet(tmp_path / f"mine/{split}.parquet", rows, [0, 1])
    assert load_images("mine", data_dir=tmp_path).train_images.shape == (2, 3, 16, 8)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "cifar10_jpeg").is_dir(), reason="needs CIFAR-10")
def test_both_forms_of_cifar10_are_found_by_name():
    lossless, lossy = (
        load_images(name, source="directory", data_dir=SHARED, cache=False)
        for name in ("cifar10", "cifar10_jpeg")
    )
    for images in (lossless, lossy):
        assert images.train_images.shape == (50_000, 3, 32, 32)
        assert images.classes == image_hub.KNOWN["cifar10"].classes
        assert torch.bincount(images.test_labels).tolist() == [1000] * 10
        # The usual constants of this set.
        standardise = Standardise.of(images.train_images)
        for have, want in (
            (standardise.mean_K, [0.4914, 0.4822, 0.4465]),
            (standardise.deviation_K, [0.2470, 0.2435, 0.2616]),
        ):
            torch.testing.assert_close(have, torch.tensor(want), atol=2e-3, rtol=0)
    assert torch.equal(lossless.train_labels, lossy.train_labels)
    assert not torch.equal(lossless.test_images, lossy.test_images)


def test_parquet_shards_are_read_in_order_and_paths_followed(tmp_path):
    folder = tmp_path / "mine"
    write_parquet(folder / "train-00000-of-00002.parquet", TRAIN[:7], TRAIN_LABELS[:7])
    (folder / "last.png").write_bytes(png(TRAIN[-1]))
    rest = [*TRAIN[7:-1], {"bytes": None, "path": "last.png"}]
    write_parquet(folder / "train-00001-of-00002.parquet", rest, TRAIN_LABELS[7:])
    write_parquet(folder / "test-00000-of-00001.parquet", TEST, TEST_LABELS)
    loaded = load_images("mine", data_dir=tmp_path)
    assert torch.equal(loaded.train_images[:, 0], torch.from_numpy(TRAIN))
    assert torch.equal(loaded.train_labels, torch.from_numpy(TRAIN_LABELS))


def test_a_folder_of_images_round_trips(tmp_path):
    image_folder(tmp_path / "mine")
    loaded = load_images("mine", source="directory", data_dir=tmp_path)
    assert_holds_the_set(loaded, "mine", ("class_0", "class_1", "class_2"))


def test_a_class_may_be_missing_from_a_test_folder(tmp_path):
    image_folder(tmp_path / "mine", test=TEST[:1])
    assert load_images("mine", data_dir=tmp_path).num_classes == 3


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)]
)
def test_grey_stays_one_channel_and_colour_becomes_rgb(tmp_path, mode, channels):
    colour = pixels(1, (6, 5, 3))[0]
    original = Image.fromarray(colour).convert(mode)
    buffer = io.BytesIO()
    original.save(buffer, "PNG")
    row = {"bytes": buffer.getvalue(), "path": None}
    for split in ("train", "test"):
        write_parquet(tmp_path / f"mine/{split}.parquet", [row], [0])
    image = load_images("mine", data_dir=tmp_path).train_images[0]
    want = np.asarray(original.convert("L" if channels == 1 else "RGB")).reshape(6, 5, channels)
    assert torch.equal(image, torch.from_numpy(want.copy()).permute(2, 0, 1))


def test_large_images_decoded_by_several_threads_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    rows = [np.full((120, 110), i % 256, np.uint8) for i in range(600)]
    for split in ("train", "test"):
        write_parquet(tmp_path / f"mine/{split}.parquet", rows, [0] * 600)
    images = load_images("mine", data_dir=tmp_path).train_images
    assert images[:, 0, 0, 0].tolist() == [i % 256 for i in range(600)]


def test_the_data_directory_may_hold_the_files_directly(tmp_path):
    folder = idx_set(tmp_path / "my-digits")
    assert load_images("mnist", data_dir=folder).origin == f"directory:{folder}"


def test_files_in_a_folder_named_for_one_set_are_not_another(tmp_path):
    folder = idx_set(tmp_path / "fashion-mnist")
    assert "holds no mnist" in refusal("mnist", source="directory", data_dir=folder)


@pytest.mark.parametrize("spelling", ["fashion_mnist", "fashion-mnist", "Fashion-MNIST"])
@pytest.mark.parametrize("folder", ["fashion_mnist", "fashion-mnist"])
def test_dashes_and_capitals_do_not_matter(tmp_path, spelling, folder):
    idx_set(tmp_path / folder)
    loaded = load_images(spelling, source="directory", data_dir=tmp_path)
    assert loaded.name == "fashion_mnist"
    assert loaded.classes[0] == "T-shirt/top"


# Each breaks a good set in tmp_path / "mine" and says what the message must hold.
def cut_images(folder):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    return path, "expected 376 bytes for shape 12x6x5, got 276"


def cut_header(folder):
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:9])
    return path, "expected 16 bytes of header, got 9"


def empty_file(folder):
    path = folder / "t10k-labels-idx1-ubyte"
    path.write_bytes(b"")
    return path, "expected 8 bytes of header, got 0"


def trailing_bytes(folder):
    path = folder / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes() + b"x")
    return path, "expected 12 bytes for shape 4, got 13"


def wrong_magic(folder):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(b"\0\0\x0d\x03" + path.read_bytes()[4:])
    return path, "magic number must be 0x00000803 .*got 0x00000d03"


def absent_idx(folder):
    path = folder / "train-labels-idx1-ubyte"
    path.unlink()
    return path, "no such file, nor with .gz"


def fewer_labels(folder):
    path = folder / "train-labels-idx1-ubyte"
    path.write_bytes(idx_bytes(TRAIN_LABELS[:-1]))
    return path, "11 labels but train-images-idx3-ubyte has 12 images"


def cut_gzip(folder):
    path = folder / "train-images-idx3-ubyte"
    packed = gzip.compress(path.read_bytes())
    path.unlink()
    path = path.with_name(path.name + ".gz")
    path.write_bytes(packed[:-60])
    return path, "expected 376 bytes for shape 12x6x5, got"


def not_gzip(folder):
    path = folder / "train-images-idx3-ubyte"
    path = path.rename(path.with_name(path.name + ".gz"))
    return path, "cannot be read"


@pytest.mark.parametrize(
    "damage",
    [
        cut_images,
        cut_header,
        empty_file,
        trailing_bytes,
        wrong_magic,
        absent_idx,
        fewer_labels,
        cut_gzip,
        not_gzip,
    ],
)
@pytest.mark.parametrize("source", ["auto", "directory"])
def test_damaged_idx_files_are_named(tmp_path, damage, source):
    path, message = damage(idx_set(tmp_path / "mnist"))
    said = refusal("mnist", source=source, data_dir=tmp_path)
    assert said.startswith(f"{path}: ")
    assert re.search(message, said)


def other_shape(folder):
    odd = [*TRAIN[:3], pixels(1, (6, 7))[0]]
    write_parquet(folder / "train.parquet", odd, [0, 1, 2, 0])
    return "train.parquet row 3: image is 1x6x7 but .*train.parquet row 0 is 1x6x5"


def other_shape_in_test(folder):
    write_parquet(folder / "test.parquet", pixels(2, (6, 7)), [0, 1])
    return "training images are 1x6x5 but test images 1x6x7"


def undecodable(folder):
    rows = [*TRAIN[:2], {"bytes": b"no image", "path": None}]
    write_parquet(folder / "train.parquet", rows, [0, 1, 2])
    return "train.parquet row 2: cannot decode this image"


def half_an_image(folder):
    rows = [*TRAIN[:2], {"bytes": png(TRAIN[2])[:60], "path": None}]
    write_parquet(folder / "train.parquet", rows, [0, 1, 2])
    return "train.parquet row 2: cannot decode this image"


def sixteen_bits(folder):
    deep = np.full((6, 5), 40_000, np.uint16)
    write_parquet(folder / "test.parquet", [deep], [0])
    return "test.parquet row 0: .* do not fit in 8 bits"


def empty_row(folder):
    write_parquet(folder / "train.parquet", [*TRAIN[:2], {"bytes": None, "path": None}], [0, 1, 2])
    return "train.parquet row 2: neither image bytes nor a path"


def no_rows(folder):
    write_parquet(folder / "test.parquet", [], pa.array([], pa.int64()))
    return "test: holds no images"


def corrupt(folder):
    path = folder / "train.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    return "train.parquet: not a readable parquet file"


def corrupt_page(folder):
    path = folder / "train.parquet"
    path.write_bytes(b"PAR1" + b"\xff" * 400 + path.read_bytes()[404:])
    return "train.parquet: not a readable parquet file"


def absent_split(folder):
    (folder / "test.parquet").unlink()
    return r"no test\*\.parquet; put the test split there"


def no_image_column(folder):
    write_parquet(folder / "train.parquet", TRAIN, TRAIN_LABELS, image="picture")
    return r"train.parquet: needs a column image or img, has \['picture', 'label'\]"


def no_label_column(folder):
    write_parquet(folder / "train.parquet", TRAIN, TRAIN_LABELS, label="y")
    return "train.parquet: needs a column label or fine_label"


def text_images(folder):
    pq.write_table(pa.table({"image": ["a"], "label": [0]}), folder / "train.parquet")
    return "train.parquet: column 'image' must be struct{bytes, path}, got string"


def text_labels(folder):
    write_parquet(folder / "train.parquet", TRAIN[:2], ["a", "b"])
    return "train.parquet: column 'label' must be integers without gaps, got string"


def missing_label(folder):
    write_parquet(folder / "train.parquet", TRAIN[:2], [0, None])
    return "must be integers without gaps, got int64 with 1 empty rows"


def unlabelled(folder):
    write_parquet(folder / "test.parquet", TEST, [-1] * 4)
    return "test_labels must lie in 0..2"


def other_classes(folder):
    write_parquet(folder / "train.parquet", TRAIN, TRAIN_LABELS, names=["a", "b", "c"])
    write_parquet(folder / "test.parquet", TEST, TEST_LABELS, names=["a", "c", "b"])
    return "training and test files name different classes"


@pytest.mark.parametrize(
    "damage",
    [
        other_shape,
        other_shape_in_test,
        undecodable,
        half_an_image,
        sixteen_bits,
        empty_row,
        no_rows,
        corrupt,
        corrupt_page,
        absent_split,
        no_image_column,
        no_label_column,
        text_images,
        text_labels,
        missing_label,
        unlabelled,
        other_classes,
    ],
)
def test_damaged_parquet_files_are_named(tmp_path, damage):
    folder = parquet_set(tmp_path / "mine")
    message = damage(folder)
    said = refusal("mine", source="directory", data_dir=tmp_path)
    assert str(folder) in said
    with pytest.raises(DataError, match=message):
        load_images("mine", source="directory", data_dir=tmp_path)


def test_damaged_image_folders_are_named(tmp_path):
    folder = image_folder(tmp_path / "mine")
    broken = folder / "train/class_1/001.png"
    broken.write_bytes(b"no image")
    assert refusal("mine", data_dir=tmp_path).startswith(f"{broken}: cannot decode")
    broken.unlink()
    (folder / "test/class_9").mkdir()
    said = refusal("mine", data_dir=tmp_path)
    assert said == f"{folder / 'test/class_9'}: no such class among the training folders"
    for path in sorted((folder / "test").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert refusal("mine", data_dir=tmp_path).startswith(f"{folder / 'test'}: no class folders")


# --- names and sources ----------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    said = refusal("fashon-mnist")
    assert "unknown data set 'fashon-mnist': did you mean 'fashion_mnist'?" in said
    for name in image_hub.KNOWN:
        assert name in said
    parquet_set(tmp_path / "my_letters")
    assert "did you mean 'my_letters'?" in refusal("my_leters", data_dir=tmp_path)
    assert "did you mean" not in refusal("../qqqq", data_dir=tmp_path)


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match="one of auto, directory, hub, sample, got 'web'"):
        load_images("mnist", source="web")


def test_explicit_sources_do_not_fall_through(tmp_path):
    assert "pass data_dir=" in refusal("mnist", source="directory")
    said = refusal("mnist", source="directory", data_dir=tmp_path)
    assert f"{tmp_path} holds no mnist" in said
    pytest.importorskip("datasets")
    assert "hub not reachable (test)" in refusal("mnist", source="hub", data_dir=tmp_path)


def test_a_set_found_nowhere_says_where_it_was_looked_for():
    pytest.importorskip("datasets")
    said = refusal("cifar10")
    for part in ("no data directory given", "hub not reachable (test)", "data_dir=DIR"):
        assert part in said


def test_auto_prefers_the_directory_then_the_hub_then_the_sample(tmp_path, monkeypatch, caplog):
    hub = image_set(name="mnist", origin="hub:fake")
    idx_set(tmp_path / "with/mnist")
    splits = [(images.numpy(), labels.numpy(), hub.classes) for images, labels in (
        (hub.train_images, hub.train_labels), (hub.test_images, hub.test_labels))]  # fmt: skip
    monkeypatch.setattr(module, "read_hub", lambda name: ("hub:fake", *splits))
    assert load_images("mnist", data_dir=tmp_path / "with").origin.startswith("directory:")
    monkeypatch.setenv("STEPSMITH_DATA_DIR", str(tmp_path / "with"))
    assert load_images("mnist").origin.startswith("directory:")
    monkeypatch.delenv("STEPSMITH_DATA_DIR")
    assert load_images("mnist").origin == "hub:fake"
    assert load_images("mnist", source="sample").origin == "sample"
    assert not caplog.records


def test_the_sample_is_announced_once_a_set(caplog):
    with caplog.at_level(logging.WARNING, logger="stepsmith"):
        for name in ("mnist", "mnist", "fashion_mnist"):
            assert load_images(name, cache=False).origin == "sample"
    first, second = caplog.messages
    assert first.startswith("mnist: using the bundled sample, 10000 training and 2000 test images")
    assert second.startswith("fashion_mnist: ")
    assert "\n" not in first
    for way_out in ("STEPSMITH_DATA_DIR", "data_dir", "pip install datasets"):
        assert way_out in first


def test_a_set_on_the_hub_that_is_malformed_is_not_replaced_by_the_sample(monkeypatch):
    def malformed(name):
        raise DataError("hub:x: needs splits train and test")

    monkeypatch.setattr(module, "read_hub", malformed)
    assert "needs splits" in refusal("mnist")


def test_caching_hands_out_the_same_set(tmp_path):
    parquet_set(tmp_path / "mine")
    first = load_images("mine", data_dir=tmp_path)
    assert load_images("mine", data_dir=str(tmp_path)) is first
    assert load_images("mine", data_dir=tmp_path, cache=False) is not first


# --- hub ------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose repositories are folders of parquet files, read by the real `datasets`."""
    hf = pytest.importorskip("datasets")
    real = hf.load_dataset

    def load_dataset(hub_id, revision=None):
        files = {p.stem: str(p) for p in (tmp_path / hub_id).glob("*.parquet")}
        if not files:
            raise hf.exceptions.DatasetNotFoundError(
                f"Dataset '{hub_id}' doesn't exist\non the Hub"
            )
        return real("parquet", data_files=files, cache_dir=tmp_path / "cache")

    monkeypatch.setattr(hf, "load_dataset", load_dataset)
    monkeypatch.setattr(image_hub, "_hub_out_of_reach", lambda: None)
    return tmp_path


@pytest.mark.parametrize("name", sorted(image_hub.KNOWN))
def test_known_sets_are_read_from_their_columns_on_the_hub(hub, name):
    known = image_hub.KNOWN[name]
    names = list(known.classes or map(str, range(100)))
    folder = hub / known.hub_id
    parquet_set(folder, image=known.image, label=known.label, names=names)
    loaded = load_images(name)
    assert loaded.origin == f"hub:{known.hub_id}"
    assert_holds_the_set(loaded, name, tuple(names))
    assert torch.equal(loaded.train_images[:, 0], torch.from_numpy(TRAIN))


def test_columns_of_any_other_set_are_found_by_their_types(hub):
    parquet_set(hub / "me/birds", image="photo", label="species", names=["a", "b", "c"])
    assert_holds_the_set(load_images("me/birds", source="hub"), "me/birds", ("a", "b", "c"))


def test_integer_labels_and_a_validation_split_will_do(hub):
    hf = pytest.importorskip("datasets")
    features = hf.Features({"image": hf.Image(), "label": hf.Value("int32")})
    for split, images, labels in (
        ("train", TRAIN, TRAIN_LABELS),
        ("validation", TEST, TEST_LABELS),
    ):
        rows = {"image": [{"bytes": png(i), "path": None} for i in images], "label": labels}
        path = hub / f"me/birds/{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        hf.Dataset.from_dict(rows, features=features).to_parquet(path)
    assert_holds_the_set(load_images("me/birds", source="hub"), "me/birds", PLAIN)


def test_a_hub_set_without_the_splits_or_columns_needed_is_refused(hub):
    write_parquet(hub / "me/half/train.parquet", TRAIN, TRAIN_LABELS, names=["a", "b", "c"])
    said = refusal("me/half", source="hub")
    assert said == "hub:me/half: needs splits train and test (or validation), has ['train']"
    parquet_set(hub / "me/plain", label="score")
    said = refusal("me/plain", source="hub")
    assert said.startswith("hub:me/plain: needs a column of type Image")
    assert "score: Value" in said


def test_a_repository_that_is_not_there_is_named_and_auto_goes_on(hub, caplog):
    said = refusal("me/nothing", source="hub")
    assert "me/nothing did not load (Dataset 'me/nothing' doesn't exist on the Hub)" in said
    assert load_images("mnist").origin == "sample"
    assert "ylecun/mnist did not load" in caplog.text


def test_without_the_datasets_package_the_hub_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal("mnist", source="hub")
    assert load_images("mnist").origin == "sample"


def test_importing_the_module_does_not_import_datasets():
    code = "import sys, stepsmith.tasks.datasets; sys.exit('datasets' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )


def test_a_set_prepared_earlier_needs_no_network(hub, monkeypatch):
    hf = pytest.importorskip("datasets")
    monkeypatch.undo()
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", str(hub / "prepared"))
    monkeypatch.setattr(image_hub, "_hub_out_of_reach", lambda: "hub not reachable (test)")
    assert image_hub._prepared_before("me/birds") is None
    parquet_set(hub / "me/birds", names=["a", "b", "c"])
    files = {s: str(hub / f"me/birds/{s}.parquet") for s in ("train", "test")}
    # What `load_dataset("me/birds")` leaves behind once it was downloaded.
    builder = hf.load_dataset_builder("parquet", data_files=files, cache_dir=hub / "elsewhere")
    builder.dataset_name = "birds"
    builder.download_and_prepare(str(hub / "prepared/me___birds/default/0.0.0/0123456789abcdef"))
    module._load_cached.cache_clear()
    assert_holds_the_set(load_images("me/birds", source="hub"), "me/birds", ("a", "b", "c"))


class TestReach:
    """The real probe, against servers on this machine."""

    @pytest.fixture(autouse=True)
    def real_probe(self, monkeypatch):
        monkeypatch.undo()
        self.constants = pytest.importorskip("huggingface_hub.constants")
        config = pytest.importorskip("datasets.config")
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(self.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(image_hub, "PROBE_SECONDS", 1.0)
        self.monkeypatch = monkeypatch

    def reach(self, port):
        self.monkeypatch.setattr(self.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        start = time.monotonic()
        reason = image_hub._hub_out_of_reach()
        assert time.monotonic() - start < 2.2
        return reason

    def serve(self, reply):
        listener = socket.create_server(("127.0.0.1", 0))

        def answer():
            connection, _ = listener.accept()
            connection.recv(4096)
            if reply:
                connection.sendall(f"HTTP/1.1 {reply}\r\nContent-Length: 0\r\n\r\n".encode())
            else:
                time.sleep(2.5)
            connection.close()
            listener.close()

        threading.Thread(target=answer, daemon=True).start()
        return listener.getsockname()[1]

    @pytest.mark.parametrize("reply", ["200 OK", "404 Not Found", "401 Unauthorized"])
    def test_a_server_that_answers_is_in_reach(self, reply):
        assert self.reach(self.serve(reply)) is None

    def test_a_refusing_port_is_out_of_reach(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        assert f"127.0.0.1:{port} not reachable" in self.reach(port)

    def test_a_gateway_error_is_out_of_reach(self):
        assert "status 502" in self.reach(self.serve("502 Bad Gateway"))

    def test_a_silent_server_is_out_of_reach_soon(self):
        assert "not reachable" in self.reach(self.serve(None))

    def test_a_slow_name_server_does_not_hold_things_up(self):
        real = socket.getaddrinfo

        def slow(*args, **kwargs):
            time.sleep(2.5)
            return real(*args, **kwargs)

        self.monkeypatch.setattr(socket, "getaddrinfo", slow)
        assert "no answer within 1 s" in self.reach(1)

    @pytest.mark.parametrize("value", ["1", "true"])
    def test_offline_mode_asks_nobody(self, value):
        self.monkeypatch.setenv("HF_HUB_OFFLINE", value)
        assert "HF_HUB_OFFLINE" in self.reach(1)
