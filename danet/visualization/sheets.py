"""Several pictures on one: a contact sheet, and two networks side by side."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from danet.types import IGNORE
from danet.visualization.overlay import Palette, arrange, errors, legend, overlay, titled

_TILE = 288
"""Width of a picture on a contact sheet, in pixels."""


class Seen(NamedTuple):
    """One line of a contact sheet."""

    name: str
    image: np.ndarray
    """uint8 (H, W, 3), RGB."""
    prediction: np.ndarray
    """uint8 (H, W)."""
    truth: np.ndarray | None


def small(seen: Seen) -> Seen:
    """Returns the same at the size of a contact sheet, so that many fit into memory."""
    height, width = seen.prediction.shape
    factor = min(1.0, _TILE / width, 2 * _TILE / height)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    image = cv2.resize(seen.image, size, interpolation=cv2.INTER_AREA)
    prediction = cv2.resize(seen.prediction, size, interpolation=cv2.INTER_NEAREST)
    truth = seen.truth
    if truth is not None:
        truth = cv2.resize(truth, size, interpolation=cv2.INTER_NEAREST)
    return Seen(seen.name, image, prediction, truth)


def contact_sheet(
    lines: Sequence[Seen], classes: Sequence[str], palette: Palette, *, opacity: float = 0.55
) -> np.ndarray:
    """Draws a line for each picture: image, prediction and, where it is known, truth and errors."""
    rows, present = [], set()
    for seen in map(small, lines):
        panels = {
            seen.name: seen.image,
            "prediction": overlay(seen.image, seen.prediction, palette, opacity=opacity),
        }
        present |= set(np.unique(seen.prediction).tolist())
        if seen.truth is not None:
            panels["truth"] = overlay(seen.image, seen.truth, palette, opacity=opacity)
            right = (seen.prediction == seen.truth)[seen.truth != IGNORE]
            share = f"errors ({100 * (1 - right.mean()):.1f} %)" if right.size else "nothing known"
            panels[share] = errors(seen.image, seen.prediction, seen.truth)
            present |= set(np.unique(seen.truth).tolist()) - {IGNORE}
        rows.append(np.hstack([_fit(titled(panel, title)) for title, panel in panels.items()]))
    width = max(row.shape[1] for row in rows)
    rows = [_padded(row, width) for row in rows]
    return np.vstack((*rows, legend(classes, palette, sorted(present), width)))


def side_by_side(
    image: np.ndarray,
    predictions: Sequence[np.ndarray],
    names: Sequence[str],
    truth: np.ndarray | None,
    classes: Sequence[str],
    palette: Palette,
    *,
    opacity: float = 0.55,
) -> np.ndarray:
    """Draws what two networks say about one image, and where they differ.

    Where the truth is known, the last panel tells who is right where only one is: blue the first,
    orange the second. Otherwise pixels with different classes are magenta.
    """
    first, second = predictions
    panels = [titled(image, "image")]
    if truth is not None:
        panels.append(titled(overlay(image, truth, palette, opacity=opacity), "truth"))
    for name, prediction in zip(names, predictions, strict=True):
        panels.append(titled(overlay(image, prediction, palette, opacity=opacity), name))
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) // 2 + 100, cv2.COLOR_GRAY2RGB)
    present = set(np.unique(np.stack((first, second))).tolist())
    if truth is None:
        grey[first != second] = (200, 0, 200)
        panels.append(titled(grey, f"they differ on {100 * (first != second).mean():.1f} %"))
    else:
        present |= set(np.unique(truth).tolist()) - {IGNORE}
        grey[(first == truth) & (second != truth)] = (30, 110, 220)
        grey[(second == truth) & (first != truth)] = (240, 130, 20)
        grey[truth == IGNORE] = 0
        panels.append(titled(grey, "only blue: 1st right, orange: 2nd"))
    body = arrange(panels)
    return np.vstack((body, legend(classes, palette, sorted(present), body.shape[1])))


def _fit(panel: np.ndarray) -> np.ndarray:
    """Adds a margin, and white where a panel is narrower than a tile."""
    wide = max(_TILE, panel.shape[1])
    return _padded(np.pad(panel, ((0, 4), (0, 0), (0, 0)), constant_values=255), wide + 4)


def _padded(panel: np.ndarray, width: int) -> np.ndarray:
    missing = ((0, 0), (0, width - panel.shape[1]), (0, 0))
    return np.pad(panel, missing, constant_values=255)
