"""Encoded images: the formats that are opened, and what they promise before they are decoded."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from tests.tasks.test_datasets import TRAIN, image_folder, pixels, png, refusal, write_parquet

from stepsmith.tasks import files
from stepsmith.tasks.datasets import load_images
from stepsmith.tasks.files import DataError
from stepsmith.tasks.image_files import FORMATS, decode_all

COLOUR = pixels(4, (6, 5, 3))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("STEPSMITH_DATA_LIMIT_GIB", raising=False)
    monkeypatch.setattr(files, "_said", set())


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        buffer, kind, **options
    )
    return buffer.getvalue()


def decoded(*contents):
    return decode_all([(f"row {i}", c) for i, c in enumerate(contents)], len(contents), "here")


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_the_named_formats_are_opened(kind):
    assert decoded(encoded(COLOUR[0], kind)).shape == (1, 3, 6, 5)


OTHERS = ("EPS", "GIF", "TIFF", "PPM", "PDF", "ICO", "TGA", "PCX", "JPEG2000", "AVIF", "DDS", "SGI")


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("place", ["folder", "bytes", "path", "later"])
def test_no_other_format_is_opened_whatever_the_file_is_called(tmp_path, monkeypatch, kind, place):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("a program was run"))
    try:
        content = encoded(COLOUR[0], kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    if place == "folder":
        folder = image_folder(tmp_path / "mine")
        (folder / "train/class_0/000.png").write_bytes(content)
    else:
        row = {"bytes": content, "path": None}
        if place == "path":
            (tmp_path / "mine").mkdir()
            (tmp_path / "mine/x.png").write_bytes(content)
            row = {"bytes": None, "path": "x.png"}
        rows = [*([TRAIN[0]] if place == "later" else []), row]
        for split in ("train", "test"):
            write_parquet(tmp_path / f"mine/{split}.parquet", rows, [0] * len(rows))
    assert "cannot decode this image (cannot identify" in refusal("mine", data_dir=tmp_path)


def test_images_are_turned_as_their_camera_was():
    original = Image.fromarray(pixels(1, (16, 8, 3))[0])
    for orientation, turned in (
        (1, original),
        (3, original.rotate(180)),
        (6, original.transpose(Image.Transpose.ROTATE_270)),
        (9, original),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        want = np.asarray(turned).transpose(2, 0, 1)
        np.testing.assert_array_equal(decoded(encoded(original, "PNG", exif=exif))[0], want)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_a_moving_image_the_first_frame_is_taken_and_said(caplog, kind):
    first, second = (Image.fromarray(array) for array in COLOUR[:2])
    moving = encoded(first, kind, save_all=True, append_images=[second], lossless=True)
    still = encoded(first, kind, lossless=True)
    got = decoded(still, moving)
    np.testing.assert_array_equal(got[1], got[0])
    assert "took the first frame of 1 animated images (row 1, ...)" in caplog.text


def test_colours_of_print_become_rgb():
    image = Image.fromarray(COLOUR[0]).convert("CMYK")
    want = np.asarray(Image.open(io.BytesIO(encoded(image, "JPEG"))).convert("RGB"))
    np.testing.assert_array_equal(decoded(encoded(image, "JPEG"))[0], want.transpose(2, 0, 1))


@pytest.mark.parametrize("cut", [0, 1, 8, 20, 40, -100])
@pytest.mark.parametrize("kind", FORMATS)
def test_cut_images_are_refused(kind, cut):
    content = encoded(pixels(1, (60, 50, 3))[0], kind)
    with pytest.raises(DataError, match=r"^row 1: cannot decode this image") as caught:
        decoded(content, content[:cut])
    assert "\n" not in str(caught.value)


# --- sizes ----------------------------------------------------------------------------------------


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def promising(wide, high, colour=2):
    """A small PNG that promises so many pixels."""
    head = struct.pack(">IIBBBBB", wide, high, 8, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def undecoded(monkeypatch):
    """Fails where pixels are decoded."""
    monkeypatch.setattr(Image.Image, "tobytes", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))


@pytest.mark.usefixtures("undecoded")
@pytest.mark.parametrize(
    ("size", "count", "message"),
    [
        ((30_000, 30_000), 1, "cannot decode this image .*decompression bomb"),
        ((12_000, 12_000), 1, "cannot decode this image .*decompression bomb"),
        ((9_000, 9_000), 10, "here: 10 images of 3x9000x9000 would take 2.26 GiB, .* limit is 2;"),
        ((100, 100), 10**6, "here: 1000000 images of 3x100x100 would take 27.9 GiB"),
    ],
)
def test_sizes_are_looked_at_before_anything_is_decoded(size, count, message):
    with pytest.raises(DataError, match=message) as caught:
        decode_all([("row", promising(*size))], count, "here")
    assert "\n" not in str(caught.value)


def test_the_first_image_tells_the_size_of_the_others():
    with pytest.raises(DataError, match="row 1: image is 3x9000x9000 but row 0 is 3x6x5"):
        decoded(encoded(COLOUR[0], "PNG"), promising(9000, 9000))


def test_the_limit_is_of_the_decoded_set(tmp_path, monkeypatch):
    image_folder(tmp_path / "mine")
    monkeypatch.setenv("STEPSMITH_DATA_LIMIT_GIB", repr(len(TRAIN) * 30 / 2**30))
    for path in tmp_path.rglob("*.png"):
        if path.stat().st_size > 360:
            pytest.skip("the files themselves are above the limit")
    assert load_images("mine", data_dir=tmp_path, cache=False).train_images.shape[0] == 12
    monkeypatch.setenv("STEPSMITH_DATA_LIMIT_GIB", repr((len(TRAIN) * 30 - 1) / 2**30))
    said = refusal("mine", data_dir=tmp_path, cache=False)
    assert said.startswith(f"{tmp_path / 'mine/train'}: 12 images of 1x6x5 would take 3.35e-07 GiB")


def test_a_large_file_of_an_image_is_not_read(tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "mine")
    path = folder / "train/class_0/000.png"
    with path.open("ab") as file:
        file.truncate(3 * 2**30)  # takes no room on disk
    assert "000.png: an image would take 3 GiB" in refusal("mine", data_dir=tmp_path)


def test_as_many_images_as_labels():
    rows = [(f"row {i}", png(TRAIN[i])) for i in range(3)]
    for count in (2, 4):
        with pytest.raises(DataError, match=f"here: {count} labels but 3 images"):
            decode_all(rows, count, "here")
    assert torch.from_numpy(decode_all(rows, 3, "here")).shape == (3, 1, 6, 5)


def test_memory_that_is_not_there_is_one_line(monkeypatch):
    content = png(TRAIN[0])

    def none(*_):
        raise MemoryError

    monkeypatch.setattr("stepsmith.tasks.image_files.np.empty", none)
    with pytest.raises(DataError, match="here: no memory for 1x1x6x5 bytes"):
        decoded(content)
