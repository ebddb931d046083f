"""No part of a file that was cut off or damaged is ever taken for the whole of it."""

import io
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from danet.datasets.image_io import MAX_PIXELS, inspect_dropped, read_image, read_labels, to_rgb
from danet.errors import InputError

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (40, 52, 3), dtype=np.uint8)


def encode(array, kind, mode=None, **options):
    stream = io.BytesIO()
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(stream, kind, **options)
    return stream.getvalue()


NOTES = PngImagePlugin.PngInfo()
NOTES.add(b"gAMA", struct.pack(">I", 100000))
NOTES.add(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))
KINDS = {
    "PNG": encode(NOISE, "PNG"),
    "grey PNG": encode(NOISE[..., 0], "PNG"),
    "palette PNG": encode(NOISE[..., 0] % 7, "PNG", "P"),
    "16-bit PNG": encode(NOISE[..., 0].astype(np.uint16) * 200, "PNG"),
    "RGBA PNG": encode(NOISE, "PNG", "RGBA"),
    "transparent palette PNG": encode(NOISE[..., 0] % 7, "PNG", "P", transparency=bytes(range(7))),
    "PNG with a colour profile": encode(NOISE, "PNG", pnginfo=NOTES),
    "JPEG": encode(NOISE, "JPEG", quality=90),
    "progressive JPEG": encode(NOISE, "JPEG", progressive=True),
    "grey JPEG": encode(NOISE[..., 1], "JPEG"),
    "CMYK JPEG": encode(NOISE, "JPEG", "CMYK"),
    "JPEG with restarts": encode(NOISE, "JPEG", restart_marker_blocks=2),
}
LABELS = ("grey PNG", "palette PNG", "16-bit PNG")
CASES = [*((kind, read_image) for kind in KINDS), *((kind, read_labels) for kind in LABELS)]


def pillow(data):
    """Reads a picture by Pillow alone."""
    with Image.open(io.BytesIO(data)) as picture:
        if picture.mode == "I;16":
            grey = (np.asarray(picture).astype(np.int64) // 257).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        picture.info.pop("transparency", None)  # it would warn
        return np.array(picture.convert("RGB"))


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_and_labels_are_as_pillow_reads_them(tmp_path, kind):
    path = tmp_path / "a.x"
    path.write_bytes(KINDS[kind])
    assert np.array_equal(read_image(path, max_pixels=40 * 52), pillow(KINDS[kind]))
    with pytest.raises(InputError, match=r"52 x 40 are 2080 pixels, .* data.max_pixels=2079;"):
        read_image(path, max_pixels=40 * 52 - 1)
    with Image.open(path) as picture:
        assert np.array_equal(to_rgb(picture, "image 0"), pillow(KINDS[kind]))
        if kind in LABELS:
            assert np.array_equal(read_labels(path), np.array(picture))


@pytest.mark.parametrize(("kind", "read"), CASES)
def test_a_file_cut_anywhere_is_refused(tmp_path, kind, read):
    data, path = KINDS[kind], tmp_path / "a.x"
    cuts = {*range(40), *range(40, len(data) - 40, max(1, len(data) // 60))}
    cuts |= {*range(len(data) - 40, len(data))}
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: not a readable "):
            read(path)
    path.write_bytes(data + b"what somebody's camera adds")
    assert read(path).shape[:2] == NOISE.shape[:2]


@pytest.mark.parametrize(("kind", "read"), [c for c in CASES if "PNG" in c[0]])
def test_a_flipped_bit_of_a_png_is_refused_wherever_it_is(tmp_path, kind, read):
    data, path = KINDS[kind], tmp_path / "a.x"
    for place in sorted({*range(60), *range(60, len(data), max(1, len(data) // 60))}):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: "):
            read(path)


def test_a_stream_that_was_cut_before_it_was_wrapped_is_refused(tmp_path):
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in NOISE))
    path = tmp_path / "a.png"
    for stream in (rows, rows[:-2000]):
        with path.open("wb") as file:  # with right checksums around it
            file.write(b"\x89PNG\r\n\x1a\n")
            PngImagePlugin.putchunk(file, b"IHDR", struct.pack(">IIBBBBB", 52, 40, 8, 2, 0, 0, 0))
            PngImagePlugin.putchunk(file, b"IDAT", stream)
            PngImagePlugin.putchunk(file, b"IEND")
        if stream is rows:
            assert np.array_equal(read_image(path), NOISE)
    with pytest.raises(InputError, match="not a readable image"):
        read_image(path)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_grey_of_32_bits_is_refused(tmp_path, kind):
    picture = Image.fromarray(np.full((4, 5), 200, kind))
    picture.save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"x\.tif: grey of 32 bits .* save it with 8 or 16 bits"):
        read_image(tmp_path / "x.tif")
    with pytest.raises(InputError, match="image 3: grey of 32 bits"):
        to_rgb(picture, "image 3")


def test_an_honest_large_picture_passes_and_pillows_limit_stays_as_it_was(tmp_path, monkeypatch):
    """With both limits made small, since 108 million pixels take a second."""
    assert MAX_PIXELS > 12000 * 9000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    path = tmp_path / "a.bmp"
    Image.fromarray(NOISE).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path).shape == NOISE.shape  # four times Pillow's limit: it would refuse
    assert Image.MAX_IMAGE_PIXELS == 500


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_png_longer_than_opencv_takes_is_read(tmp_path, dtype):
    strip = np.arange(2**20 + 1, dtype=dtype)[None]
    Image.fromarray(strip).convert("RGB" if dtype == np.uint8 else "I;16").save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")[..., 0]
    assert np.array_equal(found, strip.astype(np.int64) * 255 // np.iinfo(dtype).max)
    inspect_dropped(tmp_path / "a.png")
