"""Files of tensors and a manifest: whole, own and unchanged, or refused in one line."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from stepsmith import CheckpointError, store

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(1.5, dtype=torch.float64),
    "empty": torch.empty(0, 2),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "turned": torch.arange(6).reshape(2, 3).t(),
}
MANIFEST = {"kind": "rule", "rate": 0.1, "text": "√", "list": [1, {"deep": None}]}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file.safetensors"
    store.write(path, TENSORS, MANIFEST)
    return path


def test_round_trip(path):
    tensors, manifest = store.read(path, "rule")
    assert tensors.keys() == TENSORS.keys()
    for key, value in TENSORS.items():
        torch.testing.assert_close(tensors[key], value, rtol=0, atol=0)
    assert {key: manifest[key] for key in MANIFEST} == MANIFEST


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    whole = torch.arange(4.0)
    store.write(tmp_path / "f", {"one": whole, "two": whole[1:]}, MANIFEST)
    tensors, _ = store.read(tmp_path / "f", "rule")
    assert torch.equal(tensors["two"], whole[1:])


def test_no_flipped_bit_goes_unnoticed(path):
    """One bit of each byte: the file is refused in one line, or means what it meant."""
    whole = path.read_bytes()
    want = store.read(path, "rule")
    fingerprint, messages = store.fingerprint(want[0]), []
    for i in range(len(whole)):
        damaged = bytearray(whole)
        damaged[i] ^= 1 << i % 8
        path.write_bytes(bytes(damaged))
        try:
            tensors, manifest = store.read(path, "rule")
        except CheckpointError as error:
            messages.append(str(error))
        else:
            assert store.fingerprint(tensors) == fingerprint
            assert manifest == want[1]
    assert len(messages) > 0.9 * len(whole)
    assert all(text.startswith(str(path)) and "\n" not in text for text in messages)


def test_no_truncation_goes_unnoticed(path):
    whole = path.read_bytes()
    for size in range(0, len(whole), 3):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            store.read(path, "rule")


def test_a_changed_manifest_is_refused(path):
    whole = path.read_bytes()
    assert whole.count(b"0.1") == 1
    path.write_bytes(whole.replace(b"0.1", b"0.9"))
    with pytest.raises(CheckpointError, match="manifest was changed or corrupted"):
        store.read(path, "rule")


def test_the_fingerprint_is_of_names_dtypes_shapes_and_bytes():
    base = {"a": torch.zeros(2, 3)}
    assert store.fingerprint(base) == store.fingerprint({"a": torch.zeros(3, 2).t()})
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.full((2, 3), -0.0)},
        {},
    ]
    prints = [store.fingerprint(tensors) for tensors in (base, *others)]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), CheckpointError),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), CheckpointError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["full", "quota", "interrupt"],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    path, monkeypatch, failing, error, raised
):
    old = path.read_bytes()

    def fail(*arguments):
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(raised) as caught:
        store.write(path, {"a": torch.ones(1)}, MANIFEST)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "f").mkdir()
    with pytest.raises(CheckpointError, match="could not be written"):
        store.write(tmp_path / "f", TENSORS, MANIFEST)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("the file was unpickled",))


def test_pickles_are_refused_unread(tmp_path):
    path = tmp_path / "file.safetensors"
    torch.save(Trap(), path)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        store.read(path, "rule")


def test_fingerprint_of_a_number_expanded_from_nothing():
    expanded = torch.zeros(()).expand(1, 1)
    assert store.fingerprint({"a": expanded}) == store.fingerprint({"a": torch.zeros(1, 1)})


def test_trying_a_place_leaves_nothing(tmp_path):
    store.require_place(tmp_path / "a" / "b", "out")
    store.require_place(tmp_path, "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "file/sub", "/dev/full", "/dev/full/sub", "link"])
def test_places_that_cannot_be_written_to(tmp_path, place):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "void" / "void")
    with pytest.raises(store.CheckpointError, match=f"^out {tmp_path / place}: is no folder that"):
        store.require_place(tmp_path / place, "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_full_disk_is_no_place(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(store.CheckpointError, match="No space left"):
        store.require_place(tmp_path / "a", "out")
    assert not list(tmp_path.iterdir())
