"""Sets on the hub: which commit is loaded, and that none of them runs a program."""

from __future__ import annotations

import re

import pytest
from tests.tasks.test_datasets import (
    ROOT,
    TRAIN,
    TRAIN_LABELS,
    assert_holds_the_set,
    parquet_set,
    png,
    refusal,
    write_parquet,
)
from tests.tasks.test_text_data import parquet_set as text_set

from stepsmith.tasks import files, image_hub, sources
from stepsmith.tasks.data import as_data
from stepsmith.tasks.datasets import load_images
from stepsmith.tasks.files import DataError
from stepsmith.tasks.sources import where_from
from stepsmith.tasks.text_data import KNOWN_TEXTS, load_text

hf = pytest.importorskip("datasets")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A hub out of reach, nothing kept of it, and an empty folder to work in."""
    monkeypatch.setattr(files, "_said", set())
    monkeypatch.setattr(sources, "_noticed", set())
    monkeypatch.setattr(image_hub, "_hub_out_of_reach", lambda: "no hub (test)")
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What `load_dataset` is called with, for repositories in the folder `hub`."""
    calls, real = [], hf.load_dataset

    def load_dataset(hub_id, **options):
        calls.append((hub_id, options))
        parts = {p.stem: str(p) for p in (tmp_path / "hub" / hub_id).glob("*.parquet")}
        return real("parquet", data_files=parts, cache_dir=tmp_path / "cache")

    monkeypatch.setattr(hf, "load_dataset", load_dataset)
    monkeypatch.setattr(image_hub, "_hub_out_of_reach", lambda: None)
    return calls


def prepare(tmp_path, hub_id, commit, folder):
    """What `load_dataset` leaves behind of a set at a commit."""
    parts = {s: str(folder / f"{s}.parquet") for s in ("train", "test")}
    builder = hf.load_dataset_builder("parquet", data_files=parts, cache_dir=tmp_path / "elsewhere")
    owner, name = hub_id.split("/")
    builder.dataset_name = name
    builder.download_and_prepare(
        str(tmp_path / f"prepared/{owner}___{name}/default/0.0.0/{commit}")
    )


# --- commits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(image_hub.KNOWN))
def test_known_sets_are_loaded_at_their_commit(tmp_path, asked, name):
    known = image_hub.KNOWN[name]
    assert known.revision is None or re.fullmatch("[0-9a-f]{40}", known.revision)
    names = [str(i) for i in range(10)]
    folder = tmp_path / "hub" / known.hub_id
    parquet_set(folder, image=known.image, label=known.label, names=names)
    load_images(name, cache=False)
    assert asked == [(known.hub_id, {"revision": known.revision})]


def test_a_revision_may_be_named(tmp_path, asked):
    parquet_set(tmp_path / "hub/ylecun/mnist", names=[str(i) for i in range(10)])
    text_set(tmp_path / "hub/tuetschek/e2e_nlg", "human_reference")
    load_images("mnist", revision="dev", cache=False)
    load_text("e2e", revision="dev", cache=False)
    load_text("e2e", cache=False)
    assert [options for _, options in asked] == [
        {"revision": "dev"}, {"revision": "dev"}, {"revision": KNOWN_TEXTS["e2e"].revision},
    ]  # fmt: skip


@pytest.mark.parametrize(("read", "name"), [(load_images, "mnist"), (load_text, "e2e")])
def test_a_revision_is_of_the_hub(read, name):
    with pytest.raises(DataError, match=r"no hub \(test\)"):
        read(name, revision=COMMIT)  # not the sample
    for source in ("directory", "sample"):
        with pytest.raises(ValueError, match=f"revision= is of sets on the hub.*'{source}'"):
            read(name, source=source, revision=COMMIT)


def test_the_commit_is_told_and_kept_to(tmp_path):
    folder = parquet_set(tmp_path / "files", names=["a", "b", "c"])
    prepare(tmp_path, "me/birds", COMMIT, folder)
    for options in ({}, {"revision": COMMIT}):
        loaded = load_images("me/birds", cache=False, **options)
        assert_holds_the_set(loaded, "me/birds", ("a", "b", "c"))
        assert loaded.origin == f"hub:me/birds@{COMMIT}"
    assert as_data(loaded).name == "me/birds (hub 0123456789, 12 images)"
    # Another commit is not this one.
    assert "no hub (test)" in refusal("me/birds", revision=COMMIT[::-1], cache=False)


def test_texts_tell_their_commit_too(tmp_path):
    folder = text_set(tmp_path / "files", "human_reference")
    prepare(tmp_path, "tuetschek/e2e_nlg", COMMIT, folder)
    assert load_text("e2e", cache=False).origin == f"hub:tuetschek/e2e_nlg@{COMMIT}"


@pytest.mark.parametrize(
    ("origin", "want"),
    [("directory:/home/me/x@1", "directory"), ("sample", "sample"), ("hub:a/b", "hub"),
     (f"hub:a/b@{COMMIT}", "hub 0123456789")],
)  # fmt: skip
def test_where_a_set_is_from_without_folders(origin, want):
    assert where_from(origin) == want


def test_a_split_that_stands_in_for_the_test_split_is_said(tmp_path, asked, caplog):
    folder = parquet_set(tmp_path / "hub/me/birds", names=["a", "b", "c"])
    (folder / "test.parquet").rename(folder / "validation.parquet")
    load_images("me/birds", cache=False)
    assert "hub:me/birds: no split called test, testing on validation" in caplog.text


# --- programs -------------------------------------------------------------------------------------


def test_releases_of_datasets_that_run_programs_are_not_used(monkeypatch):
    (bound,) = re.findall(r'"datasets>=(\d+)', (ROOT / "pyproject.toml").read_text())
    assert int(bound) >= 4
    monkeypatch.setattr(hf, "__version__", "3.6.0")
    said = refusal("mnist", source="hub", cache=False)
    assert "datasets 3.6.0 runs programs" in said
    assert "pip install 'datasets>=4'" in said


def test_no_program_is_trusted():
    for path in (ROOT / "src").rglob("*.py"):
        assert "trust_remote_code" not in path.read_text()


def test_a_folder_in_the_place_of_a_set_is_not_read(tmp_path, asked):
    parquet_set(tmp_path / "here/ylecun/mnist")
    said = refusal("mnist", source="hub", cache=False)
    assert f"{tmp_path / 'here/ylecun/mnist'} would be read in place of the hub's" in said
    assert not asked


def write_paths(tmp_path, path):
    folder = parquet_set(tmp_path / "hub/me/birds", names=["a", "b", "c"])
    rows = [*TRAIN[:11], {"bytes": None, "path": str(path)}]
    write_parquet(folder / "train.parquet", rows, TRAIN_LABELS, names=["a", "b", "c"])


@pytest.mark.usefixtures("asked")
def test_paths_of_a_set_lead_into_what_was_fetched_only(tmp_path):
    (tmp_path / "prepared").mkdir()
    for place in ("prepared/x.png", "outside.png", "here/x.png"):
        (tmp_path / place).write_bytes(png(TRAIN[11]))
    write_paths(tmp_path, tmp_path / "prepared/x.png")
    assert_holds_the_set(load_images("me/birds", cache=False), "me/birds", ("a", "b", "c"))
    for path in (tmp_path / "outside.png", "../outside.png", "/dev/zero"):
        write_paths(tmp_path, path)
        assert "row 11: path" in refusal("me/birds", cache=False)
    write_paths(tmp_path, "nowhere.png")
    assert "cannot be read" in refusal("me/birds", cache=False)


@pytest.mark.usefixtures("asked")
def test_sets_of_the_hub_keep_to_the_limit(tmp_path, monkeypatch):
    parquet_set(tmp_path / "hub/me/birds", names=["a", "b", "c"])
    text_set(tmp_path / "hub/me/tales", train=["x" * 1000])
    monkeypatch.setenv("STEPSMITH_DATA_LIMIT_GIB", repr(900 / 2**30))
    assert "hub:me/birds train: column image would take" in refusal("me/birds", cache=False)
    with pytest.raises(DataError, match="hub:me/tales train: column text would take"):
        load_text("me/tales", cache=False)
