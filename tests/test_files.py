"""No part of a file that was cut off or damaged is ever taken for the whole of it."""

import io
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from danet.datasets.image_io import MAX_PIXELS, read_image, read_labels, to_rgb
from danet.errors import InputError

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (40, 52, 3), dtype=np.uint8)


def encode(array, kind, mode=None, **options):
    stream = io.BytesIO()
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(stream, kind, **options)
    return stream.getvalue()


KINDS = {
    "PNG": encode(NOISE, "PNG"),
    "grey PNG": encode(NOISE[..., 0], "PNG"),
    "palette PNG": encode(NOISE[..., 0] % 7, "PNG", "P"),
    "16-bit PNG": encode(NOISE[..., 0].astype(np.uint16) * 200, "PNG"),
    "RGBA PNG": encode(NOISE, "PNG", "RGBA"),
    "JPEG": encode(NOISE, "JPEG", quality=90),
    "progressive JPEG": encode(NOISE, "JPEG", progressive=True),
    "grey JPEG": encode(NOISE[..., 1], "JPEG"),
    "CMYK JPEG": encode(NOISE, "JPEG", "CMYK"),
    "JPEG with restarts": encode(NOISE, "JPEG", restart_marker_blocks=2),
}
LABELS = ("grey PNG", "palette PNG", "16-bit PNG")


def pillow(data):
    """Reads a picture by Pillow alone."""
    with Image.open(io.BytesIO(data)) as picture:
        if picture.mode == "I;16":
            grey = (np.asarray(picture).astype(np.int64) // 257).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        return np.array(picture.convert("RGB"))


def cases():
    yield from ((kind, read_image) for kind in KINDS)
    yield from ((kind, read_labels) for kind in LABELS)


def name_of(value):
    return value if isinstance(value, str) else value.__name__


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_and_labels_are_as_pillow_reads_them(tmp_path, kind):
    path = tmp_path / "a.x"
    path.write_bytes(KINDS[kind])
    assert np.array_equal(read_image(path), pillow(KINDS[kind]))
    if kind in LABELS:
        with Image.open(path) as picture:
            assert np.array_equal(read_labels(path), np.array(picture))


def test_color_profiles_and_gamma_change_nothing(tmp_path):
    path, notes = tmp_path / "a.png", PngImagePlugin.PngInfo()
    notes.add(b"gAMA", struct.pack(">I", 100000))
    notes.add(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))
    Image.fromarray(NOISE).save(path, pnginfo=notes)
    assert np.array_equal(read_image(path), NOISE)


@pytest.mark.parametrize(("kind", "read"), list(cases()), ids=name_of)
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


@pytest.mark.parametrize(("kind", "read"), [c for c in cases() if "PNG" in c[0]], ids=name_of)
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


def test_grey_of_16_bits_is_the_same_from_a_file_and_from_pillow(tmp_path):
    Image.fromarray(np.arange(0, 65536, 257, dtype=np.uint16)[None]).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        found = to_rgb(picture, "image 0")
    assert np.array_equal(found[0, :, 0], np.arange(256))
    assert np.array_equal(read_image(tmp_path / "x.png"), found)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "CMYK JPEG", "16-bit PNG"])
def test_the_limit_is_the_number_of_pixels(tmp_path, kind):
    path = tmp_path / "a.x"
    path.write_bytes(KINDS.get(kind) or encode(NOISE, kind))
    assert read_image(path, max_pixels=40 * 52).shape == NOISE.shape
    with pytest.raises(InputError, match=r"52 x 40 are 2080 pixels, .* data.max_pixels=2079;"):
        read_image(path, max_pixels=40 * 52 - 1)


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


def test_a_palette_with_transparent_colours_is_read_without_a_warning(tmp_path):
    picture = Image.fromarray(NOISE).quantize(16)
    picture.save(tmp_path / "a.png", transparency=bytes(range(16)))
    assert np.array_equal(read_image(tmp_path / "a.png"), np.array(picture.convert("RGB")))


def test_what_the_system_says_is_reported(tmp_path):
    with pytest.raises(InputError, match=r"b.png: not a readable image \(the file does not exist"):
        read_image(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"not a readable image \(Is a directory"):
        read_image(tmp_path)
