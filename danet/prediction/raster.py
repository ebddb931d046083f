"""Class maps of rasters of any size, by rasterio, which is imported only where one is opened."""

import os
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from danet.bands import Bands, as_input
from danet.errors import InputError, StorageError, first_line
from danet.evaluation.evaluate import Inference
from danet.evaluation.sliding_window import MAX_PIXELS, TILE
from danet.extras import require
from danet.filesystem import atomic_write
from danet.prediction.predict import predictions
from danet.prediction.sources import Picture, Source, prefetch
from danet.types import ignore_index
from danet.visualization.overlay import Legend

TIFF_SUFFIXES = (".tif", ".tiff")
DRAWN = 2048  # longest side of the picture of a raster
_FORM = {"driver": "GTiff", "count": 1, "compress": "deflate", "bigtiff": "if_safer"}
_FORM |= {"tiled": True, "blockxsize": 256, "blockysize": 256}


def open_raster(path: Path, **created: Any) -> Any:
    """Open or create a raster; raises InputError without rasterio, OSError for a damaged file."""
    require("rasterio")
    import rasterio

    os.environ.setdefault("GDAL_CACHEMAX", "128")  # MB; GDAL takes a share of the memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path, "w" if created else "r", **created)


def is_raster(path: Path, max_pixels: int, bands: Bands | None) -> bool:
    """Return whether rasterio opens a file that is a GeoTIFF, or a TIFF above ``max_pixels``.

    Without ``bands``, for a network of 8-bit RGB, a smaller one of another kind is read as a
    picture, and a warning says so.
    """
    if path.suffix.lower() in TIFF_SUFFIXES:
        with suppress(OSError, InputError), open_raster(path) as file:  # read_bands says why
            is_placed = file.crs or file.gcps[0] or not file.transform.is_identity
            if bands or not is_placed or file.width * file.height > max_pixels:
                return bool(is_placed) or file.width * file.height > max_pixels
            try:
                choose_bands(file, None)
                return True
            except InputError as error:
                reason = str(error).partition("; ")[0]
                text = f"warning: {reason}; it becomes RGB of 8 bits, without its georeference"
                print(text, file=sys.stderr)
    return False


def choose_bands(file: Any, bands: Bands | None) -> list[int]:
    """Return the bands of a raster, from 1, that a network takes; grey is repeated for RGB.

    Raises InputError if the raster does not have them, or not of a type that the network takes.
    """
    kinds, dtype = [kind.name for kind in file.colorinterp], file.dtypes[0]
    expected, is_taken = "uint8", dtype == "uint8"
    numbers = [1, 1, 1] if kinds in (["gray"], ["gray", "alpha"]) else [1, 2, 3]
    if bands:
        numbers = [*bands.channels]
    if bands and not bands.is_8_bit:
        expected, is_taken = "real numbers", not dtype.startswith("complex")
    if max(numbers) > file.count or not is_taken or "palette" in kinds:
        raise InputError(
            f"{file.name}: found {file.count} band(s) of {dtype} ({', '.join(kinds)}), expected "
            f"{max(numbers)} or more of {expected}; convert it as the images of the training were"
        )
    return numbers


def read_window(file: Any, window: Any, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Read bands, numbered from 1, as (H, W, N), and which values are data, bool (H, W, N).

    Values are as stored, uint8 or else float32. One that is not finite is no data.
    """
    try:
        pixels = np.moveaxis(file.read([*numbers], window=window), 0, -1)
        valid = np.moveaxis(file.read_masks([*numbers], window=window), 0, -1) > 0
    except OSError as error:
        where = f"{file.name}: rows {window[0]}, columns {window[1]} cannot be read"
        reason = f"({first_line(error.__cause__ or error)}); the file is cut off or damaged"
        raise InputError(f"{where} {reason}") from error
    pixels = np.ascontiguousarray(as_input(pixels))
    return pixels, valid & np.isfinite(pixels)


def predict_raster(
    model: nn.Module,
    source: Source,
    infer: Inference,
    to: Path,
    legend: Legend,
    *,
    min_confidence: float = 0.0,
    batch_size: int = 1,
) -> tuple[Picture, np.ndarray]:
    """Write the class map of a raster, a GeoTIFF; return a picture and classes, both reduced.

    Above MAX_PIXELS it is done in blocks of 3/4 of a window. The window around a block, inside the
    raster, is an image of its own for ``infer``. Pixels without data and
    those below ``min_confidence`` are ignored. Raises InputError for a damaged file.
    """
    with open_raster(source.path) as file:
        numbers = choose_bands(file, legend.bands)
        counts = np.zeros(ignore_index(len(legend.classes)) + 1, np.int64)
        total = np.zeros(3)  # confidence, pixels with data, known ones
        crop = getattr(getattr(infer, "windows", None), "crop", None) or [TILE]
        side = -(-max(crop) // TILE) * TILE if prod(file.shape) > MAX_PIXELS else max(file.shape)
        waiting: deque[tuple[Any, Any, np.ndarray]] = deque()
        windows = prefetch(_read_windows(file, numbers, legend.bands, side, waiting))
        # Closed before the file is, from which its thread may be reading.
        with _class_map(to, file, legend, counts) as out, closing(windows):
            found: Any = predictions(model, windows, infer, ["confidence"], batch_size=batch_size)
            for classes, sure, *_ in found:
                block, inner, valid = waiting.popleft()
                is_known = valid & (sure[inner] >= min_confidence)
                total += sure[inner][valid].sum(dtype=np.float64), valid.sum(), is_known.sum()
                kept = np.where(is_known, classes[inner].astype(out.dtypes[0]), counts.size - 1)
                out.write(kept, 1, window=block)
                counts += np.bincount(kept.ravel(), minlength=counts.size)
            counts[-1] += prod(file.shape) - counts.sum()  # of blocks without data
        picture, classes = _overview(source, file, to, numbers, counts.tolist())
        confidence, valid_pixels, known = total.tolist()
        mean = confidence / valid_pixels if valid_pixels else None
        return picture._replace(sure=(mean, (valid_pixels - known) / prod(file.shape))), classes


def _overview(
    source: Source, file: Any, to: Path, numbers: Sequence[int], counts: Sequence[int]
) -> tuple[Picture, np.ndarray]:
    from rasterio.enums import Resampling

    factor = -(-max(file.shape) // DRAWN)
    size = -(-file.height // factor), -(-file.width // factor)
    with open_raster(to) as written:
        classes = written.read(1, out_shape=size)  # of nearest neighbours
    shape = (len(numbers), *size)
    pixels = file.read([*numbers], out_shape=shape, resampling=Resampling.average)
    dropped = (f"of {file.count} bands {[*numbers]} are read",) * (len({*numbers}) < file.count)
    dropped += (f"color and overlay are drawn at 1/{factor} of its size",) * (factor > 1)
    image = np.ascontiguousarray(np.moveaxis(pixels, 0, -1))
    return Picture(source.name, source, image, 0.0, dropped, None, file.shape, counts), classes


def _read_windows(
    file: Any, numbers: Sequence[int], bands: Bands | None, side: int, waiting: deque[Any]
) -> Iterator[np.ndarray]:
    """Yield windows (H, W, N); append block, its place in the window, and where that has data."""
    blocks = list(product(*(list(_blocks(size, side)) for size in file.shape)))
    for axes in tqdm(blocks, unit="window", leave=False, disable=len(blocks) == 1):
        block, window, inner = zip(*axes, strict=True)
        pixels, valid = read_window(file, window, numbers)
        if (has_data := valid[inner].any(axis=-1)).any():
            if bands:
                bands.fill(pixels, ~valid)
            waiting.append((block, inner, has_data))
            yield pixels


def _blocks(size: int, side: int) -> Iterator[tuple[tuple[int, int], tuple[int, int], slice]]:
    """Yield for each block of an axis its range, that of its window, and its place in that."""
    step = side * 3 // 4 if size > side else size
    for begin in range(0, size, step):
        end = min(begin + step, size)
        first = min(max(begin - (side - step) // 2, 0), max(size - side, 0))
        yield (begin, end), (first, min(first + side, size)), slice(begin - first, end - first)


@contextmanager
def _class_map(to: Path, file: Any, legend: Legend, counts: np.ndarray) -> Iterator[Any]:
    """Create a class map with the georeference of a raster, which is whole or not there."""
    nodata, names = counts.size - 1, {f"class_{i}": name for i, name in enumerate(legend.classes)}
    colors = {i: (*color, 255) for i, color in enumerate(legend.palette)} | {nodata: (0, 0, 0, 0)}
    form = {**_FORM, "nodata": nodata, "dtype": np.min_scalar_type(nodata), "rpcs": file.rpcs}
    form |= {"height": file.height, "width": file.width, "transform": file.transform}
    form |= {"crs": file.crs or file.gcps[1], "gcps": file.gcps[0] or None}
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(to) as temporary:
            with open_raster(temporary, **form) as out:
                out.write_colormap(1, colors)
                out.update_tags(1, **names)
                yield out
            # GDAL is silent about a full disk.
            with open_raster(temporary) as out:
                parts = (out.read(1, window=window) for _, window in out.block_windows(1))
                found = sum(np.bincount(part.ravel(), minlength=counts.size) for part in parts)
            if not np.array_equal(found, counts):
                raise OSError("values were lost")
    except OSError as error:
        text = f"{to}: cannot be written ({first_line(error)}); is the disk full?"
        raise StorageError(text) from error
