"""Class maps as colours over a picture, with a legend and titles, alone and on sheets.

All pictures are uint8 (H, W, 3), RGB; images may have other bands, which a Legend shows as RGB.
"""

import functools
import io
import textwrap
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from danet.bands import Bands
from danet.datasets.labels import is_background
from danet.filesystem import write_file
from danet.types import ignore_index

_PAPER = 255
_LINE = 18  # height of a line of text, in pixels
_GAP = 4  # between pictures, in pixels
_ROOM = 1100  # width of a sheet up to which small pictures are drawn at twice their size, in pixels
Palette = Sequence[tuple[int, int, int]]


class SegmentedImage(NamedTuple):
    """An image, the classes predicted for its pixels, and the true ones where they are known."""

    name: str
    image: np.ndarray
    """As the network gets it: uint8 (H, W, 3), RGB, or raw bands (H, W, N)."""
    prediction: np.ndarray
    """(H, W), class indices."""
    truth: np.ndarray | None = None
    """(H, W), class indices or ignored."""


class Legend(NamedTuple):
    """How classes are shown: all but those that ``is_background`` names have a tint."""

    classes: Sequence[str]
    palette: Palette
    opacity: float = 0.55
    """Of the colours over a picture."""
    bands: Bands | None = None
    """Of the images; None for RGB of 8 bits."""

    def show(self, image: np.ndarray) -> np.ndarray:
        """Return an image as a picture."""
        return self.bands.show(image) if self.bands else image

    def over(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Blend the colours of classes with the image; ignored pixels and background show it."""
        image, colors = self.show(image), colorize(mask, self.palette)
        drawn = cv2.addWeighted(image, 1 - self.opacity, colors, self.opacity, 0)
        untinted = [i for i, name in enumerate(self.classes) if is_background(name)]
        is_shown = np.isin(mask, [ignore_index(len(self.classes)), *untinted])
        drawn[is_shown] = image[is_shown]
        return drawn


def resize(picture: SegmentedImage, factor: float) -> SegmentedImage:
    """Return a picture with sides of ``factor`` times its own, rounded down, at least 1."""
    name, image, prediction, truth = picture
    size = max(1, int(image.shape[1] * factor)), max(1, int(image.shape[0] * factor))  # (W, H)
    # Class indices must not be averaged.
    pick = functools.partial(cv2.resize, dsize=size, interpolation=cv2.INTER_NEAREST_EXACT)
    smooth = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    bands = [cv2.resize(band, size, interpolation=smooth) for band in cv2.split(image)]
    image = np.atleast_3d(cv2.merge(bands))  # one by one, since of several averages are of four
    return SegmentedImage(name, image, pick(prediction), None if truth is None else pick(truth))


def enlarge(pictures: Sequence[SegmentedImage]) -> list[SegmentedImage]:
    """Return the pictures of a sheet, at twice their size if they are small."""
    height, width = np.max([picture.prediction.shape for picture in pictures], axis=0)
    columns = 1 if len(pictures) == 1 and width > 2 * height else 4
    return [resize(picture, 2 if 2 * columns * width <= _ROOM else 1) for picture in pictures]


def colorize(mask: np.ndarray, palette: Palette) -> np.ndarray:
    """Return the colours (H, W, 3) of classes (H, W); ignored pixels become black."""
    # One row per value, so that any mask can index it.
    table = np.zeros((ignore_index(len(palette)) + 1, 3), np.uint8)
    table[: len(palette)] = palette
    return table[mask]


def compose(
    panels: Sequence[tuple[str, np.ndarray]],
    legend: Legend,
    masks: Iterable[np.ndarray | None],
    *,
    columns: int = 0,
) -> np.ndarray:
    """Arrange titled pictures in rows, above a legend of the classes that occur in masks (H, W).

    Pictures may differ in size. In a row there are ``columns`` of them; by default four, or one if
    they are wide. A title takes as many lines as it needs. A mask of None is left out.
    """
    height, width = np.max([panel.shape[:2] for _, panel in panels], axis=0)
    columns = min(columns or (1 if width > 2 * height else 4), len(panels))
    width, rows = max(width, 90), []  # room for the words of a title
    for first in range(0, len(panels), columns):
        row = panels[first : first + columns]
        titles = [_wrap(title, width - 6) for title, _ in row]
        lines, height = max(map(len, titles)), max(len(panel) for _, panel in row)
        size = (lines * _LINE + height + _GAP, columns * (width + _GAP), 3)
        rows.append(np.full(size, _PAPER, np.uint8))
        for place, (title, (_, panel)) in enumerate(zip(titles, row, strict=True)):
            cell = rows[-1][:, place * (width + _GAP) :]
            for number, line in enumerate(title, lines - len(title)):
                _write(cell[number * _LINE :], line, 3)
            cell[lines * _LINE :][: panel.shape[0], : panel.shape[1]] = panel
    present = {int(c) for mask in masks if mask is not None for c in np.unique(mask)}
    present -= {ignore_index(len(legend.classes))}
    return with_legend(np.vstack(rows)[:-_GAP, :-_GAP], legend, present)


def _width(text: str) -> int:
    return cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)[0][0]


def _wrap(text: str, width: int) -> list[str]:
    """Return the lines of a text, none of them wider than ``width`` pixels."""
    wrapped = (textwrap.wrap(text, count) for count in range(len(text), 0, -1))
    return next((lines for lines in wrapped if all(_width(line) <= width for line in lines)), [])


def _write(canvas: np.ndarray, text: str, x: int) -> None:
    """Write text into the first line of a canvas."""
    cv2.putText(canvas, text, (x, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (30, 30, 30), 1, cv2.LINE_AA)


def with_legend(body: np.ndarray, legend: Legend, present: Collection[int]) -> np.ndarray:
    """Return a picture with a swatch and a name below it for each class that is present.

    The swatch of a background is empty. A picture narrower than a name gets a margin.
    """
    needed = {index: _width(legend.classes[index]) + 28 for index in sorted(present)}
    margin = max([0, *(width - body.shape[1] for width in needed.values())])
    body = np.pad(body, ((0, 0), (0, margin), (0, 0)), constant_values=_PAPER)
    x, lines = 0, [np.full((_LINE, body.shape[1], 3), _PAPER, np.uint8)]
    for index, width in needed.items():
        if x + width > body.shape[1]:
            x, lines = 0, [*lines, np.full_like(lines[0], _PAPER)]
        name = legend.classes[index]
        style = ((150,) * 3, 1) if is_background(name) else (legend.palette[index], cv2.FILLED)
        cv2.rectangle(lines[-1], (x + 3, 4), (x + 14, 14), *style)
        _write(lines[-1], name, x + 18)
        x += width
    return np.vstack((body, *lines))


def panels_of(picture: SegmentedImage, legend: Legend) -> list[tuple[str, np.ndarray]]:
    """Return the titled panels of ``sheet`` for a picture."""
    name, image, prediction, truth = picture
    shown = legend.show(image)
    panels = [(name, shown), ("prediction", legend.over(image, prediction))]
    if truth is not None:
        grey = cv2.cvtColor(shown, cv2.COLOR_RGB2GRAY) // 2 + 100
        errors = np.repeat(grey[..., None], 3, axis=2)
        is_wrong, is_ignored = prediction != truth, truth == ignore_index(len(legend.classes))
        errors[is_wrong], errors[is_ignored] = (220, 40, 40), 0
        known = is_wrong[~is_ignored]
        title = f"errors ({100 * known.mean():.1f} %)" if known.size else "nothing known"
        panels += [("truth", legend.over(image, truth)), (title, errors)]
    return panels


def sheet(legend: Legend, *pictures: SegmentedImage) -> np.ndarray:
    """Draw image, prediction and, where the truth is known, truth and errors, above a legend.

    Wrong pixels are red, ignored ones black. Several pictures have a row each; the truth is known
    of all of them or of none. Small pictures are drawn at twice their size.
    """
    rows = [panels_of(picture, legend) for picture in enlarge(pictures)]
    masks = [mask for picture in pictures for mask in picture[2:]]
    columns = len(rows[0]) if len(rows) > 1 else 0
    return compose([panel for row in rows for panel in row], legend, masks, columns=columns)


def save_image(path: Path, image: np.ndarray) -> None:
    """Write an RGB or grey picture, or for the suffix ``.npy`` an array; raises StorageError."""
    if path.suffix == ".npy":
        np.save(content := io.BytesIO(), image)
        return write_file(path, content.getvalue())
    ordered = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    # Encoded in memory: cv2.imwrite fails on Windows for names that are not ASCII.
    write_file(path, cv2.imencode(path.suffix, ordered)[1].tobytes())
