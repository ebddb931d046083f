"""A picture and its mask, drawn together by shapes, and the random choices that shapes need.

All coordinates are in pixels, (0, 0) is the top left corner.
"""

import random
from collections.abc import Sequence

import cv2
import numpy as np

from danet.datasets.labels import Color

Box = tuple[float, float, float, float]  # left, top, right, bottom; the last two are exclusive
Pair = tuple[float, float]  # across and down


class Canvas:
    """A picture and its mask; each shape is drawn over the earlier ones and the background.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        mask: (H, W) uint8, class indices.
        unit: The unit of length of objects, in pixels.
    """

    def __init__(self, height: int, width: int, *, background: int) -> None:
        self.height, self.width = height, width
        self.image = np.zeros((height, width, 3), np.uint8)
        self.mask = np.full((height, width), background, np.uint8)
        self.unit = min(height, 0.45 * width)  # a coach must fit in the right 40 %

    def box(self, kind: int, color: Color, box: Box) -> None:
        """Fill a rectangle of at least one pixel."""
        x, y = max(round(box[0]), 0), max(round(box[1]), 0)
        end_x, end_y = max(round(box[2]), x + 1), max(round(box[3]), y + 1)
        self.image[y:end_y, x:end_x] = color
        self.mask[y:end_y, x:end_x] = kind

    def ellipse(self, kind: int, color: Color, center: tuple[float, float], *radii: float) -> None:
        """Fill an ellipse of one radius or two, across and down."""
        # cv2 takes whole pixels only, as (x, y).
        place = (round(center[0]), round(center[1])), (round(radii[0]), round(radii[-1])), 0, 0, 360
        cv2.ellipse(self.image, *place, color, cv2.FILLED)
        cv2.ellipse(self.mask, *place, kind, cv2.FILLED)

    def polygon(self, kind: int, color: Color, corners: Sequence[tuple[float, float]]) -> None:
        """Fill a polygon with the given (x, y) corners."""
        points = np.rint(corners).astype(np.int32)
        cv2.fillPoly(self.image, [points], color)
        cv2.fillPoly(self.mask, [points], kind)

    def grid(
        self, color: Color, box: Box, *, pitch: Pair, fill: Pair, opacity: float = 1.0
    ) -> None:
        """Repeat a small rectangle over a box: windows, stripes, joints; the mask is unchanged.

        There is one every ``pitch`` pixels, and it covers the fraction ``fill`` of that distance.
        """
        left, top, right, bottom = (max(round(edge), 0) for edge in box)
        area = self.image[top:bottom, left:right]  # (h, w, 3), a view
        across = np.arange(area.shape[1]) / pitch[0] % 1 < fill[0]
        down = np.arange(area.shape[0]) / pitch[1] % 1 < fill[1]
        chosen = np.ix_(down, across)  # the cross product of rows and columns
        area[chosen] = area[chosen] * (1 - opacity) + np.multiply(color, opacity)


def shade(color: Sequence[float], factor: float) -> Color:
    """Return the colour, darker below 1 and brighter above."""
    red, green, blue = (min(max(int(value * factor), 0), 255) for value in color)
    return red, green, blue


def pick(rng: random.Random, colors: Sequence[Color]) -> Color:
    """Return one of the colours at random, with a little jitter."""
    return shade([value + rng.uniform(-12, 12) for value in rng.choice(colors)], 1.0)


def spread(rng: random.Random, start: float, stop: float, *, room: float) -> list[float]:
    """Return one or more random places in start..stop, each with ``room`` to its right."""
    slots = max(int((stop - start) / room), 1)
    pitch = (stop - start) / slots
    chosen = rng.sample(range(slots), rng.randint((slots + 1) // 2, slots))
    return [start + slot * pitch + rng.uniform(0, max(pitch - room, 0)) for slot in chosen]
