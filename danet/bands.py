"""Which bands of a picture a network reads, and which of their values are black and white."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from danet.errors import InputError
from danet.plain import is_int

MAX_BANDS = 128  # that OpenCV resizes


@dataclass(frozen=True)
class Bands:
    """N bands of a file, in the order of a network's input channels: the keys of ``data``."""

    channels: tuple[int, ...]  # their numbers in the file, from 1
    limits: tuple[tuple[float, float], ...]  # the values of each that stand for black and white
    rgb: tuple[int, ...]  # where red, green and blue are in ``channels``, from 0
    is_8_bit: bool  # no range is set, so no other files are read

    @property
    def roles(self) -> np.ndarray:
        """Which channels are red, green and blue, 0 or 1, float64 (3, N)."""
        return np.equal.outer(self.rgb, range(len(self.channels))).astype(float)

    def show(self, image: np.ndarray) -> np.ndarray:
        """Return raw bands (H, W, N) as a picture, uint8 (H, W, 3), RGB, for drawing."""
        low, high = np.array(self.limits, np.float32)[list(self.rgb)].T
        unit = (as_input(image[..., list(self.rgb)]) - low) / (high - low)
        return np.rint(255 * np.nan_to_num(unit).clip(0, 1)).astype(np.uint8)

    def fill(self, image: np.ndarray, missing: np.ndarray) -> None:
        """Make the values of raw bands (..., N) black where ``missing``, of the same shape."""
        of: Any = np.finfo(image.dtype) if image.dtype.kind == "f" else np.iinfo(image.dtype)
        low = np.array(self.limits)[:, 0].clip(of.min, of.max).astype(image.dtype)
        np.copyto(image, low, where=missing)


def bands_of(channels: Any, limits: Any, rgb: Any) -> Bands | None:
    """Return the bands by ``data.channels``, ``data.range`` and ``data.rgb``; None for 8-bit RGB.

    Values of a config that do not fit raise InputError.
    """
    if channels is None:
        for key, value in (("range", limits), ("rgb", rgb)):
            _require(value is None, key, value, "data.channels, too: it is about these bands")
        return None
    numbers = [*range(1, min(channels, 1000) + 1)] if is_int(channels) else channels
    is_list = isinstance(numbers, (list, tuple)) and 0 < len(numbers) <= MAX_BANDS
    is_right = is_list and all(is_int(n) and n > 0 and numbers.count(n) == 1 for n in numbers)
    expected = f"the number of bands, 1 to {MAX_BANDS}, or their numbers in the file, each once, "
    _require(is_right, "channels", channels, f"{expected}from 1 on: 'data.channels=[1,2,3,8]'")
    chosen = (numbers[:3] if len(numbers) > 2 else numbers[:1] * 3) if rgb is None else rgb
    is_right = isinstance(chosen, (list, tuple)) and len(chosen) == 3
    expected = f"the numbers of the red, green and blue band, all among data.channels: {numbers}"
    _require(is_right and all(n in numbers for n in chosen), "rgb", rgb, expected)
    try:  # one pair is of all bands
        pair = [0, 255] if limits in (None, "auto") else limits
        pairs = np.broadcast_to(np.array(pair, np.float64), (len(numbers), 2))
    except (TypeError, ValueError):
        pairs = np.zeros((1, 2))
    is_right = bool(np.isfinite(pairs).all() and (pairs[:, 0] < pairs[:, 1]).all())
    expected = "the values of black and white, low before high, 'data.range=[0,10000]', or such a "
    expected += f"pair for each of the {len(numbers)} band(s) of data.channels, or auto"
    _require(is_right, "range", limits, expected)
    places = tuple(numbers.index(n) for n in chosen)
    return Bands(tuple(numbers), tuple(map(tuple, pairs.tolist())), places, limits is None)


def _require(is_right: Any, key: str, value: Any, expected: str) -> None:
    if not is_right:
        raise InputError(f"data.{key}={value}: expected {expected}")


@np.errstate(over="ignore")  # such as of nodata values: infinity counts as missing, too
def as_input(image: np.ndarray) -> np.ndarray:
    """Return raw values in the type in which they enter a network: uint8, else float32."""
    return image if image.dtype == np.uint8 else image.astype(np.float32, copy=False)
