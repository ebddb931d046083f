"""Class maps of rasters of any size, by rasterio, which is imported only where one is opened."""

import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from danet.errors import InputError, StorageError, first_line
from danet.evaluation.evaluate import Inference
from danet.evaluation.sliding_window import MAX_PIXELS, TILE
from danet.extras import require
from danet.filesystem import atomic_write
from danet.prediction.predict import predictions
from danet.prediction.sources import prefetch
from danet.types import IGNORE
from danet.visualization.overlay import Legend

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


def read_window(file: Any, window: Any, bands: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Read bands, numbered from 1, as (H, W, N), and which pixels have data, bool (H, W).

    Values are as stored, uint8 or else float32. A pixel that is not finite has no data.
    """
    try:
        pixels = np.moveaxis(file.read(list(bands), window=window), 0, -1)
        valid = file.dataset_mask(window=window) > 0
    except OSError as error:
        where = f"{file.name}: rows {window[0]}, columns {window[1]} cannot be read"
        reason = f"({first_line(error.__cause__ or error)}); the file is cut off or damaged"
        raise InputError(f"{where} {reason}") from error
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float32)
        valid &= np.isfinite(pixels).all(axis=-1)
    return np.ascontiguousarray(pixels), valid


def predict_raster(
    model: nn.Module,
    file: Any,
    infer: Inference,
    to: Path,
    legend: Legend,
    *,
    bands: Sequence[int],
    batch_size: int = 1,
) -> list[int]:
    """Write the class map of an open raster, a GeoTIFF; return the number of pixels by class.

    Above MAX_PIXELS it is done in blocks of 3/4 of a window. The window around a block, inside the
    raster, is an image of its own for ``infer``. Pixels without data become IGNORE. Raises
    InputError for a damaged file.
    """
    counts = np.zeros(IGNORE + 1 if len(legend.classes) <= IGNORE else 65536, np.int64)
    crop = getattr(getattr(infer, "windows", None), "crop", None) or [TILE]
    side = -(-max(crop) // TILE) * TILE if prod(file.shape) > MAX_PIXELS else max(file.shape)
    mean = model.mean.flatten().cpu().numpy()  # type: ignore[operator]
    waiting: deque[tuple[Any, Any, np.ndarray]] = deque()
    windows = prefetch(_read_windows(file, bands, mean, side, waiting))
    # Closed before the file is, from which its thread may be reading.
    with _class_map(to, file, legend, counts) as out, closing(windows):
        for classes in predictions(model, windows, infer, batch_size=batch_size):
            block, inner, valid = waiting.popleft()
            kept = np.where(valid, classes[inner].astype(out.dtypes[0]), counts.size - 1)
            out.write(kept, 1, window=block)
            counts += np.bincount(kept.ravel(), minlength=counts.size)
        counts[-1] += prod(file.shape) - counts.sum()  # of blocks without data
    return counts.tolist()


def _read_windows(
    file: Any, bands: Sequence[int], mean: np.ndarray, side: int, waiting: deque[Any]
) -> Iterator[np.ndarray]:
    """Yield windows (H, W, N); append block, its place in the window, and where that has data."""
    blocks = list(product(*(list(_blocks(size, side)) for size in file.shape)))
    for axes in tqdm(blocks, unit="window", leave=False, disable=len(blocks) == 1):
        block, window, inner = zip(*axes, strict=True)
        pixels, valid = read_window(file, window, bands)
        if valid[inner].any():
            if pixels.dtype != np.uint8:
                pixels[~valid] = mean  # NaN, or -9999, would spread over the whole window
            waiting.append((block, inner, valid[inner]))
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
