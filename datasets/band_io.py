"""Reading the bands of pictures as they are stored: any number of them, of any number of bits."""

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from danet.bands import Bands, as_input
from danet.datasets import image_io
from danet.errors import InputError
from danet.extras import require

_NODATA = 42113  # tag of a TIFF, GDAL's: the value of pixels without data, as text
# It logs what our error message has.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


def read_bands(
    path: Path, bands: Bands | None, *, max_pixels: int = image_io.MAX_PIXELS
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return bands of a file, raw (H, W, N), and what is missing, bool (H, W, N), None if nothing.

    They are uint8, uint16, int16, or else float32; one bit becomes 0 and 255. Missing are NaN,
    infinity and the nodata value of a GeoTIFF, which become black. Without ``bands`` it is
    ``read_image``. Raises InputError.
    """
    if bands is None:
        return image_io.read_image(path, max_pixels=max_pixels), None
    is_array = path.suffix.lower() in (".tif", ".tiff", ".npy")
    whole, nodata = (_read_array if is_array else _read_picture)(path, max_pixels)
    if max(bands.channels) > (count := whole.shape[2]):
        needed = f"{count} band(s), and data.channels asks for number {max(bands.channels)}"
        raise InputError(f"{path}: {needed}; train with bands that all files have")
    image = whole[..., [n - 1 for n in bands.channels]]  # a copy
    missing = image == nodata
    if image.dtype == bool:
        image = image * np.uint8(255)
    elif image.dtype not in (np.uint16, np.int16):
        image = as_input(image)
    missing |= ~np.isfinite(image)
    if bands.is_8_bit and image.dtype != np.uint8:
        known = image[~missing]
        values = f"{known.min():g} to {known.max():g}" if known.size else "all of it missing"
        raise InputError(
            f"{path}: {whole.dtype}, {values}, and without data.range files have 8 bits; set "
            "data.range=auto, which measures it, or the values of black and white, "
            "'data.range=[low,high]'"
        )
    bands.fill(image, missing)
    return image, missing if missing.any() else None


def _read_picture(path: Path, max_pixels: int) -> tuple[np.ndarray, float]:
    """Decode a PNG, JPEG, BMP or WebP to (H, W, bands); a palette becomes RGB."""
    with image_io.open_picture(path, max_pixels=max_pixels) as picture:
        if image_io.bit_depth(picture) == 8 or picture.mode.startswith("I"):
            image = np.asarray(picture.convert("RGB") if picture.mode in ("P", "PA") else picture)
            return np.atleast_3d(image.astype(image.dtype.newbyteorder("="))), math.nan
        # Pillow has 8 bits of colours, OpenCV all of them.
        data = np.frombuffer(picture.fp.getbuffer(), np.uint8)  # type: ignore[attr-defined]
        decoded: Any = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)  # BGR or BGRA
        if decoded is None:
            raise ValueError("pixels are missing")
        order = [0, 3] if picture.mode == "LA" else [2, 1, 0, 3][: decoded.shape[2]]
        return decoded[..., order], math.nan


def _read_array(path: Path, max_pixels: int) -> tuple[np.ndarray, float]:
    """Decode a .npy file, or the samples or equal pages of a TIFF, and its nodata value or NaN."""
    nodata: Any = math.nan
    try:
        if path.suffix.lower() == ".npy":
            image = np.atleast_3d(np.load(path, mmap_mode="r", allow_pickle=False))
            image_io.refuse_size(path, *image.shape[1::-1], max_pixels=max_pixels)
        else:
            for module in ("tifffile", "imagecodecs"):
                require(module)
            import tifffile

            with tifffile.TiffFile(path) as file:
                series = file.series[0]  # without overviews and masks
                axes = series.axes.index("Y"), series.axes.index("X")
                height, width = (series.shape[axis] for axis in axes)
                image_io.refuse_size(path, width, height, max_pixels=max_pixels)
                image = np.moveaxis(series.asarray(), axes, (0, 1)).reshape(height, width, -1)
                nodata = series.pages[0].tags.valueof(_NODATA, nodata)  # type: ignore[union-attr]
        if image.ndim != 3 or image.dtype.kind not in "buif" or not image.size:
            raise ValueError(f"{image.dtype} {image.shape}, no numbers (rows, columns, bands)")
        return image, float(nodata)
    except InputError:
        raise
    except Exception as error:  # of damaged files tifffile and its codecs raise anything
        reason = image_io.reason(error, path)
        raise InputError(f"{path}: not a readable image ({reason})") from error


def measure_range(paths: Sequence[Path], bands: Bands, max_pixels: int) -> list[list[float]]:
    """Return ``data.range`` for ``auto``: the 1st and the 99th percentile of each band.

    Of some 16,000 pixels of each of up to 200 pictures, evenly spread and always the same, without
    what is missing. A band of one value or none raises InputError.
    """
    values = []
    for i in np.linspace(0, len(paths) - 1, min(200, len(paths))).round().astype(int).tolist():
        with suppress(InputError):  # reported by the check of the data
            image, missing = read_bands(paths[i], bands, max_pixels=max_pixels)
            step = math.ceil(math.sqrt(image.shape[0] * image.shape[1] / 2**14))
            grid = image[::step, ::step].astype(np.float64)
            if missing is not None:
                grid[missing[::step, ::step]] = np.nan
            values.append(grid.reshape(-1, len(bands.channels)))
    if not values:
        read_bands(paths[0], bands, max_pixels=max_pixels)  # raises its error
    found = []
    for number, column in zip(bands.channels, np.concatenate(values).T, strict=True):
        known = column[~np.isnan(column)]
        low, high = np.percentile(known, (1, 99)).tolist() if known.size else (math.nan, math.nan)
        if not low < high:
            raise InputError(
                f"data.range=auto: band {number} is {low:g} nearly everywhere in the {len(values)} "
                "pictures looked at; leave it out of data.channels, or set data.range to numbers"
            )
        found.append([float(f"{limit:.6g}") for limit in (low, high)])
    return found
