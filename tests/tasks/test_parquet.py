"""Parquet files of a split: which are read, what paths they may name, how much they may hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.tasks.test_datasets import (
    TEST,
    TEST_LABELS,
    TRAIN,
    TRAIN_LABELS,
    assert_holds_the_set,
    parquet_set,
    png,
    refusal,
    write_parquet,
)

from stepsmith.tasks import files
from stepsmith.tasks.datasets import load_images
from stepsmith.tasks.files import DataError
from stepsmith.tasks.parquet import parquet_files, read_batches
from stepsmith.tasks.text_data import load_text

DIGITS = ("0", "1", "2")
KIND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("STEPSMITH_DATA_LIMIT_GIB", raising=False)
    monkeypatch.setattr(files, "_said", set())


def load(folder):
    return load_images("mine", data_dir=folder, cache=False)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet",), ("Train.PARQUET",), ("train-0.parquet", "train-1.parquet"),
        ("train_00.parquet", "train_01.parquet"), ("train0.parquet",), ("training.parquet",),
        ("train-00000-of-00001-0123456789abcdef.parquet",), ("train-a.parquet", "train-b.parquet"),
    ],
)  # fmt: skip
def test_what_files_of_a_split_are_called(tmp_path, names):
    for name in (*names, "other.parquet", "README.md", ".train.parquet.crc", ".train-x.parquet"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in parquet_files(tmp_path, "train")] == sorted(names)


def test_parquet_files_beside_a_split_are_left_out_and_said(tmp_path, caplog):
    folder = parquet_set(tmp_path / "mine")
    pq.write_table(pa.table({"note": ["a"]}), folder / "train_notes.parquet")
    pq.write_table(pa.table({"note": ["a"]}), folder / "statistics.parquet")
    assert_holds_the_set(load(tmp_path), "mine", DIGITS)
    (said,) = caplog.messages
    assert "is train.parquet; left out 1 other file (train_notes.parquet)" in said


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.parquet", "train-00000-of-00001.parquet"], "there more than once"),
        (["train-00000-of-00001.parquet", "train-00000-of-00002.parquet"], "more than once"),
        (["train-00000-of-00001-ab.parquet", "train-00000-of-00001-cd.parquet"], "more than once"),
        (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"], "2 of 3 .* 00001 is"),
        (["train-00000-of-99999999999.parquet"], "1 of 99999999999 parts, number 00001 is"),
    ],
)
def test_each_part_must_be_there_once(tmp_path, names, message):
    folder = parquet_set(tmp_path / "mine")
    (folder / "train.parquet").rename(folder / "kept")
    for name in names:
        shutil.copy(folder / "kept", folder / name)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


# --- paths ----------------------------------------------------------------------------------------


def with_path(folder, path):
    parquet_set(folder)
    rows = [*TRAIN[:11], {"bytes": None, "path": path}]
    write_parquet(folder / "train.parquet", rows, TRAIN_LABELS)


@pytest.mark.parametrize(
    "path", ["x.png", "deep/x.png", "deep/../x.png", "./x.png", "link.png", "{folder}/x.png"]
)
def test_paths_within_the_folder_are_followed(tmp_path, path):
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    for name in ("x.png", "deep/x.png"):
        (folder / name).write_bytes(png(TRAIN[11]))
    (folder / "link.png").symlink_to("x.png")
    with_path(folder, path.format(folder=folder))
    assert_holds_the_set(load(tmp_path), "mine", DIGITS)


@pytest.mark.parametrize(
    "path",
    [
        "../x.png", "deep/../../x.png", "{folder}/../x.png", "/dev/zero", "link.png", "out/x.png",
        "file:///etc/passwd", "http://example.com/x.png", "hf://datasets/a/b/x.png", "loop.png",
        "a\0b", "..", "", "nowhere.png", "fifo.png",
    ],
)  # fmt: skip
def test_paths_that_leave_the_folder_or_lead_nowhere_are_refused(tmp_path, path):
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "x.png").write_bytes(png(TRAIN[11]))
    (folder / "link.png").symlink_to("../x.png")
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "fifo.png")
    with_path(folder, path.format(folder=folder))
    said = refusal("mine", data_dir=tmp_path)
    inside = ("", "nowhere.png", "fifo.png", "loop.png", "a\0b")
    if path not in inside and "://" not in path:
        assert f"row 11: path {path.format(folder=folder)!r} leaves {folder};" in said


# --- columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [pa.struct([("bytes", pa.list_(pa.binary()))]), pa.struct([("bytes", pa.string())]),
             pa.struct([("bytes", pa.binary()), ("path", pa.int64())])],
)  # fmt: skip
def test_images_are_bytes_and_paths_are_strings(tmp_path, kind):
    folder = parquet_set(tmp_path / "mine")
    table = pa.table({"image": pa.array([None] * 3, kind), "label": [0, 1, 2]})
    pq.write_table(table, folder / "train.parquet")
    with pytest.raises(DataError, match=r"train.parquet: column 'image' must be struct\{bytes"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1, 1], r"train_labels must lie in 0..\d+ .*got -1"),
        (pa.array([0, 1, 2**64 - 1], pa.uint64()), "must lie in"),
        ([0.0, 1.0, float("nan")], "must be integers without gaps, got double"),
        ([True, False, True], "must be integers without gaps, got bool"),
        ([[0], [1], [2]], "must be integers without gaps, got list"),
        (["a", None, "b"], "must be integers without gaps, got string"),
        ([0, None, 1], "got int64 with 1 empty rows"),
    ],
)
def test_labels_are_numbers_of_classes(tmp_path, labels, message):
    folder = parquet_set(tmp_path / "mine")
    write_parquet(folder / "train.parquet", TRAIN[:3], labels)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("names", [3, {"a": 1}, [1, 2, 3], None])
def test_class_names_that_are_none_are_not_used(tmp_path, names):
    folder = parquet_set(tmp_path / "mine", names=names or ["x"])
    if names is None:
        table = pq.read_table(folder / "train.parquet")
        bad = table.replace_schema_metadata({"huggingface": b"[" * 10_000})
        pq.write_table(bad, folder / "train.parquet")
        names = table.schema.metadata
        pq.write_table(
            pq.read_table(folder / "test.parquet").replace_schema_metadata(None),
            folder / "test.parquet",
        )
    assert load(tmp_path).classes == DIGITS


# --- sizes ----------------------------------------------------------------------------------------


def expanding(path, rows, size, column="image"):
    """A file of few bytes whose rows all hold one value of a size, stored once."""
    kind = pa.binary() if column == "image" else pa.string()
    values = pa.DictionaryArray.from_arrays(
        pa.array([0] * rows, pa.int32()), pa.array([b"x" * size]).cast(kind)
    )
    columns = {column: values}
    if column == "image":
        parts = [values, pa.nulls(rows, pa.string())]
        columns = {"image": pa.StructArray.from_arrays(parts, ["bytes", "path"])}
        columns["label"] = pa.array([0] * rows)
    pq.write_table(
        pa.table(columns), path, compression="zstd", row_group_size=rows, store_schema=False,
        dictionary_pagesize_limit=2**30,
    )  # fmt: skip


def test_columns_above_the_limit_are_refused_by_what_the_file_says(tmp_path, monkeypatch):
    folder = parquet_set(tmp_path / "mine")
    monkeypatch.setenv("STEPSMITH_DATA_LIMIT_GIB", repr(2**20 / 2**30))
    assert load(tmp_path).num_classes == 3
    content = {"bytes": bytes(2**21), "path": None}
    write_parquet(folder / "train.parquet", [content, *TRAIN[1:]], TRAIN_LABELS)
    assert (folder / "train.parquet").stat().st_size < 2**18
    said = refusal("mine", data_dir=tmp_path, cache=False)
    assert "train.parquet: columns image would take 0.00195 GiB" in said
    many = pa.table({"image": pa.nulls(2**18, KIND), "label": pa.array([0] * 2**18)})
    pq.write_table(many, folder / "train.parquet")
    assert "262144 rows would take" in refusal("mine", data_dir=tmp_path, cache=False)


def test_values_that_stand_in_every_row_are_held_once(tmp_path):
    expanding(tmp_path / "x.parquet", rows=1500, size=2**17)
    held = pa.total_allocated_bytes()
    count = 0
    for batch in read_batches(tmp_path / "x.parquet", ["image"]):
        assert pa.total_allocated_bytes() - held < 2**22
        count += batch.num_rows
        assert batch.column(0)[0]["bytes"].as_py() == b"x" * 2**17
    assert count == 1500


@pytest.mark.parametrize("what", ["images", "text"])
def test_a_small_file_takes_no_gigabytes(tmp_path, what):
    folder = tmp_path / "mine"
    folder.mkdir()
    for split, rows in (("train", 600), ("test", 1)):
        expanding(folder / f"{split}.parquet", rows, 2**20, "image" if what == "images" else "text")
    assert (folder / "train.parquet").stat().st_size < 2**16
    code = (
        "import sys, resource\n"
        "from stepsmith.tasks.datasets import load_images\n"
        "from stepsmith.tasks.text_data import load_text\n"
        "begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        f"    {'load_images' if what == 'images' else 'load_text'}('mine', data_dir=sys.argv[1])\n"
        "except ValueError as error:\n"
        "    print(error, file=sys.stderr)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    unit = 1 if sys.platform == "darwin" else 2**10
    assert int(run.stdout) * unit < 2**27
    assert ("row 0: cannot decode this image" in run.stderr) == (what == "images")


def test_texts_above_the_limit_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    for split in ("train", "test"):
        pq.write_table(
            pa.table({"text": [f"{i} " + "x" * 2**16 for i in range(32)]}),
            folder / f"{split}.parquet",
        )
    monkeypatch.setenv("STEPSMITH_DATA_LIMIT_GIB", repr(2**20 / 2**30))
    with pytest.raises(DataError, match=r"columns text would take 0.00195 GiB"):
        load_text("mine", data_dir=tmp_path)


def test_shards_are_read_one_after_another_in_batches(tmp_path):
    folder = tmp_path / "mine"
    rows = [*TRAIN] * 200
    labels = [*TRAIN_LABELS] * 200
    write_parquet(folder / "train-0.parquet", rows[:1500], labels[:1500])
    write_parquet(folder / "train-1.parquet", rows[1500:], labels[1500:])
    write_parquet(folder / "test.parquet", TEST, TEST_LABELS)
    loaded = load(tmp_path)
    assert torch.equal(loaded.train_images[:, 0], torch.from_numpy(TRAIN).repeat(200, 1, 1))
    assert loaded.train_labels.tolist() == labels
