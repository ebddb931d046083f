"""Masks of own pictures: class indices, other numbers, colours, arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from danet.datasets.image_io import open_label, whole_labels
from danet.datasets.labels import ClassFile, check_color, check_colors
from danet.errors import InputError
from danet.types import IGNORE


@dataclass(frozen=True)
class LabelFormat:
    """What the masks of own pictures hold.

    Args:
        colors: K RGB colours, for masks that are colour pictures; the position is the class index.
            Without, masks hold numbers, and the colours of a palette image are ignored.
        ignore_colors: More colours of such masks, for pixels that do not count.
        values: Value in the masks -> class index, for masks that hold other numbers; a value that
            is mapped to 255, and 255 itself, is ignored.
        labels_start_at: The number of the first class; the numbers below it are ignored.
    """

    colors: Sequence[Sequence[int]] | None = None
    ignore_colors: Sequence[Sequence[int]] | None = None
    values: Mapping[int, int] | None = None
    labels_start_at: int = 0

    def for_classes(self, classes: ClassFile) -> "LabelFormat":
        """Return the format with valid colours, those of a file of classes where none are set.

        Raises:
            InputError: Settings exclude each other, are out of range, or do not fit the classes.
        """
        exclusive = ("colors", "values", "labels_start_at")
        given = [f"data.{key}" for key in exclusive if getattr(self, key)]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} exclude each other: give one of them")
        if self.labels_start_at < 0:
            raise InputError(f"data.labels_start_at={self.labels_start_at}: expected 0 or more")
        colors = self.colors if given else classes.colors
        if self.ignore_colors and not colors:
            raise InputError("data.ignore_colors is for masks of colours: give data.colors, too")
        return LabelFormat(
            check_colors(colors, len(classes.names), "data.colors") if colors else None,
            [check_color(color, "data.ignore_colors") for color in self.ignore_colors or ()],
            dict(self.values) if self.values else None,
            self.labels_start_at,
        )

    def label_map(self, num_classes: int) -> dict[int, int]:
        """Return ``values`` as given, or the classes in order; 255 is IGNORE unless mapped."""
        if self.values is not None:
            return {IGNORE: IGNORE, **self.values}
        first = self.labels_start_at
        below = dict.fromkeys(range(first), IGNORE)
        return {IGNORE: IGNORE, **below, **{first + i: i for i in range(num_classes)}}

    @property
    def hint(self) -> str:
        """What to do about a value without meaning, VALUE; depends on ``values``."""
        if self.values is None:
            return (
                "; classes count from 0; other values are mapped with data.values={0:0,VALUE:1}, "
                "or with data.labels_start_at=1 where classes count from 1 and 0 is no class"
            )
        hint = "; data.values does not list it: add it there, with a class or 255 to ignore it"
        if len(self.values) != 2:  # smoothed edges of several values are ambiguous
            return hint
        first, last = sorted(self.values)
        return (
            f"{hint}; if edges were smoothed, save the masks without, or as "
            f"numpy.where(mask > {(first + last) // 2}, {last}, {first}).astype('uint8')"
        )


class ColorTable:
    """A map from colours to class indices; a pixel must have exactly a known colour.

    Args:
        colors: K RGB colours; the position is the class.
        ignored: Colours of pixels that do not count.

    Raises:
        InputError: A colour stands there twice.
    """

    def __init__(
        self, colors: Sequence[Sequence[int]], ignored: Sequence[Sequence[int]] = ()
    ) -> None:
        every = [(red, green, blue) for red, green, blue in (*colors, *ignored)]
        for color in every:
            places = [i for i, other in enumerate(every) if other == color]
            if len(places) > 1:
                raise InputError(
                    f"data.colors: {list(color)} stands there twice, at positions "
                    f"{' and '.join(map(str, places))} of data.colors and data.ignore_colors"
                )
        classes = [*range(len(colors)), *[IGNORE] * len(ignored)]
        self.colors = dict(sorted(zip(every, classes, strict=True), key=lambda row: row[0][::-1]))

    def decode(self, pixels: np.ndarray, path: Path) -> np.ndarray:
        """Map RGBA uint8 (H, W, 4), opaque, to classes or IGNORE, uint8 (H, W).

        Raises:
            InputError: A colour is not in the table; with the pixel and the nearest known colour.
        """
        codes = np.ascontiguousarray(pixels).view("<u4")[..., 0] & 0xFFFFFF  # (H, W)
        known = np.array([red | green << 8 | blue << 16 for red, green, blue in self.colors], "<u4")
        place = np.searchsorted(known[:-1], codes)  # (H, W), the last one for larger numbers, too
        unknown = known[place] != codes
        if unknown.any():
            row, column = (int(i[0]) for i in np.nonzero(unknown))
            count = int((codes == codes[row, column]).sum())
            others = len(np.unique(codes[unknown])) - 1
            color = pixels[row, column, :3].astype(int)  # differences of uint8 would wrap around
            nearest = min(self.colors, key=lambda known: int(((color - known) ** 2).sum()))
            more = f", nor are {others} other colours of this file" if others else ""
            raise InputError(
                f"{path}: the colour {color.tolist()} on {count} pixels, first at row {row}, "
                f"column {column}, is not in data.colors{more}; the nearest known one is "
                f"{list(nearest)}; add it there or to data.ignore_colors"
            )
        return np.array(list(self.colors.values()), np.uint8)[place]  # (H, W)


def read_colors(path: Path, *, max_pixels: int) -> np.ndarray:
    """Read a label picture as RGBA uint8 (H, W, 4); grey and palette images become colours.

    Raises:
        InputError: As open_label; or the picture is partly transparent.
    """
    with open_label(path, max_pixels=max_pixels) as picture:
        pixels = np.array(picture.convert("RGBA"))
    clear = pixels[..., 3] < 255
    if clear.any():
        row, column = (int(i[0]) for i in np.nonzero(clear))
        raise InputError(
            f"{path}: a mask of colours must be opaque, but {int(clear.sum())} pixels are partly "
            f"transparent, first at row {row}, column {column}; save it without alpha"
        )
    return pixels


def read_array(path: Path) -> np.ndarray:
    """Read a .npy file of whole numbers as uint8 or uint16 (H, W), without unpickling anything."""
    try:
        labels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable array ({error})") from error
    return whole_labels(labels, str(path))
