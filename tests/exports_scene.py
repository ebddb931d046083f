"""Three small pictures with objects, and a slow painter that shares no code with the library."""

from typing import NamedTuple

import numpy as np

from danet.datasets.exports.shapes import paint


class Thing(NamedTuple):
    """An object: polygons, x and y in pixels, without holes; or a bitmap from left and top on."""

    label: str
    rings: tuple = ()
    holes: tuple = ()
    bitmap: np.ndarray | None = None
    corner: tuple[int, int] = (0, 0)


def disc(radius):
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return x**2 + y**2 <= radius**2 - 1


LABELS = ("plate", "cup", "fork")
PLATE = ((4.3, 6.1), (60.2, 3.9), (70.7, 50.4), (30.5, 57.0), (6.6, 40.8))
HOLE = ((20.2, 15.4), (45.1, 14.2), (40.9, 38.3), (22.8, 35.6))
BOX = ((50.0, 20.0), (77.0, 20.0), (77.0, 45.0), (50.0, 45.0))
FORK = ((2.5, 50.5), (25.0, 41.5), (38.5, 58.0))
SPOON = ((41.2, 2.2), (58.0, 9.5), (44.4, 17.1))
BLOB = disc(9)
BLOB[5:9, 4:12] = False
SIZES = {"first.png": (60, 80), "second.png": (48, 64), "third.png": (40, 56)}
POLYGONS = {
    "first.png": [Thing("plate", (PLATE,)), Thing("cup", (BOX,)), Thing("fork", (FORK,))],
    "second.png": [Thing("fork", (SPOON,)), Thing("cup", (HOLE,))],
    "third.png": [],
}
"""Of one part, without holes, from the largest to the smallest."""
THINGS = {
    "first.png": [Thing("plate", (PLATE,), (HOLE,)), *POLYGONS["first.png"][1:]],
    "second.png": [
        *(Thing("cup", bitmap=BLOB, corner=(30, 20)), Thing("fork", (SPOON,))),
        Thing("plate", bitmap=BLOB[3:], corner=(22, 26)),
    ],
    "third.png": [],
}


def within(ring, size):
    """Whether the centre of each pixel is inside a polygon, by the even-odd rule; bool (H, W)."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    inside = np.zeros(size, bool)
    for (x0, y0), (x1, y1) in zip(ring, (*ring[1:], ring[0]), strict=True):
        if y0 != y1:
            crosses = (y0 <= y) != (y1 <= y)
            inside ^= crosses & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
    return inside


def near(ring, size, distance=1.0):
    """Whether the centre of each pixel is so near to the outline of a polygon; bool (H, W)."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    found = np.zeros(size, bool)
    for (x0, y0), (x1, y1) in zip(ring, (*ring[1:], ring[0]), strict=True):
        length = (x1 - x0) ** 2 + (y1 - y0) ** 2
        share = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / max(length, 1e-9), 0, 1)
        gap = np.hypot(x - x0 - share * (x1 - x0), y - y0 - share * (y1 - y0))
        found |= gap <= distance
    return found


def slow(things, size, labels):
    """Returns labels (H, W), from 1 on, and where an outline is near, so that they may differ."""
    canvas, doubtful = np.zeros(size, int), np.zeros(size, bool)
    for thing in things:
        inside = np.zeros(size, bool)
        if thing.bitmap is not None:
            (left, top), (height, width) = thing.corner, thing.bitmap.shape
            inside[top : top + height, left : left + width] = thing.bitmap
        for ring in thing.rings:
            inside |= within(ring, size)
        for hole in thing.holes:
            inside &= ~within(hole, size)
        for ring in (*thing.rings, *thing.holes):
            doubtful |= near(ring, size)
        canvas[inside] = 1 + list(labels).index(thing.label)
    return canvas, doubtful


def painted(export, name):
    """Paints a picture of an export by the library."""
    (picture,) = [p for p in export.pictures if p.name.replace("\\", "/").endswith(name)]
    return paint(picture, SIZES[name], export.labels)


def check(export, things):
    """Compares all pictures of an export with what the slow painter makes of their objects."""
    assert len(export.pictures) == len(things)
    for name, objects in things.items():
        canvas, doubtful = slow(objects, SIZES[name], export.labels)
        values = painted(export, name).values
        np.testing.assert_array_equal(values[~doubtful], canvas[~doubtful], err_msg=name)
        assert doubtful.mean() < 0.35, name
        assert len(objects) == len(np.unique(canvas)) - 1 or not objects


def read(module, root):
    """Reads and paints all that a module finds, as a training does; returns the export."""
    files = module.find(root)
    assert files, "nothing found"
    export = module.read(files, root)
    for picture in export.pictures:
        found = [size for name, size in SIZES.items() if picture.name.endswith(name)]
        paint(picture, picture.size or (found or [(60, 80)])[0], export.labels)
    return export


def changed(content, path, value):
    """Sets the value at a path of keys in nested content; None removes it. Returns the content."""
    *before, last = path
    place = content
    for key in before:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return content
