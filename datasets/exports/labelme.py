"""labelme's JSON, a file for each picture (github.com/wkentaro/labelme).

Shapes are painted in the order of the file, as labelme2voc does. ``imageData`` is not read.
"""

import base64
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import Image
from pydantic import BaseModel

from danet.datasets.exports import shapes
from danet.datasets.layout import split_in
from danet.errors import InputError

_POLYGONS = (None, "polygon", "rectangle", "oriented_rectangle")  # None in old files
_WITHOUT_AREA = ("line", "linestrip", "point", "points")


class _Shape(BaseModel):
    label: str
    points: list[tuple[float, float]]
    shape_type: str | None = None
    mask: str | None = None  # PNG in base64


class _File(BaseModel):
    shapes: list[_Shape]
    imagePath: str
    imageHeight: int | None = None
    imageWidth: int | None = None


def find(root: Path) -> list[Path]:
    """Return the JSON files with shapes."""
    return shapes.files_with(root, (".json",), '"shapes"')


def read(files: Sequence[Path], root: Path) -> shapes.Export:
    """Read all files; labels are those of the shapes, sorted."""
    pictures = []
    for path in files:
        content = shapes.read_json(path, _File)
        height, width = content.imageHeight, content.imageWidth
        picture = shapes.Picture(
            path,
            PureWindowsPath(content.imagePath).as_posix(),
            [_shape(shape, f"shape {i}", path) for i, shape in enumerate(content.shapes)],
            size=(height, width) if height and width else None,
            split=split_in(path.relative_to(root)),
        )
        pictures.append(picture)
    labels = {shape.label for picture in pictures for shape in picture.shapes}
    return shapes.Export(sorted(labels), pictures)


def _shape(shape: _Shape, where: str, path: Path) -> shapes.Shape:
    label, kind, place = shape.label, shape.shape_type, f"{path}, {where} ({shape.label})"
    ring = shapes.polygon(shape.points, place)
    if not label.strip():
        raise InputError(f"{place}: its label is empty; give it one in labelme")
    if kind in ("circle", "mask") and len(ring) != 2:
        raise InputError(f"{place}: a {kind} has two points, this one has {len(ring)}")
    if kind == "mask":
        bitmap = partial(_decode, shape.mask or "", ring, place)
        return shapes.Shape(label, where, bitmap=bitmap)
    if kind == "circle":  # its centre, and a point on it
        ring = shapes.ellipse(*ring[0], *[np.hypot(*(ring[1] - ring[0]))] * 2)
    elif kind == "rectangle" and len(ring) == 2:  # opposite corners
        ring = shapes.box(*ring.min(axis=0), *ring.max(axis=0))
    elif kind not in _POLYGONS + _WITHOUT_AREA:
        raise InputError(f"{place}: shape_type={kind!r} is not a shape of labelme's")
    return shapes.Shape(label, where, [] if kind in _WITHOUT_AREA else [ring])


def _decode(text: str, ring: np.ndarray, place: str) -> shapes.Bitmap:
    """Decode a mask, which lies from the first of two points to the second, a pixel included."""
    sides = ring[1] - ring[0] + 1
    try:
        with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
            if (abs(sides - picture.size) > 1).any():  # labelme rounds fractions
                raise ValueError(f"{picture.size} between points for {sides.tolist()}")
            inside = np.asarray(picture.convert("L")) > 0
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{place}: its mask is no PNG of its size ({error})") from error
    return shapes.Bitmap(inside, *ring[0].round().astype(int).tolist())
