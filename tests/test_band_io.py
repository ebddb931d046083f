"""Bands of files are read as they were written, and their range is measured on what is there."""

import sys

import cv2
import numpy as np
import pytest
from conftest import make_folder, write_pair
from PIL import Image

from danet.bands import bands_of
from danet.datasets.band_io import measure_range, read_bands
from danet.datasets.base import Reading
from danet.datasets.image_io import MAX_PIXELS
from danet.errors import InputError
from danet.types import IGNORE

tifffile = pytest.importorskip("tifffile", reason="the optional extra danet[tiff] is not installed")

RNG = np.random.default_rng(0)
VALUES = RNG.random((21, 34, 5)) * 200
KINDS = (np.uint8, np.uint16, np.int16, np.float32)


def write(path, pixels, **settings):
    tifffile.imwrite(path, pixels, **{"photometric": "minisblack", **settings})
    return path


def plane(pixels):
    return np.moveaxis(pixels, 2, 0)


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd"])
@pytest.mark.parametrize("layout", ["interleaved", "planes", "pages", "tiles"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tiff_is_read_as_it_was_written(tmp_path, kind, layout, compression):
    pixels = VALUES.astype(kind)
    settings = {
        "interleaved": {"planarconfig": "contig"},
        "planes": {"planarconfig": "separate"},
        "pages": {},
        "tiles": {"planarconfig": "contig", "tile": (16, 16)},
    }[layout]
    stored = pixels if layout in ("interleaved", "tiles") else plane(pixels)
    path = write(tmp_path / "x.tif", stored, compression=compression, **settings)
    found, missing = read_bands(path, bands_of([4, 1, 2], [0, 1], None))
    assert missing is None
    assert found.dtype == kind
    assert np.array_equal(found, pixels[..., [3, 0, 1]])


def test_overviews_are_no_bands(tmp_path):
    with tifffile.TiffWriter(tmp_path / "x.tif") as file:
        file.write(VALUES.astype(np.uint16), photometric="minisblack", planarconfig="contig")
        small = VALUES[::2, ::2].astype(np.uint16)
        file.write(small, photometric="minisblack", planarconfig="contig", subfiletype=1)
    found, _ = read_bands(tmp_path / "x.tif", bands_of(5, [0, 1], None))
    assert np.array_equal(found, VALUES.astype(np.uint16))
    with pytest.raises(
        InputError, match=r"5 band\(s\), and data.channels asks for number 6; train with bands"
    ):
        read_bands(tmp_path / "x.tif", bands_of(6, [0, 1], None))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_png_keeps_its_bits_and_the_order_of_its_colours(tmp_path, kind, count):
    pixels = RNG.integers(0, np.iinfo(kind).max, (9, 11, count)).astype(kind)
    order = [2, 1, 0, 3][:count] if count > 1 else [0]
    cv2.imwrite(str(tmp_path / "x.png"), pixels[..., order])
    found, _ = read_bands(tmp_path / "x.png", bands_of(count, [0, 1], None))
    assert found.dtype == kind
    assert np.array_equal(found, pixels)


def test_other_kinds_of_pictures_are_bands(tmp_path):
    grey = RNG.integers(0, 256, (9, 11)).astype(np.uint8)
    kinds = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "P": 3}
    for mode, count in kinds.items():
        path = tmp_path / f"{mode}.png"
        Image.fromarray(grey).convert(mode).save(path)
        found, _ = read_bands(path, bands_of(count, None, None))
        assert np.array_equal(found[..., 0], grey), mode
    Image.fromarray(grey > 99).save(tmp_path / "bit.png")
    found, _ = read_bands(tmp_path / "bit.png", bands_of(1, None, None))
    assert np.array_equal(found[..., 0], 255 * (grey > 99))


@pytest.mark.parametrize("kind", [np.float64, np.int32, np.uint32, np.int8, np.float16])
def test_other_types_become_floats(tmp_path, kind):
    np.save(tmp_path / "x.npy", (VALUES / 2).astype(kind))
    found, _ = read_bands(tmp_path / "x.npy", bands_of(5, [0, 1], None))
    assert found.dtype == np.float32
    assert np.array_equal(found, (VALUES / 2).astype(kind).astype(np.float32))


def test_without_channels_a_picture_is_rgb(tmp_path):
    Image.fromarray(np.full((9, 11), 77, np.uint8)).save(tmp_path / "x.png")
    image, missing = read_bands(tmp_path / "x.png", None)
    assert image.shape == (9, 11, 3)
    assert (image == 77).all()
    assert missing is None


# What is not there


def test_missing_values_are_black_and_ignored_where_all_bands_lack_them(tmp_path):
    pixels = VALUES.astype(np.float32)
    pixels[0, :, 0], pixels[1], pixels[2, 3, 4] = np.nan, np.inf, -np.inf
    write_pair(
        tmp_path,
        "train",
        "a",
        np.zeros((21, 34, 3), np.uint8),
        np.ones((21, 34), np.uint8),
        labels="masks",
    )
    (tmp_path / "images/train/a.png").unlink()
    write(tmp_path / "images/train/a.tif", pixels, planarconfig="contig")
    reading = Reading(channels=5, range=[-7, 200])
    folder = make_folder(root=tmp_path, split="train", classes=["a", "b"], reading=reading)
    image, mask, _ = folder[0]
    assert np.array_equal(image == -7, ~np.isfinite(pixels))
    assert (mask[1] == IGNORE).all()
    assert (np.delete(mask, 1, axis=0) == 1).all()


@pytest.mark.parametrize(
    ("kind", "nodata"),
    [(np.uint16, 0), (np.int16, -9999), (np.float32, -1), (np.float64, np.finfo(float).min)],
)
def test_nodata_of_a_geotiff_is_missing(tmp_path, kind, nodata):
    pixels = 1 + VALUES.astype(kind)
    pixels[:3] = nodata
    tag = (42113, "s", 0, str(nodata), True)
    path = write(tmp_path / "x.tif", pixels, planarconfig="contig", extratags=[tag])
    image, missing = read_bands(path, bands_of(5, [5, 100], None))
    assert missing[:3].all()
    assert not missing[3:].any()
    assert (image[:3] == 5).all()
    assert np.array_equal(image[3:], pixels[3:].astype(image.dtype))


# The range


def test_the_range_is_that_of_percentiles_of_each_band(tmp_path):
    bands, paths = bands_of([2, 5], "auto", None), []
    pixels = np.random.default_rng(1).normal(
        [0, 1000, 5, 6, 30000], [1, 10, 1, 1, 500], (90, 70, 5)
    )
    pixels = pixels.astype(np.float32)
    for i in range(3):
        pixels[i] = np.nan  # does not count, nor do a few hot pixels
        pixels[5, :2, 1] = 1e9
        paths.append(write(tmp_path / f"{i}.tif", pixels, planarconfig="contig"))
    paths.insert(1, tmp_path / "damaged.tif")
    paths[1].write_bytes(b"II*\0")
    found = measure_range(paths, bands, MAX_PIXELS)
    expected = [np.nanpercentile(pixels[..., i], [1, 99]) for i in (1, 4)]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert found == measure_range(paths, bands, MAX_PIXELS)


@pytest.mark.parametrize(("value", "shown"), [(7, "band 2 is 7"), (np.nan, "band 2 is nan")])
def test_a_band_of_one_value_has_no_range(tmp_path, value, shown):
    pixels = VALUES.astype(np.float32)
    pixels[..., 1] = value
    path = write(tmp_path / "x.tif", pixels, planarconfig="contig")
    with pytest.raises(InputError, match=f"data.range=auto: {shown} nearly everywhere"):
        measure_range([path], bands_of(3, "auto", None), MAX_PIXELS)


def test_the_range_of_files_that_cannot_be_read_is_their_error(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        measure_range([tmp_path / "x.tif"], bands_of(3, "auto", None), MAX_PIXELS)


# Bad files


def test_more_than_8_bits_need_a_range(tmp_path):
    path = write(tmp_path / "x.tif", VALUES.astype(np.uint16), planarconfig="contig")
    with pytest.raises(InputError, match=r"x.tif: uint16, 0 to 199, and .* set data.range=auto"):
        read_bands(path, bands_of(5, None, None))
    gaps = write(tmp_path / "y.tif", np.full((8, 8, 3), np.nan, np.float32))
    with pytest.raises(InputError, match="all of it missing"):
        read_bands(gaps, bands_of(1, None, None))


@pytest.mark.parametrize("compression", [None, "lzw"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], ""),
        (lambda data: b"", "the file is empty"),
        (lambda data: b"no picture at all", "not a TIFF file"),
        (lambda data: data[:8] + bytes(200) + data[208:], ""),
    ],
    ids=["cut", "empty", "text", "zeros"],
)
def test_a_damaged_tiff_is_refused_in_one_line(tmp_path, damage, reason, compression):
    pixels = VALUES.astype(np.uint16)
    path = write(tmp_path / "x.tif", pixels, planarconfig="contig", compression=compression)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"x.tif: not a readable image .*{reason}") as caught:
        read_bands(path, bands_of(5, [0, 1], None))
    assert "\n" not in str(caught.value)


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "x.tif", VALUES, planarconfig="contig")
    np.save(tmp_path / "x.npy", VALUES)
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", None)
    for file in (path, tmp_path / "x.npy"):
        with pytest.raises(InputError, match="34 x 21 are 714 pixels"):
            read_bands(file, bands_of(5, [0, 1], None), max_pixels=713)


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3, 4, 5)), np.zeros((4, 4), complex), np.zeros((0, 4, 1)), [object()]]
)
def test_an_array_file_of_another_kind_is_refused(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match=r"x.npy: not a readable image"):
        read_bands(tmp_path / "x.npy", bands_of(1, [0, 1], None))


def test_a_missing_package_is_named_with_the_command(tmp_path, monkeypatch):
    path = write(tmp_path / "x.tif", VALUES.astype(np.uint8), planarconfig="contig")
    for module in ("tifffile", "imagecodecs"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(InputError, match=rf"{module} is not installed: pip install .*tiff"):
                read_bands(path, bands_of(5, None, None))
