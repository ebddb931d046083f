"""Supervisely's JSON: meta.json, and DATASET/ann/NAME.jpg.json for DATASET/img/NAME.jpg.

The form is that of developer.supervisely.com, "Supervisely annotation format". A point names a
pixel, and its fraction is dropped, as by their SDK; outlines run through the centres of pixels,
where the SDK has all that they touch in an object, or in its hole. A tag of the picture says its
split, else the name of the data set.
"""

import base64
import io
import zlib
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import AliasPath, BaseModel, Field

from danet.datasets.exports.shapes import Bitmap, Export, Picture, Shape, box, polygon, read_json
from danet.datasets.labels import check_colors
from danet.datasets.layout import SPLIT_OF, split_in
from danet.datasets.listing import find_files
from danet.errors import InputError

_FAILURES = (KeyError, TypeError, ValueError, OverflowError, OSError, SyntaxError, zlib.error)


class _Class(BaseModel):
    title: str = Field(min_length=1)
    color: str = Field(pattern="^#[0-9A-Fa-f]{6}$")


class _Meta(BaseModel):
    classes: list[_Class]


class _Object(BaseModel):
    label: str = Field(alias="classTitle")
    kind: str = Field(alias="geometryType")
    points: dict[str, list[Any]] = {}
    bitmap: dict[str, Any] = {}


class _File(BaseModel):
    height: int = Field(validation_alias=AliasPath("size", "height"))
    width: int = Field(validation_alias=AliasPath("size", "width"))
    objects: list[_Object]
    tags: list[dict[str, Any]] = []


def find(root: Path) -> list[Path]:
    """Return files meta.json and ``ann/*.json``, if there are both."""
    files = [root / name for name in find_files(root, (".json",))]
    found = [path for path in files if path.name == "meta.json" or path.parent.name == "ann"]
    return found if len({path.name == "meta.json" for path in found}) == 2 else []


def read(files: Sequence[Path], root: Path) -> Export:
    """Read all files; labels are the classes of the first meta.json, then further ones."""
    metas = [path for path in files if path.name == "meta.json"]
    classes = [found for path in metas for found in read_json(path, _Meta).classes]
    colors = {found.title: [*bytes.fromhex(found.color[1:])] for found in classes}
    pictures = []
    for path in (path for path in files if path.name != "meta.json"):
        content, folder = read_json(path, _File), path.parent.parent
        size = content.height, content.width
        objects = enumerate(content.objects, start=1)
        shapes = [_shape(found, f"object {i}", size, path, colors) for i, found in objects]
        tags = [SPLIT_OF.get(str(tag.get("name")).lower()) for tag in content.tags]
        split = next(filter(None, tags), split_in(folder.relative_to(root)))
        name = str(folder / "img" / path.name.removesuffix(".json"))
        pictures.append(Picture(path, name, shapes, size=size, split=split))
    return Export([*colors], pictures, check_colors([*colors.values()], str(metas[0])))


def _shape(
    found: _Object, where: str, size: tuple[int, int], path: Path, labels: Collection[str]
) -> Shape:
    label, place = found.label, f"{path}, {where} ({found.label})"
    if label not in labels:
        raise InputError(f"{place}: meta.json has no such class, only {', '.join(labels)}")
    if found.kind in ("bitmap", "alpha_mask"):
        return Shape(label, where, bitmap=partial(_decode, found.bitmap, size, place))
    if found.kind not in ("polygon", "rectangle"):
        return Shape(label, where)  # points and lines
    if "exterior" not in found.points:
        raise InputError(f"{place}: points.exterior is missing, expected [[x, y], ...]")
    rings = [found.points["exterior"], *found.points.get("interior", ())]
    outline, *holes = [np.floor(polygon(ring, place)) + 0.5 for ring in rings]
    if found.kind == "rectangle" and len(outline) > 1:  # from a pixel to a pixel
        outline = box(*outline.min(axis=0) - 0.5, *outline.max(axis=0) + 0.5)
    return Shape(label, where, [outline], holes)


def _decode(bitmap: dict[str, Any], size: tuple[int, int], place: str) -> Bitmap:
    """Decode a PNG, packed by zlib or not; the object is where alpha is, else where a value is."""
    try:
        data = base64.b64decode(bitmap["data"], validate=True)
        if not data.startswith(b"\x89PNG"):
            # No PNG of the picture's size is longer, and a short text can unpack to gigabytes.
            data = zlib.decompressobj().decompress(data, 5 * size[0] * size[1] + 2**16)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.height > size[0] or picture.width > size[1]:
                raise ValueError(f"{picture.width} x {picture.height} pixels")
            has_alpha = "A" in picture.mode or "transparency" in picture.info
            pixels = np.array(picture.convert("RGBA"))[..., 3] if has_alpha else np.array(picture)
        left, top = map(int, bitmap["origin"])
    except (*_FAILURES, Image.DecompressionBombError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{place}: its bitmap is no mask within the picture ({reason})") from error
    return Bitmap(np.atleast_3d(pixels).max(axis=2) > 0, left, top)
