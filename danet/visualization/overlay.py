"""Class maps as colours over a picture, with a legend and titles, alone and on sheets.

All pictures are uint8 (H, W, 3), RGB.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from danet.evaluation.base import Inference
from danet.filesystem import write_file
from danet.types import IGNORE

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_INK = (30, 30, 30)
_PAPER = 255
_LINE = 18
"""Height of a line of text, in pixels."""
_GAP = 4
"""Between pictures, in pixels."""
_TILE = 288
"""Width of a picture on a contact sheet, in pixels."""

Palette = Sequence[tuple[int, int, int]]


class SegmentedImage(NamedTuple):
    """An image, the classes predicted for its pixels, and the true ones where they are known."""

    name: str
    image: np.ndarray
    """uint8 (H, W, 3), RGB."""
    prediction: np.ndarray
    """uint8 (H, W), class indices."""
    truth: np.ndarray | None = None
    """uint8 (H, W), class indices or IGNORE."""


def shrink(picture: SegmentedImage, factor: float) -> SegmentedImage:
    """Return a picture with sides of at most ``factor`` of its own, as it is from 1 on."""
    if factor >= 1:
        return picture
    name, image, prediction, truth = picture
    size = max(1, int(image.shape[1] * factor)), max(1, int(image.shape[0] * factor))  # (W, H)

    def pick(mask: np.ndarray) -> np.ndarray:  # class indices must not be averaged
        return cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT)

    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return SegmentedImage(name, small, pick(prediction), None if truth is None else pick(truth))


def colorize(mask: np.ndarray, palette: Palette) -> np.ndarray:
    """Return the colours (H, W, 3) of classes (H, W); IGNORE becomes black."""
    table = np.zeros((256, 3), np.uint8)  # one row per byte, so that any mask can index it
    table[: len(palette)] = palette
    return table[mask]


def overlay(
    image: np.ndarray, mask: np.ndarray, palette: Palette, *, opacity: float = 0.55
) -> np.ndarray:
    """Blend the colours of the classes with the image; ignored pixels show the image."""
    drawn = cv2.addWeighted(image, 1 - opacity, colorize(mask, palette), opacity, 0)
    is_ignored = mask == IGNORE
    drawn[is_ignored] = image[is_ignored]
    return drawn


def mark(image: np.ndarray, *marks: tuple[np.ndarray, tuple[int, int, int]]) -> np.ndarray:
    """Return the image in light grey with pixels, bool (H, W), in colours; the last one wins."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    shown = np.repeat(grey[..., None] // 2 + 100, 3, axis=2)
    for pixels, color in marks:
        shown[pixels] = color
    return shown


def add_title(panel: np.ndarray, title: str) -> np.ndarray:
    """Return a picture with a line of text above it."""
    bar = np.full((_LINE, panel.shape[1], 3), _PAPER, np.uint8)
    cv2.putText(bar, title, (3, 13), _FONT, 0.4, _INK, 1, cv2.LINE_AA)
    return np.vstack((bar, panel))


def arrange(panels: Sequence[np.ndarray]) -> np.ndarray:
    """Arrange pictures of one size in rows of four, wide ones below each other."""
    height, width = panels[0].shape[:2]
    columns = 1 if width > 2 * height else 4
    rows = [panels[first : first + columns] for first in range(0, len(panels), columns)]
    return stack(rows)[:-_GAP, :-_GAP]


def stack(rows: Sequence[Sequence[np.ndarray]], *, width: int = 0) -> np.ndarray:
    """Arrange rows of pictures, those of a row of one height, with a gap behind each.

    Args:
        rows: May differ in height and number.
        width: At least of each picture.
    """
    drawn = []
    for row in rows:
        padded = [_pad(one, _GAP, _GAP + max(0, width - one.shape[1])) for one in row]
        drawn.append(np.hstack(padded))
    widest = max(row.shape[1] for row in drawn)
    return np.vstack([_pad(row, 0, widest - row.shape[1]) for row in drawn])


def _pad(picture: np.ndarray, below: int, right: int) -> np.ndarray:
    return np.pad(picture, ((0, below), (0, right), (0, 0)), constant_values=_PAPER)


def with_legend(
    body: np.ndarray, classes: Sequence[str], palette: Palette, present: Collection[int]
) -> np.ndarray:
    """Return a picture with a swatch and a name below it for each class that is present."""
    place, spots = [0, 0], []
    for index in sorted(present):
        (text_width, _), _ = cv2.getTextSize(classes[index], _FONT, 0.4, 1)
        needed = text_width + 28
        if place[0] and place[0] + needed > body.shape[1]:
            place = [0, place[1] + _LINE]
        spots.append((index, *place))
        place[0] += needed
    canvas = np.full((place[1] + _LINE, body.shape[1], 3), _PAPER, np.uint8)
    for index, x, y in spots:
        cv2.rectangle(canvas, (x + 3, y + 4), (x + 14, y + 14), tuple(palette[index]), cv2.FILLED)
        cv2.putText(canvas, classes[index], (x + 18, y + 13), _FONT, 0.4, _INK, 1, cv2.LINE_AA)
    return np.vstack((body, canvas))


def classes_in(*masks: np.ndarray | None) -> set[int]:
    """Return the class indices that occur in masks (H, W), IGNORE left out."""
    return {int(c) for mask in masks if mask is not None for c in np.unique(mask)} - {IGNORE}


def panels_of(
    picture: SegmentedImage, palette: Palette, *, opacity: float = 0.55
) -> list[np.ndarray]:
    """Draw image, prediction and, where the truth is known, truth and errors, each titled.

    Wrong pixels are red, ignored ones black.
    """
    name, image, prediction, truth = picture
    drawn = overlay(image, prediction, palette, opacity=opacity)
    panels = [add_title(image, name), add_title(drawn, "prediction")]
    if truth is not None:
        panels.append(add_title(overlay(image, truth, palette, opacity=opacity), "truth"))
        is_wrong, is_ignored = prediction != truth, truth == IGNORE
        errors = mark(image, (is_wrong, (220, 40, 40)), (is_ignored, (0, 0, 0)))
        known = is_wrong[~is_ignored]
        title = f"errors ({100 * known.mean():.1f} %)" if known.size else "nothing known"
        panels.append(add_title(errors, title))
    return panels


def sheet(
    picture: SegmentedImage, classes: Sequence[str], palette: Palette, *, opacity: float = 0.55
) -> np.ndarray:
    """Draw the panels of an image above a legend."""
    body = arrange(panels_of(picture, palette, opacity=opacity))
    return with_legend(body, classes, palette, classes_in(picture.prediction, picture.truth))


def thumbnail(picture: SegmentedImage) -> SegmentedImage:
    """Return the picture at the size of a contact sheet, so that many fit into memory."""
    height, width = picture.prediction.shape
    return shrink(picture, min(_TILE / width, 2 * _TILE / height))


def contact_sheet(
    pictures: Sequence[SegmentedImage],
    classes: Sequence[str],
    palette: Palette,
    *,
    opacity: float = 0.55,
) -> np.ndarray:
    """Draw a row per thumbnail: image, prediction and, where it is known, truth and errors."""
    rows = [panels_of(picture, palette, opacity=opacity) for picture in pictures]
    masks = (mask for picture in pictures for mask in (picture.prediction, picture.truth))
    return with_legend(stack(rows, width=_TILE), classes, palette, classes_in(*masks))


def side_by_side(
    first: SegmentedImage,
    second: np.ndarray,
    titles: tuple[str, str],
    classes: Sequence[str],
    palette: Palette,
    *,
    opacity: float = 0.55,
) -> np.ndarray:
    """Draw the predictions of two networks for one image, and where they differ.

    Where the truth is known, the last panel marks pixels that only one has right: blue the first,
    orange the second. Otherwise pixels with different classes are magenta.

    Args:
        first: With the prediction of the first network.
        second: Prediction of the second, uint8 (H, W).
        titles: Of both.
        classes: Of both networks.
        palette: Of both networks.
        opacity: Of overlays.
    """
    _, image, prediction, truth = first
    masks = {"truth": truth} if truth is not None else {}
    masks |= dict(zip(titles, (prediction, second), strict=True))
    panels = [add_title(image, "image")]
    panels += [
        add_title(overlay(image, mask, palette, opacity=opacity), title)
        for title, mask in masks.items()
    ]
    differ = prediction != second
    if truth is None:
        shown = mark(image, (differ, (200, 0, 200)))
        panels.append(add_title(shown, f"they differ on {100 * differ.mean():.1f} %"))
    else:
        only_first = (prediction == truth) & differ, (30, 110, 220)
        only_second = (second == truth) & differ, (240, 130, 20)
        shown = mark(image, only_first, only_second, (truth == IGNORE, (0, 0, 0)))
        panels.append(add_title(shown, "only blue: 1st right, orange: 2nd"))
    present = classes_in(prediction, second, truth)
    return with_legend(arrange(panels), classes, palette, present)


def as_tensor(image: np.ndarray, model: nn.Module) -> Tensor:
    """Return an image, uint8 (H, W, 3), as uint8 (1, 3, H, W) on the device of a network."""
    device = next(model.parameters()).device
    return torch.from_numpy(image).permute(2, 0, 1)[None].to(device)


@torch.inference_mode()
def predict(model: nn.Module, image: np.ndarray, infer: Inference) -> np.ndarray:
    """Return the classes (H, W), uint8, that a network in eval mode predicts for one image."""
    return infer.predict(model, as_tensor(image, model))[0].cpu().numpy()


def save_image(path: Path, image: np.ndarray) -> None:
    """Write an RGB or grey picture; raises StorageError."""
    ordered = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    # Encoded in memory: cv2.imwrite fails on Windows for names that are not ASCII.
    done, data = cv2.imencode(path.suffix, ordered)
    assert done
    write_file(path, data.tobytes())
