"""Masks of own pictures: class indices, other numbers, colours, arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from danet.datasets.image_io import open_picture, read_labels, whole_labels
from danet.datasets.labels import check_colors, in_order
from danet.errors import InputError
from danet.types import IGNORE, ignore_index


@dataclass(frozen=True)
class LabelFormat:
    """What the masks of own pictures hold.

    Args:
        colors: K RGB colours, for masks that are colour pictures; the position is the class index.
            Without, masks hold numbers, and the colours of a palette image are ignored.
        ignore_colors: More colours of such masks, for pixels that do not count.
        values: Value in the masks -> class index, for masks that hold other numbers; a value that
            is mapped to 255, and 255 itself, is ignored (65535 with more than 255 classes).
        labels_start_at: The number of the first class; the numbers below it are ignored.
        nearest: Whether a value that ``values`` lacks, other than the ignored one, or a colour that
            is not listed stands for the nearest; halfway, for the smaller value or first colour.
    """

    colors: Sequence[Sequence[int]] | None = None
    ignore_colors: Sequence[Sequence[int]] | None = None
    values: Mapping[int, int] | None = None
    labels_start_at: int = 0
    nearest: bool | None = None

    def for_classes(self, count: int) -> "LabelFormat":
        """Return the format with valid colours; raise InputError for settings that do not fit."""
        exclusive = ("colors", "values", "labels_start_at")
        given = [f"data.{key}" for key in exclusive if getattr(self, key)]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} exclude each other: give one of them")
        if self.nearest and not (self.colors or self.values):
            raise InputError(
                "data.nearest=true: nearest to what? Give 'data.values={0:0,255:1}', value -> "
                "class, or data.colors"
            )
        if self.labels_start_at < 0:
            raise InputError(f"data.labels_start_at={self.labels_start_at}: expected 0 or more")
        ignored = check_colors(self.ignore_colors or (), "data.ignore_colors")
        if ignored and not self.colors:
            raise InputError("data.ignore_colors is for masks of colours: give data.colors, too")
        if not self.colors:
            return self
        colors = check_colors(self.colors, "data.colors", count)
        every = [*colors, *ignored]
        if repeated := [color for color in every if every.count(color) > 1]:
            places = [str(i) for i, color in enumerate(every) if color == repeated[0]]
            raise InputError(
                f"data.colors: {list(repeated[0])} stands there twice, at positions "
                f"{' and '.join(places)} of data.colors and data.ignore_colors"
            )
        return replace(self, colors=colors, ignore_colors=ignored)

    def label_map(self, num_classes: int) -> dict[int, int]:
        """Return ``values``, or the classes in order; others than 255 (or 65535) are errors."""
        ignored = ignore_index(num_classes)
        if self.values:
            others: dict[int, int] = {}
            if self.nearest:
                known = np.array(sorted(self.values))
                place = np.searchsorted((known[1:] + known[:-1]) / 2, np.arange(65536))
                others = {i: self.values[near] for i, near in enumerate(known[place].tolist())}
            return {**others, ignored: ignored, **self.values}
        return in_order(num_classes, self.labels_start_at)

    def explain(self, labels: np.ndarray, num_classes: int) -> str:
        """Return what to do about values without meaning in labels (H, W)."""
        counts = np.bincount(labels.ravel(), minlength=num_classes + 1)
        unknown = {*np.flatnonzero(counts).tolist()} - {*self.label_map(num_classes)}
        *meant, other = counts.argsort()[::-1][: num_classes + 1].tolist()
        pairs = ",".join(f"{value}:{i}" for i, value in enumerate(sorted(meant)))
        pairs = pairs if counts[meant].min() > 1.5 * counts[other] else "VALUE:CLASS,..."
        values = "" if self.values else f"'data.values={{{pairs}}}' "
        soft = (
            f"; where edges were smoothed, or the file was a JPEG, {values}data.nearest=true takes "
            "each value for the nearest that is known"
        ) * (len(unknown) > 2 and int(counts[meant].sum()) > 0.5 * labels.size)
        if self.values:
            add = f"add it there, with a class or {ignore_index(num_classes)} to ignore it"
            return f"; data.values does not list it: {add}{soft}"
        if soft:
            return soft
        if unknown == {65535}:
            pairs = "".join(f"{value}:{i}," for value, i in self.label_map(num_classes).items())
            only = "65535 is ignored only where there are more than 255 classes"
            return f"; {only}: set 'data.values={{{pairs}65535:{IGNORE}}}'"
        return (
            "; classes count from 0; other values are mapped with 'data.values={VALUE:CLASS,...}', "
            "or, where classes count from 1 and 0 is no class, with data.labels_start_at=1"
        )

    def read(self, path: Path, num_classes: int, max_pixels: int) -> tuple[np.ndarray, int]:
        """Read a mask as numbers (H, W) or, with ``colors``, as classes or ignored.

        Returns it with the number of pixels that have a class because of ``nearest`` alone.
        """
        is_lossy = bool(self.nearest)
        if path.suffix.lower() == ".npy":
            labels = read_array(path)
        elif self.colors:
            return self._read_colors(path, max_pixels)
        else:
            labels = read_labels(path, max_pixels=max_pixels, is_lossy=is_lossy)
        listed = [*(self.values or ()), ignore_index(num_classes)]
        return labels, int(np.isin(labels, listed, invert=True).sum()) if is_lossy else 0

    def _read_colors(self, path: Path, max_pixels: int) -> tuple[np.ndarray, int]:
        """Read a picture, also a grey or palette one, as classes or ignored, (H, W).

        Unless ``nearest``, a colour that is not listed raises InputError, with the pixel and the
        nearest known colour; a picture that is partly transparent always does.
        """
        is_lossy = bool(self.nearest)
        with open_picture(path, max_pixels=max_pixels, is_label=True, is_lossy=is_lossy) as picture:
            pixels = np.array(picture.convert("RGBA"))  # (H, W, 4)
        if (count := int((pixels[..., 3] < 255).sum())) > 0:
            raise InputError(
                f"{path}: a mask of colours must be opaque, but {count} pixels are partly "
                "transparent; save it without alpha"
            )
        listed = np.array([*(self.colors or ()), *(self.ignore_colors or ())], np.uint8)
        ignored = ignore_index(len(self.colors or ()))
        classes = np.full(len(listed), ignored, np.min_scalar_type(ignored))
        classes[: len(self.colors or ())] = range(len(self.colors or ()))
        # A colour as one number, red in the lowest byte.
        known = np.pad(listed, ((0, 0), (0, 1))).view("<u4")[:, 0]
        codes = pixels.view("<u4")[..., 0] & 0xFFFFFF  # (H, W)
        order = np.argsort(known)
        place = order[np.searchsorted(known[order[:-1]], codes)]  # (H, W)
        unknown = known[place] != codes
        if self.nearest:
            shades, found = np.unique(codes[unknown], return_inverse=True)
            rgb = shades.view(np.uint8).reshape(-1, 4)[:, :3].astype(np.float32)  # (N, 3), exact
            known_rgb = listed.astype(np.float32)
            # |a - b|^2 without |a|^2, which is the same for every b.
            distance = (known_rgb**2).sum(axis=1) - 2 * rgb @ known_rgb.T  # (N, K)
            place[unknown] = distance.argmin(axis=1)[found]
        elif unknown.any():
            row, column = (int(i[0]) for i in np.nonzero(unknown))
            color = pixels[row, column, :3].astype(int)  # differences of uint8 would wrap around
            nearest = listed[((listed - color) ** 2).sum(axis=1).argmin()]
            others = len(np.unique(codes[unknown])) - 1
            more = f", nor are {others} other colours of this file" if others else ""
            soft = (
                ", or, where edges were smoothed or the file was a JPEG, set data.nearest=true, "
                "which takes each for the nearest"
            ) * (others > 1)
            raise InputError(
                f"{path}: the colour {color.tolist()} on "
                f"{int((codes == codes[row, column]).sum())} pixels, first at row {row}, column "
                f"{column}, is not in data.colors{more}; the nearest known one is "
                f"{nearest.tolist()}; add it there or to data.ignore_colors{soft}"
            )
        return classes[place], int(unknown.sum())


def read_array(path: Path) -> np.ndarray:
    """Read a .npy file of whole numbers as uint8 or uint16 (H, W), without unpickling anything."""
    try:
        labels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable array ({error})") from error
    return whole_labels(labels, str(path))
