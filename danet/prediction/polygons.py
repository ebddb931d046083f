"""Class maps as polygons with holes.

Coordinates are x and y in pixels from the picture's top left corner: the pixel of row 0 and column
0 covers 0..1 on both axes. The corners of regions are whole numbers.
"""

from itertools import pairwise
from typing import NamedTuple

import cv2
import numpy as np


class Region(NamedTuple):
    """Pixels of one class that are connected through their sides."""

    class_index: int
    outer: np.ndarray  # int32 (N, 2), corners of its outline
    holes: list[np.ndarray]  # the same of what it surrounds, in the other sense of rotation
    area: int  # in pixels, before simplification
    depth: int  # number of regions around it


def find_regions(classes: np.ndarray, background: list[int], tolerance: float) -> list[Region]:
    """Return the regions of a class map (H, W), each after those around it.

    Outlines are simplified by the algorithm of Douglas and Peucker (1973): a corner that is left
    out lies within ``tolerance`` pixels of the new outline. What two regions share is simplified
    once, so they stay neighbours. With 0 the pixels whose centres are inside are those of the map.
    Of the classes ``background`` only regions that others surround are returned.
    """
    padded = np.pad(classes.astype(np.int32), 1, constant_values=-1)
    across, down = padded[:, 1:] != padded[:, :-1], padded[1:] != padded[:-1]
    around = across[1:], across[:-1], down[:, 1:], down[:, :-1]
    borders = np.stack(around).sum(0, np.uint8)  # that meet at each corner, (H + 1, W + 1)
    borders[:: len(classes), :: classes.shape[1]] = 4  # the picture's corners are kept, too
    depth, found = np.zeros(classes.shape, np.uint16), []
    # Background comes last, when it is known what the others surround.
    for index in sorted(np.unique(classes).tolist(), key=lambda i: (i in background, i)):
        is_class = (classes == index).view(np.uint8)
        _, labels, boxes, _ = cv2.connectedComponentsWithStats(is_class, connectivity=4)
        for label, (x, y, width, height, area) in enumerate(boxes[1:].tolist(), start=1):
            box = np.s_[y : y + height, x : x + width]
            mask = labels[box] == label
            pixel = y, x + int(mask[0].argmax())
            if index in background and not depth[pixel]:
                continue
            # OpenCV's contours join centres of pixels. At twice the size the centre nearest to a
            # corner of the region is that of a pixel of its own, and halving gives the corner.
            doubled = cv2.resize(mask.view(np.uint8), None, fx=2, fy=2, interpolation=0)
            rings, _ = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            if len(rings) > 1:  # the first is the outer one
                cv2.drawContours(doubled, rings, 0, 1, cv2.FILLED)
                depth[box] += doubled[::2, ::2] > mask
            lines = [(ring[:, 0] + 1) // 2 + (x, y) for ring in rings]
            outer, *holes = (_simplify(line, borders, tolerance) for line in lines)
            found.append((pixel, Region(index, outer, holes, area, 0)))
    regions = [region._replace(depth=int(depth[pixel])) for pixel, region in found]
    return sorted(regions, key=lambda region: (region.depth, -region.area))


def _simplify(points: np.ndarray, borders: np.ndarray, tolerance: float) -> np.ndarray:
    """Return the corners, int32, of a closed line (N, 2) of steps of at most a pixel."""
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)].astype(np.int32)
    is_corner = (np.roll(points, 1, 0) + np.roll(points, -1, 0) != 2 * points).any(axis=1)
    if not tolerance:
        return points[is_corner]
    is_end = borders[points[:, 1], points[:, 0]] > 2
    if not is_end.any():  # an island: the same start seen from within and from without
        is_end[np.lexsort(points.T)[0]] = True
    points, is_end = points[is_corner | is_end], is_end[is_corner | is_end]
    ends = [*np.flatnonzero(is_end), len(points) + is_end.argmax()]
    closed = np.concatenate((points, points[: is_end.argmax() + 1]))
    parts = (_simplify_part(closed[a : b + 1], tolerance)[:-1] for a, b in pairwise(ends))
    found = np.concatenate(tuple(parts))
    return found if cv2.contourArea(found) else points


def _simplify_part(line: np.ndarray, tolerance: float) -> np.ndarray:
    """Return the ends of a line (N, 2) and the corners it needs, the same in both directions."""
    backward = line[::-1]
    if backward.tolist() < line.tolist():
        return _simplify_part(backward, tolerance)[::-1]
    # A loop goes to its farthest corner and back.
    is_loop = (line[0] == line[-1]).all()
    middle = np.hypot(*(line - line[0]).T).argmax() if is_loop else len(line) - 1
    halves = [half for half in (line[: middle + 1], line[middle:]) if len(half) > 1]
    found = [cv2.approxPolyDP(half, tolerance, closed=False)[:-1, 0] for half in halves]
    return np.concatenate((*found, line[-1:]))


def as_one_line(region: Region) -> np.ndarray:
    """Return a closed line, int32 (N, 2), around a region without its holes.

    It leads straight to each hole and back, so filling by the even-odd rule and by the nonzero rule
    give the same.
    """
    line = region.outer
    for hole in sorted(region.holes, key=lambda ring: ring[:, 0].min()):
        hole = np.roll(hole, -hole[:, 0].argmin(), axis=0)
        nearest = np.hypot(*(line - hole[0]).T).argmin()
        line = np.concatenate((line[: nearest + 1], hole, hole[:1], line[nearest:]))
    return line
