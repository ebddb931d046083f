"""Several pictures on one: a contact sheet, and two networks side by side."""

from collections.abc import Sequence

import cv2
import numpy as np

from danet.types import IGNORE
from danet.visualization.overlay import (
    Palette,
    SegmentedImage,
    add_title,
    arrange,
    classes_in,
    error_map,
    overlay,
    with_legend,
)

_TILE = 288
"""Width of a picture on a contact sheet, in pixels."""


def shrink(picture: SegmentedImage) -> SegmentedImage:
    """Return the picture at the size of a contact sheet, so that many fit into memory."""
    height, width = picture.prediction.shape
    factor = min(1.0, _TILE / width, 2 * _TILE / height)
    size = max(1, round(width * factor)), max(1, round(height * factor))  # (W, H), as OpenCV has it
    image = cv2.resize(picture.image, size, interpolation=cv2.INTER_AREA)
    prediction = cv2.resize(picture.prediction, size, interpolation=cv2.INTER_NEAREST)
    truth = picture.truth
    if truth is not None:
        truth = cv2.resize(truth, size, interpolation=cv2.INTER_NEAREST)
    return SegmentedImage(picture.name, image, prediction, truth)


def contact_sheet(
    pictures: Sequence[SegmentedImage],
    classes: Sequence[str],
    palette: Palette,
    *,
    opacity: float = 0.55,
) -> np.ndarray:
    """Draw a row per picture: image, prediction and, where it is known, truth and errors."""
    rows, present = [], set[int]()
    for name, image, prediction, truth in map(shrink, pictures):
        panels = {
            name: image,
            "prediction": overlay(image, prediction, palette, opacity=opacity),
        }
        present |= classes_in(prediction, truth)
        if truth is not None:
            panels["truth"] = overlay(image, truth, palette, opacity=opacity)
            right = (prediction == truth)[truth != IGNORE]
            share = f"errors ({100 * (1 - right.mean()):.1f} %)" if right.size else "nothing known"
            panels[share] = error_map(image, prediction, truth)
        rows.append(np.hstack([_fit(add_title(panel, title)) for title, panel in panels.items()]))
    width = max(row.shape[1] for row in rows)
    body = np.vstack([_pad_right(row, width) for row in rows])
    return with_legend(body, classes, palette, present)


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
    panels = [add_title(image, "image")]
    if truth is not None:
        panels.append(add_title(overlay(image, truth, palette, opacity=opacity), "truth"))
    for title, mask in zip(titles, (prediction, second), strict=True):
        panels.append(add_title(overlay(image, mask, palette, opacity=opacity), title))
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) // 2 + 100, cv2.COLOR_GRAY2RGB)
    differ = prediction != second
    if truth is None:
        grey[differ] = (200, 0, 200)
        panels.append(add_title(grey, f"they differ on {100 * differ.mean():.1f} %"))
    else:
        grey[(prediction == truth) & differ] = (30, 110, 220)
        grey[(second == truth) & differ] = (240, 130, 20)
        grey[truth == IGNORE] = 0
        panels.append(add_title(grey, "only blue: 1st right, orange: 2nd"))
    present = classes_in(prediction, second, truth)
    return with_legend(arrange(panels), classes, palette, present)


def _fit(panel: np.ndarray) -> np.ndarray:
    """Add a margin, and white where a panel is narrower than a tile."""
    wide = max(_TILE, panel.shape[1])
    return _pad_right(np.pad(panel, ((0, 4), (0, 0), (0, 0)), constant_values=255), wide + 4)


def _pad_right(panel: np.ndarray, width: int) -> np.ndarray:
    missing = ((0, 0), (0, width - panel.shape[1]), (0, 0))
    return np.pad(panel, missing, constant_values=255)
