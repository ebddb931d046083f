"""Class maps of rasters of any size, window by window, as GeoTIFFs with their georeference.

rasterio is optional, and imported only where a raster is opened.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from danet.errors import InputError, StorageError, first_line
from danet.evaluation.evaluate import Inference
from danet.evaluation.sliding_window import MAX_PIXELS, TILE
from danet.filesystem import atomic_write, explain_storage
from danet.prediction.predict import predictions
from danet.prediction.sources import Picture, Source, open_raster, prefetch
from danet.types import IGNORE
from danet.visualization.overlay import Legend

_CACHE = 256  # MB of decoded pixels that GDAL keeps; its default is a share of the memory
_DRAWN = 2048  # longest side of a reduced picture
Area = tuple[tuple[int, int], tuple[int, int]]  # rows and columns: the first, one after the last


def read_window(file: Any, area: Area, bands: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Read bands, which count from 1, and which pixels have data, bool (H, W).

    Values (H, W, N) are as stored, uint8 or else float32. A pixel that is not finite has no data.
    """
    try:
        pixels = np.moveaxis(file.read(list(bands), window=area), 0, -1)
        valid = file.dataset_mask(window=area) > 0
    except OSError as error:
        where = "rows {} to {}, columns {} to {}".format(*area[0], *area[1])
        reason = f"{where} cannot be read ({first_line(error.__cause__ or error)})"
        raise InputError(f"{file.name}: {reason}; the file is cut off or damaged") from error
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float32)
        valid &= np.isfinite(pixels).all(axis=-1)
    return np.ascontiguousarray(pixels), valid


def predict_raster(
    model: nn.Module,
    source: Source,
    infer: Inference,
    to: Path | None,
    *,
    legend: Legend,
    bands: Sequence[int] | None = None,
    batch_size: int = 1,
) -> tuple[Picture, np.ndarray]:
    """Write the class map of a raster to a path; return it and the raster, both reduced.

    A raster above MAX_PIXELS is divided into blocks of 3/4 of a window. The window around a block,
    inside the raster, is an image of its own for ``infer``. Pixels without data become IGNORE.
    ``bands`` are those that the network takes; None is for a network of 8-bit RGB. Raises
    InputError if the file is damaged, or if its bands or values are not those of the network.
    """
    try:
        file = open_raster(source.path)
    except InputError as error:
        raise InputError(f"{source.path}: above max_pixels, so for windows, but {error}") from error
    import rasterio

    mean = model.mean.flatten().cpu().numpy()  # type: ignore[operator]
    with file, rasterio.Env(GDAL_CACHEMAX=_CACHE):
        chosen = _choose_bands(file, mean.size, bands)
        height, width = file.shape
        crop = getattr(getattr(infer, "windows", None), "crop", None) or [TILE]
        side = -(-max(crop) // TILE) * TILE if height * width > MAX_PIXELS else max(file.shape)
        step = 2 ** max(0, math.ceil(math.log2(max(file.shape) / _DRAWN)))  # it divides blocks
        nodata, dtype = (IGNORE, "uint8") if len(legend.classes) <= IGNORE else (65535, "uint16")
        reduced = np.full((-(-height // step), -(-width // step)), nodata, dtype)
        counts = np.zeros(nodata + 1, np.int64)
        waiting: deque[tuple[Any, Any, np.ndarray]] = deque()
        windows = _read_windows(file, chosen, mean, side, waiting)
        with _created(to, file, legend, counts) as write:
            for found in predictions(model, prefetch(windows), infer, batch_size=batch_size):
                block, inner, valid = waiting.popleft()
                classes = np.where(valid, found[inner].astype(dtype), nodata)
                write(classes, 1, window=block)
                counts += np.bincount(classes.ravel(), minlength=counts.size)
                rows, columns = (slice(a // step, -(-b // step)) for a, b in block)
                reduced[rows, columns] = classes[::step, ::step]
            counts[nodata] += height * width - counts.sum()  # of blocks without data
        shape, how = (len(chosen), *reduced.shape), rasterio.enums.Resampling.average
        image = np.moveaxis(file.read(chosen, out_shape=shape, resampling=how), 0, -1).copy()
    if image.dtype != np.uint8 or len(chosen) != 3:
        image = np.full((*reduced.shape, 3), 128, np.uint8)
    dropped = (f"of {file.count} bands {chosen} are read",) * (len(set(chosen)) < file.count)
    dropped += (f"pictures of it are drawn at 1/{step} of its size",) * (step > 1)
    seen = Picture(source.name, source, image, 0.0, dropped, None, file.shape, counts.tolist())
    return seen, reduced


def _choose_bands(file: Any, number: int, bands: Sequence[int] | None) -> list[int]:
    """Return the bands that a network of a number of them takes; grey is repeated for RGB."""
    kinds, dtype, is_rgb = [kind.name for kind in file.colorinterp], file.dtypes[0], bands is None
    if is_rgb and kinds in (["gray"], ["gray", "alpha"]):
        number, bands = 1, [1, 1, 1]
    chosen = list(bands or range(1, number + 1))
    expected = "uint8, as in the training" if is_rgb else "real numbers"
    if max(chosen) > file.count or "palette" in kinds:
        found = f"{file.count} band(s)" + " with a palette" * ("palette" in kinds)
        expected = f"at least {max(chosen)}, as in the training"
    elif dtype.startswith("complex") or (is_rgb and dtype != "uint8"):
        found = dtype
    else:
        return chosen
    raise InputError(
        f"{file.name}: found {found}, expected {expected}; convert it as the training's images were"
    )


def _read_windows(
    file: Any, bands: Sequence[int], mean: np.ndarray, side: int, waiting: deque[Any]
) -> Iterator[np.ndarray]:
    """Yield the windows of all blocks with data, (H, W, N).

    For each, the block, its place in the window and its pixels with data are appended to
    ``waiting``.
    """
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
def _created(
    to: Path | None, file: Any, legend: Legend, counts: np.ndarray
) -> Iterator[Callable[..., None]]:
    """Yield the function that writes into a class map like a raster; it is whole or not there.

    GDAL is silent about a full disk, so what was written must have the ``counts`` of its values.
    """
    if to is None:
        yield lambda *_, **__: None
        return
    nodata, names = counts.size - 1, {f"class_{i}": name for i, name in enumerate(legend.classes)}
    colors = {i: (*color, 255) for i, color in enumerate(legend.palette)} | {nodata: (0, 0, 0, 0)}
    profile = {
        **{"driver": "GTiff", "count": 1, "dtype": np.min_scalar_type(nodata), "nodata": nodata},
        **{"height": file.height, "width": file.width, "transform": file.transform},
        **{"crs": file.crs or file.gcps[1], "gcps": file.gcps[0] or None, "rpcs": file.rpcs},
        **{"tiled": True, "blockxsize": 256, "blockysize": 256},
        **{"compress": "deflate", "bigtiff": "if_safer"},
    }
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(to) as temporary:
            with open_raster(temporary, **profile) as out:
                out.write_colormap(1, colors)
                out.update_tags(1, **names)
                yield out.write
            with open_raster(temporary) as out:
                parts = (out.read(1, window=window) for _, window in out.block_windows(1))
                found = sum(np.bincount(part.ravel(), minlength=counts.size) for part in parts)
            if not np.array_equal(found, counts):
                raise StorageError("what was written is not what is there")
    except OSError as error:
        reason = explain_storage(error) or f"{to}: cannot be written ({first_line(error)})"
        raise StorageError(f"{reason}; is the disk full?") from error
