"""Several pictures on one: a contact sheet, and two networks side by side."""

from collections.abc import Sequence

import numpy as np

from danet.types import IGNORE
from danet.visualization.overlay import (
    Palette,
    SegmentedImage,
    add_title,
    arrange,
    classes_in,
    mark,
    overlay,
    panels_of,
    shrink,
    stack,
    with_legend,
)

_TILE = 288
"""Width of a picture on a contact sheet, in pixels."""


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
