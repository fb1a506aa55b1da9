"""Images and labels in idx files: their names, and what their headers promise."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
import zlib

import pytest
from tests.tasks.test_datasets import assert_holds_the_set, idx_bytes, idx_set, pixels

from stepsmith.tasks.datasets import load_images
from stepsmith.tasks.files import DataError
from stepsmith.tasks.idx import holds_idx, read_idx

DIGITS = tuple("0123456789")


def renamed(folder, change):
    for path in list(folder.iterdir()):
        path.rename(path.with_name(change(path.name)))


NAMES = {
    "dotted": lambda name: name.replace("-idx", ".idx"),
    "underlined": lambda name: name.replace("-", "_"),
    "capital": lambda name: name.upper().replace("UBYTE.GZ", "ubyte.GZ"),
    "called test": lambda name: name.replace("t10k", "test"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("change", NAMES)
def test_customary_names_are_found(tmp_path, change, zipped):
    renamed(idx_set(tmp_path / "mnist", zipped=zipped), NAMES[change])
    assert_holds_the_set(load_images("mnist", data_dir=tmp_path), "mnist", DIGITS)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("folder", "name"),
    [("MNIST", "mnist"), ("FashionMNIST", "fashion_mnist"), ("KMNIST", "kmnist")],
)
@pytest.mark.parametrize("below", ["", "X", "X/raw"])
def test_the_folders_of_torchvision_are_found(tmp_path, folder, name, below, zipped):
    raw = idx_set(tmp_path / folder / "raw", zipped=zipped)
    loaded = load_images(name, data_dir=tmp_path / below.replace("X", folder), cache=False)
    assert loaded.origin == f"directory:{raw}"
    assert loaded.classes[0] == {"mnist": "0", "kmnist": "o"}.get(name, "T-shirt/top")


def test_other_files_are_not_taken_for_idx_files(tmp_path):
    for name in ("my-train-images-idx3-ubyte", "train-images-idx3-ubyte.bak", "train-images-idx3"):
        (tmp_path / name).write_bytes(b"")
    assert not holds_idx(tmp_path)


def test_plain_files_come_before_packed_ones(tmp_path):
    idx_set(tmp_path / "mnist")
    (tmp_path / "mnist/train-images-idx3-ubyte.gz").write_bytes(b"damaged")
    assert_holds_the_set(load_images("mnist", data_dir=tmp_path), "mnist", DIGITS)


def test_a_packed_file_in_several_parts_is_read_whole(tmp_path):
    folder = idx_set(tmp_path, zipped=True)
    path = folder / "train-images-idx3-ubyte.gz"
    data = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(data[:100]) + gzip.compress(data[100:]))
    assert read_idx(folder, "train")[0].tobytes() == data[16:]


def header(*shape):
    return struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape), *shape)


def packed(data, zeros=0):
    """A gzip file of the data and zeros after it."""
    packer = zlib.compressobj(9, wbits=31)
    parts = [packer.compress(data)]
    parts += [packer.compress(bytes(2**20)) for _ in range(zeros // 2**20)]
    return b"".join([*parts, packer.compress(bytes(zeros % 2**20)), packer.flush()])


def refused(folder, message):
    """Reading is refused, in one line and without taking memory."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message) as caught:
            read_idx(folder, "train")
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(60_000, 28, 28), (2**32 - 1,) * 3, (1, 1 << 16, 1 << 16)])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_header_is_held_against_its_file(tmp_path, shape, zipped):
    folder = idx_set(tmp_path)
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(header(*shape) + bytes(100))
    if zipped:
        path.with_name(path.name + ".gz").write_bytes(packed(path.read_bytes()))
        path.unlink()
    refused(folder, r"truncated or damaged, expected .* bytes for shape .*, got")


def test_a_file_that_unpacks_to_more_than_promised_is_left_at_once(tmp_path):
    folder = idx_set(tmp_path)
    (folder / "train-images-idx3-ubyte").unlink()
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(packed(header(12, 6, 5), zeros=2**26))
    refused(folder, "expected 376 bytes for shape 12x6x5, got .* or more")


def test_a_file_that_keeps_a_promise_above_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPSMITH_DATA_LIMIT_GIB", str(2**26 / 2**30))
    folder = idx_set(tmp_path)
    path = folder / "train-images-idx3-ubyte"
    path.unlink()
    path = path.with_name(path.name + ".gz")
    path.write_bytes(packed(header(2**16, 2**5, 2**5), zeros=2**26))
    assert len(path.read_bytes()) < 2**18
    assert read_idx_shape(folder) == (2**16, 1, 2**5, 2**5)
    monkeypatch.setenv("STEPSMITH_DATA_LIMIT_GIB", str(2**25 / 2**30))
    refused(folder, "would take 0.0625 GiB, and the limit is 0.0312; .*DATA_LIMIT_GIB=1")


def read_idx_shape(folder):
    (folder / "train-labels-idx1-ubyte").write_bytes(header(2**16) + bytes(2**16))
    return read_idx(folder, "train")[0].shape


def test_a_packed_file_with_a_wrong_checksum_is_refused(tmp_path):
    folder = idx_set(tmp_path, zipped=True)
    path = folder / "train-images-idx3-ubyte.gz"
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot be read .CRC check failed"):
        read_idx(folder, "train")


def test_memory_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    def none(*_):
        raise MemoryError("Unable to allocate 3 GiB")

    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(pixels(3)))
    monkeypatch.setattr("stepsmith.tasks.idx.np.empty", none)
    with pytest.raises(DataError, match=r"cannot be read .Unable to allocate 3 GiB"):
        read_idx(tmp_path, "train")
