"""Files of tensors and a manifest: whole, own and unchanged, or refused in one line."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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


@pytest.mark.parametrize(
    "text",
    [
        '{"kind": "rule", "kind": "rule"}',
        '{"kind": "rule", "deep": {"a": 1, "b": {"c": 1, "c": 2}}}',
        '{"kind": "rule", "deep": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"kind": "rule", "big": 1' + "0" * 5000 + "}",
        "{",
        "",
    ],
    ids=["twice", "twice-within", "deep", "long-number", "cut", "empty"],
)
def test_manifests_that_json_readers_stumble_over(tmp_path, text):
    path = tmp_path / "f.safetensors"
    save_file({"a": torch.ones(1)}, path, metadata={"stepsmith": text})
    with pytest.raises(CheckpointError, match="manifest is not readable as JSON") as caught:
        store.read(path, "rule")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_manifest_may_be_so_long_and_no_longer(path):
    size = len(json.dumps(store.read(path, "rule")[1]))
    store.read(path, "rule", longest=size)
    with pytest.raises(CheckpointError, match="at most"):
        store.read(path, "rule", longest=size - 1)


def write_raw(path, header: dict, data: bytes) -> None:
    told = json.dumps(header).encode()
    path.write_bytes(len(told).to_bytes(8, "little") + told + data)


@pytest.mark.parametrize(
    ("shape", "offsets", "size"),
    [
        ([2**40], [0, 2**42], 16),
        ([2**62, 2**62, 2**62], [0, 16], 16),
        ([0, 2**64 - 1], [0, 0], 0),
        ([0, 2**63], [0, 0], 0),
        ([4], [0, 16], 12),
        ([4], [16, 0], 16),
        ([4], [8, 24], 24),
    ],
    ids=["beyond", "overflow", "none-of-many", "none-of-too-many", "cut", "backwards", "hole"],
)
def test_sizes_a_file_does_not_hold(tmp_path, shape, offsets, size):
    path = tmp_path / "f.safetensors"
    manifest = json.dumps({"kind": "rule"})
    entry = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    write_raw(path, {"__metadata__": {"stepsmith": manifest}, "a": entry}, bytes(size))
    with pytest.raises(CheckpointError) as caught:
        store.read(path, "rule")
    assert "\n" not in str(caught.value)


def test_the_kind_is_looked_at_before_the_tensors(path, monkeypatch):
    monkeypatch.setattr(store, "fingerprint", lambda tensors: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="holds a 'rule', not a 'run'"):
        store.read(path, "run")


LEFT = {
    "killed": lambda folder: killed_amid_a_save(folder),
    "killed-before": lambda folder: (folder / f".f.safetensors.{ended()}-140000").write_bytes(
        b"half"
    ),
}


def ended() -> int:
    """The number of a process that has ended."""
    child = os.fork()
    if child == 0:  # pragma: no cover - the child never returns
        os._exit(0)
    os.waitpid(child, 0)
    return child


def killed_amid_a_save(folder) -> None:
    child = os.fork()
    if child == 0:  # pragma: no cover - the child never returns
        os.replace = lambda *args: os._exit(9)
        store.write(folder / "other.safetensors", TENSORS, MANIFEST)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("how", LEFT)
def test_what_killed_saves_left_goes_with_the_next(path, how):
    LEFT[how](path.parent)
    others = [".notes.2024-01", ".x.json.2024-y", ".stepsmith-part-mine", ".lock"]
    for name in others:
        (path.parent / name).write_text("")
    assert len(list(path.parent.iterdir())) == len(others) + 2
    store.write_bytes(path.parent / "next", b"")
    assert {p.name for p in path.parent.iterdir()} == {path.name, "next", *others}


def test_what_is_being_written_stays(path):
    """A writer that lives, in another process and older than any limit, loses nothing."""
    folder = path.parent
    begun, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - the child never returns
        whole = os.replace

        def slow(*args):
            os.write(begun[1], b".")
            os.read(go[0], 1)
            whole(*args)

        os.replace = slow
        store.write(folder / "slow.safetensors", TENSORS, MANIFEST)
        os._exit(0)
    os.read(begun[0], 1)
    (work,) = (entry for entry in folder.iterdir() if entry.is_dir())
    os.utime(work, (0, 0))
    store.write_bytes(folder / "quick", b"")
    assert work.exists()
    os.write(go[1], b".")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    store.read(folder / "slow.safetensors", "rule")
    assert {p.name for p in folder.iterdir()} == {path.name, "slow.safetensors", "quick"}


def test_an_error_in_cleaning_up_hides_none(path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refused(*arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "fsync", full)
    for name in ("unlink", "rmdir"):
        monkeypatch.setattr(os, name, refused)
    with pytest.raises(CheckpointError, match="No space left"):
        store.write(path, TENSORS, MANIFEST)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
@pytest.mark.parametrize("kind", ["tensors", "bytes"])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path, mode, kind):
    path = tmp_path / "f"
    path.write_text("")
    path.chmod(mode)
    if kind == "bytes":
        store.write_bytes(path, b"new")
    else:
        store.write(path, TENSORS, MANIFEST)
    assert path.stat().st_mode & 0o7777 == mode


def test_a_file_that_is_replaced_keeps_its_owner(path, monkeypatch):
    given = []
    monkeypatch.setattr(os, "chown", lambda part, *owner: given.append(owner))
    store.write(path, TENSORS, MANIFEST)
    assert given == [(-1, path.stat().st_gid), (path.stat().st_uid, -1)]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(tmp_path, there):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "f", tmp_path / "link"
    if there:
        target.write_text("old")
    link.symlink_to(target)
    store.write_bytes(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_link_that_leads_nowhere(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(link)
    with pytest.raises(CheckpointError, match="could not be written"):
        store.write_bytes(link, b"")
    assert link.is_symlink()


def test_pipes_and_devices_are_no_files(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, kind in ((pipe, "pipe"), (tmp_path, "folder"), (Path("/dev/null"), "device")):
        with pytest.raises(CheckpointError, match=kind):
            store.write_bytes(path, b"")
        with pytest.raises(CheckpointError, match=kind):
            store.read(path, "rule")
        with pytest.raises(CheckpointError, match=kind):
            store.read_json(path)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_long_names_are_written(tmp_path):
    path = tmp_path / ("x" * 255)
    store.write(path, TENSORS, MANIFEST)
    store.read(path, "rule")
    with pytest.raises(CheckpointError, match="too long"):
        store.write(tmp_path / ("x" * 256), TENSORS, MANIFEST)


@pytest.mark.parametrize(
    "error", [errno.EINVAL, errno.ENOTSUP, errno.EIO], ids=["EINVAL", "ENOTSUP", "EIO"]
)
def test_folders_that_cannot_be_synced(tmp_path, monkeypatch, error):
    whole = os.fsync

    def fsync(opened):
        if stat.S_ISDIR(os.fstat(opened).st_mode):
            raise OSError(error, os.strerror(error))
        whole(opened)

    monkeypatch.setattr(os, "fsync", fsync)
    if error == errno.EIO:
        with pytest.raises(CheckpointError, match="may not outlast a power cut"):
            store.write_bytes(tmp_path / "f", b"new")
    else:
        store.write_bytes(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"


def test_the_folder_is_synced_after_the_name_is_there(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        os, "fsync",
        lambda opened: seen.append(
            (stat.S_ISDIR(os.fstat(opened).st_mode), (tmp_path / "f").exists())
        ),
    )  # fmt: skip
    store.write_bytes(tmp_path / "f", b"new")
    assert seen == [(False, False), (True, True)]


def test_a_full_disk_is_said(monkeypatch, tmp_path):
    """A device that is full takes no byte."""

    def write_bytes(path, data):
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(CheckpointError, match="No space left"):
        store.write_bytes(tmp_path / "f", b"new")
    assert not list(tmp_path.iterdir())


def test_a_claimed_folder_is_refused_to_others(tmp_path):
    first, second = store.claimed(tmp_path / "run"), store.claimed(tmp_path / "run")
    with (
        first, pytest.raises(CheckpointError, match="another process is writing there"), second
    ):  # fmt: skip
        pytest.fail("two have it")
    with store.claimed(tmp_path / "run"):
        pass


def test_messages_are_one_line_whatever_the_path(tmp_path):
    path = tmp_path / "a\nb\x1b[2J\u202e.safetensors"
    with pytest.raises(CheckpointError) as caught:
        store.read(path, "rule")
    assert str(caught.value).endswith(r"a\nb\x1b[2J\u202e.safetensors: no such file")


@pytest.mark.parametrize(
    ("given", "raised"), [("", ValueError), ("a\0b", ValueError), (None, TypeError), (3, TypeError),
                          (b"f", TypeError)],
)  # fmt: skip
def test_no_path(given, raised):
    with pytest.raises(raised, match="save: "):
        store.suffixed(given)
