"""Masks that are not pictures of indices: colours, arrays."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from danet.datasets.image_io import read_labels
from danet.datasets.labels import Color
from danet.errors import InputError
from danet.types import IGNORE


class ColorTable:
    """Turns masks of colours into masks of numbers; a colour counts only if it is met exactly.

    Args:
        colors: K RGB colours; the position is the class.
        ignored: Colours of pixels that do not count.

    Raises:
        InputError: A colour stands there twice.
    """

    def __init__(self, colors: Sequence[Color], ignored: Sequence[Color] = ()) -> None:
        self.colors = dict.fromkeys((*colors, *ignored), IGNORE)
        if len(self.colors) < len(colors) + len(ignored):
            every = [*colors, *ignored]
            twice = next(color for i, color in enumerate(every) if color in every[:i])
            places = [i for i, color in enumerate(every) if color == twice]
            raise InputError(
                f"data.colors: {list(twice)} stands there twice, at positions "
                f"{' and '.join(map(str, places))} of data.colors and data.ignore_colors"
            )
        self.colors.update((color, index) for index, color in enumerate(colors))

    @cached_property
    def _table(self) -> np.ndarray:
        """Colour -> class + 1, or 0; int16 (2 ** 24,), of which empty pages take no memory."""
        table = np.zeros(1 << 24, np.int16)
        for (red, green, blue), index in self.colors.items():
            table[red | green << 8 | blue << 16] = index + 1
        return table

    def __getstate__(self) -> dict[str, object]:
        """Leaves the table out: a worker that is not forked makes its own."""
        return {"colors": self.colors}

    def decode(self, pixels: np.ndarray, path: Path) -> np.ndarray:
        """Maps RGBA uint8 (H, W, 4), opaque, to classes or IGNORE, uint8 (H, W).

        Raises:
            InputError: A colour is not in the table; with the pixel and the nearest known colour.
        """
        codes = np.ascontiguousarray(pixels).view("<u4")[..., 0] & 0xFFFFFF
        found = self._table.take(codes)
        unknown = found == 0
        if unknown.any():
            row, column = (int(i[0]) for i in np.nonzero(unknown))
            count = int((codes == codes[row, column]).sum())
            others = len(np.unique(codes[unknown])) - 1
            color = pixels[row, column, :3].astype(int)
            nearest = min(self.colors, key=lambda known: int(((color - known) ** 2).sum()))
            more = f", nor are {others} other colours of this file" if others else ""
            raise InputError(
                f"{path}: the colour {color.tolist()} on {count} pixels, first at row {row}, "
                f"column {column}, is not in data.colors{more}; the nearest known one is "
                f"{list(nearest)}; add it there or to data.ignore_colors"
            )
        return (found - 1).astype(np.uint8)


def read_colors(path: Path, *, max_pixels: int) -> np.ndarray:
    """Reads a label picture as RGBA uint8 (H, W, 4); grey and palette images become colours.

    Raises:
        InputError: Not readable, lossy, too large, or partly transparent.
    """
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise InputError(
                    f"{path}: {width} x {height} pixels are more than data.max_pixels={max_pixels}"
                )
            if picture.format == "JPEG":
                raise InputError(f"{path}: JPEG is lossy and would change class colours; use PNG")
            pixels = np.asarray(picture.convert("RGBA"))
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        read_labels(path)  # says what is there instead of a picture
        raise InputError(f"{path}: not a readable label ({error})") from error
    clear = pixels[..., 3] < 255
    if clear.any():
        row, column = (int(i[0]) for i in np.nonzero(clear))
        raise InputError(
            f"{path}: a mask of colours must be opaque, but {int(clear.sum())} pixels are partly "
            f"transparent, first at row {row}, column {column}; save it without alpha"
        )
    return pixels


def read_array(path: Path) -> np.ndarray:
    """Reads a .npy file of whole numbers (H, W) as uint16; nothing inside it is run."""
    try:
        labels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable array ({error})") from error
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{path}: a label must be an array of whole numbers (height, width), this is "
            f"{labels.dtype} {labels.shape}"
        )
    if labels.size and not (labels.min() >= 0 and labels.max() < 65536):
        raise InputError(
            f"{path}: labels must be whole numbers 0..65535, found {labels.min()}..{labels.max()}"
        )
    return labels.astype(np.uint16)
