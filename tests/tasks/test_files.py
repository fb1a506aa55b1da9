"""What is looked at in a data directory, how much is read, and what is said of the rest."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from tests.tasks.test_datasets import (
    TEST,
    TEST_LABELS,
    TRAIN,
    TRAIN_LABELS,
    assert_holds_the_set,
    idx_set,
    image_folder,
    parquet_set,
    png,
    refusal,
    write_parquet,
)
from tests.tasks.test_text_data import text_files

from stepsmith.tasks import files
from stepsmith.tasks.datasets import load_images
from stepsmith.tasks.files import DataError, Listing, limit, regular, require_room
from stepsmith.tasks.text_data import load_text

CLASSES = ("class_0", "class_1", "class_2")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing said yet, the limit as it comes, no set kept."""
    monkeypatch.delenv("STEPSMITH_DATA_LIMIT_GIB", raising=False)
    monkeypatch.setattr(files, "_said", set())
    monkeypatch.setattr("stepsmith.tasks.image_hub._hub_out_of_reach", lambda: "no hub (test)")
    monkeypatch.setattr("stepsmith.tasks.image_hub._prepared_before", lambda hub_id: None)


def load(folder, name="mine", **options):
    return load_images(name, data_dir=folder, cache=False, **options)


def write(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# --- what lies about ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir", "#recycle", "$RECYCLE.BIN",
        "lost+found", "__pycache__", "System Volume Information", ".AppleDouble",
    ],
)  # fmt: skip
def test_folders_that_systems_make_are_no_classes(tmp_path, caplog, name):
    folder = image_folder(tmp_path / "mine")
    for split in ("train", "test"):
        write(folder / split / name / "000.png", png(TRAIN[0]))
    assert_holds_the_set(load(tmp_path), "mine", CLASSES)
    assert caplog.text.count("left out 1 hidden or system file") == 2


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini", "._000.png", ".x.png"])
@pytest.mark.parametrize("place", ["", "class_0"])
def test_files_that_systems_make_are_no_images(tmp_path, caplog, name, place):
    folder = image_folder(tmp_path / "mine")
    write(folder / "train" / place / name)
    assert_holds_the_set(load(tmp_path), "mine", CLASSES)
    (said,) = caplog.messages
    assert said.startswith(f"{folder / 'train'}: left out 1 hidden or system file;")


def test_a_folder_without_files_of_a_set_is_named(tmp_path):
    write(tmp_path / "mine/train.csv", b"label,text")
    for read, form in ((load_images, "train-images-idx3-ubyte"), (load_text, "train.txt")):
        with pytest.raises(DataError, match=f"holds no mine .looked for mine/ with .*{form}"):
            read("mine", data_dir=tmp_path)


def test_other_formats_and_deeper_folders_are_counted_once(tmp_path, caplog):
    folder = image_folder(tmp_path / "mine")
    for i in range(3):
        write(folder / f"train/class_{i}/{i}.tif")
    write(folder / "train/class_1/notes.txt")
    write(folder / "train/labels.csv")
    write(folder / "train/class_2/more/deep.png", png(TRAIN[0]))
    for _ in range(2):
        assert_holds_the_set(load(tmp_path), "mine", CLASSES)
    (said,) = caplog.messages
    assert "5 files of other formats or places (.tif 3, " in said
    assert "1 folder within class folders;" in said


def test_endings_of_images_may_have_capitals(tmp_path):
    folder = image_folder(tmp_path / "mine")
    for i, path in enumerate(sorted(folder.rglob("*.png"))):
        path.rename(path.with_suffix((".PNG", ".Png")[i % 2]))
    assert_holds_the_set(load(tmp_path), "mine", CLASSES)


@pytest.mark.parametrize("keep", ["parquet", "idx"])
def test_two_forms_in_one_folder_are_told_apart(tmp_path, caplog, keep):
    folder = image_folder(tmp_path / "mine")
    (parquet_set if keep == "parquet" else idx_set)(folder)
    assert_holds_the_set(load(tmp_path), "mine", ("0", "1", "2"))
    assert f"reading the {keep} files" in caplog.text


# --- classes --------------------------------------------------------------------------------------


def test_classes_that_are_numbers_are_sorted_as_numbers(tmp_path):
    folder = tmp_path / "mine"
    for split in ("train", "test"):
        for i in range(12):
            write(folder / split / str(i) / "a.png", png(TRAIN[i]))
    loaded = load(tmp_path)
    assert loaded.classes == tuple(map(str, range(12)))
    assert torch.equal(loaded.train_images[:, 0], torch.from_numpy(TRAIN))
    assert loaded.train_labels.tolist() == list(range(12))


def test_other_classes_are_sorted_as_text(tmp_path):
    folder = tmp_path / "mine"
    for split in ("train", "test"):
        for name in ("10", "9", "b"):
            write(folder / split / name / "a.png", png(TRAIN[0]))
    assert load(tmp_path).classes == ("10", "9", "b")


def test_classes_without_images_are_said(tmp_path, caplog):
    folder = image_folder(tmp_path / "mine", test=TEST[:1])
    (folder / "train/class_9").mkdir()
    assert load(tmp_path).num_classes == 4
    assert f"{folder}/train: 1 of 4 classes have no image (class_9)" in caplog.text
    assert f"{folder}/test: 3 of 4 classes have no image (class_1, class_2, class_9" in caplog.text


def test_a_single_class_is_said(tmp_path, caplog):
    for split in ("train", "test"):
        write(tmp_path / f"mine/{split}/images/a.png", png(TRAIN[0]))
    load(tmp_path)
    assert "has one class only (images)" in caplog.text


def test_labels_that_begin_with_one_are_said(tmp_path, caplog):
    for split, images, labels in (("train", TRAIN, TRAIN_LABELS), ("test", TEST, TEST_LABELS)):
        write_parquet(tmp_path / f"mine/{split}.parquet", images, labels + 1)
    assert load(tmp_path).num_classes == 4
    assert "/train: 1 of 4 classes have no image (0)" in caplog.text


@pytest.mark.parametrize("label", [16, 10**6, 2**62])
def test_labels_far_above_the_images_make_no_classes(tmp_path, label):
    folder = parquet_set(tmp_path / "mine")
    write_parquet(folder / "train.parquet", TRAIN, [*TRAIN_LABELS[:-1].tolist(), label])
    assert f"labels go up to {label}, but there are 16 images" in refusal("mine", data_dir=tmp_path)


def test_exchanged_splits_are_said(tmp_path, caplog):
    image_folder(tmp_path / "mine", train=TRAIN[:3], test=TRAIN)
    load(tmp_path)
    assert "3 training and 12 test images; are the splits exchanged?" in caplog.text


# --- splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["validation", "valid", "val", "Val"])
def test_a_set_without_a_test_folder_is_tested_on_its_validation(tmp_path, caplog, other):
    folder = image_folder(tmp_path / "mine")
    (folder / "test").rename(folder / other)
    assert_holds_the_set(load(tmp_path), "mine", CLASSES)
    assert f"no split called test, testing on {other}" in caplog.text


@pytest.mark.parametrize("other", ["validation", "valid", "val"])
@pytest.mark.parametrize("ending", ["parquet", "txt"])
def test_files_of_a_validation_split_are_tested_on_likewise(tmp_path, caplog, other, ending):
    if ending == "parquet":
        folder = parquet_set(tmp_path / "mine")
        (folder / "test.parquet").rename(folder / f"{other}-00000-of-00001.parquet")
        assert_holds_the_set(load(tmp_path), "mine", ("0", "1", "2"))
    else:
        folder = text_files(tmp_path / "mine")
        (folder / "test.txt").rename(folder / f"{other}.txt")
        assert load_text("mine", data_dir=tmp_path, cache=False).test == ("three",)
    assert f"no split called test, testing on {other}" in caplog.text


def test_beside_a_test_split_the_validation_is_not_read(tmp_path, caplog):
    folder = image_folder(tmp_path / "mine")
    write(folder / "val/class_0/a.png", b"no image")
    assert_holds_the_set(load(tmp_path), "mine", CLASSES)
    assert not caplog.messages


# --- the data directory ---------------------------------------------------------------------------


@pytest.mark.parametrize("from_environment", [False, True])
@pytest.mark.parametrize("source", ["auto", "directory"])
@pytest.mark.parametrize("kind", ["absent", "a file", "empty", "another set"])
@pytest.mark.parametrize(("read", "name"), [(load_images, "mnist"), (load_text, "e2e")])
def test_what_was_named_must_be_there(
    tmp_path, monkeypatch, from_environment, source, kind, read, name
):
    root = tmp_path / "data"
    if kind == "a file":
        root.write_text("")
    elif kind != "absent":
        root.mkdir()
        if kind == "another set":
            parquet_set(root / "fashion_mnist")
            text_files(root / "stories")
    options = {"data_dir": root}
    if from_environment:
        options = {}
        monkeypatch.setenv("STEPSMITH_DATA_DIR", str(root))
    want = {"absent": "does not exist", "a file": "is no folder"}.get(kind, f"holds no {name}")
    with pytest.raises(DataError, match=f"^{name}: .*{want}.*") as caught:
        read(name, source=source, cache=False, **options)
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_does_not_come_from_a_directory_needs_none(tmp_path):
    assert load_text("e2e", source="sample", data_dir=tmp_path / "absent").origin == "sample"


def test_an_empty_name_of_a_directory_is_no_directory():
    for read, name in ((load_images, "mnist"), (load_text, "e2e")):
        with pytest.raises(ValueError, match="data_dir is empty"):
            read(name, data_dir="")
    assert "does not exist" in refusal("mnist", data_dir="x" * 5000)
    assert "data_dir '~nobody-here/x'" in refusal("mnist", data_dir="~nobody-here/x")


def test_a_set_named_by_its_owner_may_come_from_the_hub_all_the_same(tmp_path):
    assert "no hub (test)" in refusal("me/birds", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["MNIST", "Fashion-MNIST", "FashionMNIST"])
def test_a_folder_of_one_known_set_is_not_another(tmp_path, name):
    folder = idx_set(tmp_path / name / "raw")
    for place in (folder, folder.parent):
        assert "holds no kmnist" in refusal("kmnist", data_dir=place)


# --- what is opened -------------------------------------------------------------------------------


def fifo(path):
    os.mkfifo(path)


def endless(path):
    path.symlink_to("/dev/zero")


def listener(path):
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def loop(path):
    path.symlink_to(path.name)


def broken(path):
    path.symlink_to("nowhere")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs special files")
@pytest.mark.parametrize("make", [fifo, endless, listener, loop, broken])
@pytest.mark.parametrize("form", ["png", "parquet", "idx", "text"])
def test_only_files_are_opened(tmp_path, make, form):
    folder = tmp_path / "mine"
    made = {
        "png": (image_folder, "train/class_0/000.png"),
        "parquet": (parquet_set, "train.parquet"),
        "idx": (idx_set, "train-images-idx3-ubyte"),
        "text": (text_files, "train.txt"),
    }[form]
    path = made[0](folder) / made[1]
    path.unlink()
    make(path)
    said = "cannot be read" if make in (loop, broken) else "is a pipe, socket or device"
    with pytest.raises(DataError, match=said) as caught:
        (load_text if form == "text" else load_images)("mine", data_dir=tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_to_files_and_folders_are_followed(tmp_path):
    image_folder(tmp_path / "kept")
    folder = tmp_path / "data/mine"
    folder.mkdir(parents=True)
    (folder / "train").symlink_to(tmp_path / "kept/train")
    shutil.copytree(tmp_path / "kept/test", folder / "test")
    path = folder / "test/class_0/000.png"
    path.unlink()
    path.symlink_to(tmp_path / "kept/test/class_0/000.png")
    assert_holds_the_set(load(tmp_path / "data"), "mine", CLASSES)


def test_a_link_in_a_circle_among_classes_is_left_out(tmp_path, caplog):
    folder = image_folder(tmp_path / "mine")
    loop(folder / "train/round")
    (folder / "train/class_0/up").symlink_to("..")
    assert_holds_the_set(load(tmp_path), "mine", CLASSES)
    assert "1 file of other formats or places (round 1), 1 folder within class" in caplog.text


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=f"^{tmp_path}: cannot be listed .Permission denied.$"):
        Listing.of(tmp_path)


def test_a_folder_that_cannot_be_listed_hides_no_others(tmp_path, monkeypatch):
    image_folder(tmp_path / "mine")
    (tmp_path / "private").mkdir()
    real = os.scandir

    def refuse(path):
        if Path(path).name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "did you mean 'mine'?" in refusal("mines", data_dir=tmp_path)


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    with pytest.raises(DataError, match="must be a file, is a folder"):
        regular(tmp_path)


# --- the limit ------------------------------------------------------------------------------------


def test_the_limit_may_be_set(monkeypatch):
    assert limit() == 2 * 2**30
    monkeypatch.setenv("STEPSMITH_DATA_LIMIT_GIB", "0.5")
    assert limit() == 2**29
    require_room("here", 2**29, "this")
    with pytest.raises(DataError, match=r"^here: this would take 0.5 GiB.*DATA_LIMIT_GIB=1$"):
        require_room("here", 2**29 + 1, "this")
    monkeypatch.setenv("STEPSMITH_DATA_LIMIT_GIB", "")
    assert limit() == 2 * 2**30


@pytest.mark.parametrize("value", ["two", "0", "-1", "nan", "inf", "1e99"])
def test_the_limit_is_a_number(monkeypatch, value):
    monkeypatch.setenv("STEPSMITH_DATA_LIMIT_GIB", value)
    with pytest.raises(DataError, match=f"must be a number of GiB above 0, got '{value}'"):
        limit()
