"""Class maps as colours over a picture, with a legend and titles.

All pictures are uint8 (H, W, 3), RGB.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from danet.errors import StorageError
from danet.evaluation.inference import Inference, Whole
from danet.filesystem import explain_storage
from danet.types import IGNORE

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_INK = (30, 30, 30)
_PAPER = 255
_LINE = 18
"""Height of a line of text, in pixels."""

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


def classes_in(*masks: np.ndarray | None) -> set[int]:
    """Return the class indices that occur in masks (H, W), IGNORE left out."""
    found = set[int]()
    for mask in masks:
        found.update(() if mask is None else np.unique(mask).tolist())
    return found - {IGNORE}


def colorize(mask: np.ndarray, palette: Palette) -> np.ndarray:
    """Return the colours (H, W, 3) of classes (H, W); IGNORE becomes black."""
    table = np.zeros((256, 3), np.uint8)  # one row per byte, so that any mask can index it
    table[: len(palette)] = palette
    return table[mask]


def overlay(
    image: np.ndarray, mask: np.ndarray, palette: Palette, *, opacity: float = 0.55
) -> np.ndarray:
    """Blend the colours of the classes with the image; ignored pixels show the image."""
    drawn = np.empty_like(image)
    for rows in row_blocks(mask):
        mixed = image[rows] * (1 - opacity) + colorize(mask[rows], palette) * opacity
        is_ignored = (mask[rows] == IGNORE)[..., None]
        drawn[rows] = np.where(is_ignored, image[rows], np.rint(mixed).astype(np.uint8))
    return drawn


def row_blocks(picture: np.ndarray) -> list[slice]:
    """Cut the rows of a picture into blocks of at most 2**20 pixels, or one row."""
    # Blending in float64 takes 24 bytes a pixel.
    height = picture.shape[0]
    step = max(1, 2**20 // max(1, picture.shape[1]))
    return [slice(top, min(top + step, height)) for top in range(0, height, step)]


def error_map(image: np.ndarray, prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Draw the image in grey, wrong pixels in red, ignored ones in black."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    shown = np.repeat(grey[..., None] // 2 + 100, 3, axis=2)
    shown[prediction != truth] = (220, 40, 40)
    shown[truth == IGNORE] = 0
    return shown


def add_title(panel: np.ndarray, title: str) -> np.ndarray:
    """Return a picture with a line of text above it."""
    bar = np.full((_LINE, panel.shape[1], 3), _PAPER, np.uint8)
    cv2.putText(bar, title, (3, 13), _FONT, 0.4, _INK, 1, cv2.LINE_AA)
    return np.vstack((bar, panel))


def arrange(panels: Sequence[np.ndarray], *, gap: int = 4) -> np.ndarray:
    """Arrange pictures of one size in rows of four, wide ones below each other."""
    height, width = panels[0].shape[:2]
    columns = 1 if width > 2 * height else min(4, len(panels))
    rows = -(-len(panels) // columns)
    canvas = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, 3), _PAPER, np.uint8
    )
    for i, panel in enumerate(panels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = panel
    return canvas


def legend(
    classes: Sequence[str], palette: Palette, present: Sequence[int], width: int
) -> np.ndarray:
    """Draw a swatch and a name for each class that is present, in lines of ``width`` pixels."""
    place, spots = [0, 0], []
    for index in present:
        (text_width, _), _ = cv2.getTextSize(classes[index], _FONT, 0.4, 1)
        needed = text_width + 28
        if place[0] and place[0] + needed > width:
            place = [0, place[1] + 1]
        spots.append((index, place[0], place[1] * _LINE))
        place[0] += needed
    canvas = np.full(((place[1] + 1) * _LINE, width, 3), _PAPER, np.uint8)
    for index, x, y in spots:
        cv2.rectangle(canvas, (x + 3, y + 4), (x + 14, y + 14), tuple(palette[index]), cv2.FILLED)
        cv2.putText(canvas, classes[index], (x + 18, y + 13), _FONT, 0.4, _INK, 1, cv2.LINE_AA)
    return canvas


def panels_of(
    picture: SegmentedImage, palette: Palette, *, opacity: float = 0.55
) -> list[np.ndarray]:
    """Draw image, prediction and, where the truth is known, truth and errors, each titled."""
    image, prediction, truth = picture.image, picture.prediction, picture.truth
    panels = [
        add_title(image, "image"),
        add_title(overlay(image, prediction, palette, opacity=opacity), "prediction"),
    ]
    if truth is not None:
        panels += [
            add_title(overlay(image, truth, palette, opacity=opacity), "truth"),
            add_title(error_map(image, prediction, truth), "errors (red)"),
        ]
    return panels


def sheet(
    picture: SegmentedImage, classes: Sequence[str], palette: Palette, *, opacity: float = 0.55
) -> np.ndarray:
    """Draw the panels of an image above a legend."""
    body = arrange(panels_of(picture, palette, opacity=opacity))
    present = classes_in(picture.prediction, picture.truth)
    return with_legend(body, classes, palette, present)


def with_legend(
    body: np.ndarray, classes: Sequence[str], palette: Palette, present: Collection[int]
) -> np.ndarray:
    """Return a picture with a legend of the classes that are present below it."""
    return np.vstack((body, legend(classes, palette, sorted(present), body.shape[1])))


@torch.inference_mode()
def as_tensor(image: np.ndarray, device: torch.device) -> Tensor:
    """Return an image, uint8 (H, W, 3), as uint8 (1, 3, H, W) on a device."""
    return torch.from_numpy(image).permute(2, 0, 1)[None].to(device)


def predict(
    model: nn.Module, image: np.ndarray, device: torch.device, infer: Inference | None = None
) -> np.ndarray:
    """Return the classes (H, W), uint8, that a network in eval mode predicts for one image.

    By default one too large to pass whole is done in windows; see ``Whole``.
    """
    return (infer or Whole()).predict(model, as_tensor(image, device))[0].cpu().numpy()


def save_image(path: Path, image: np.ndarray) -> None:
    """Write an RGB or grey picture; raises StorageError."""
    ordered = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    # Encoded in memory: cv2.imwrite fails on Windows for names that are not ASCII.
    done, data = cv2.imencode(path.suffix, ordered)
    assert done
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.data)
    except OSError as error:
        raise explain_storage(error) or StorageError(
            f"{path}: the picture could not be written ({error.strerror})"
        ) from error
