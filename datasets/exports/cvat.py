"""CVAT for images 1.1, an XML file (docs.cvat.ai/docs/manual/advanced/xml_format).

Objects are painted by z_order, equal ones in the order of the file. Polylines, points, skeletons
and cuboids have no area here.
"""

import math
import re
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError, fromstring

from danet.datasets.exports import shapes
from danet.datasets.formats.run_lengths import mask_of_runs
from danet.datasets.layout import SPLIT_OF, split_in
from danet.errors import InputError

_COLOR = re.compile("#" + "([0-9a-fA-F]{2})" * 3)
_NUMBERS = {
    "box": ("xtl", "ytl", "xbr", "ybr"),
    "ellipse": ("cx", "cy", "rx", "ry"),
    "mask": ("left", "top", "width", "height"),
}


def find(root: Path) -> list[Path]:
    """Return the XML files of CVAT, also those of videos, which ``read`` refuses."""
    return shapes.files_with(root, (".xml",), "<annotations", "<meta")


def read(files: Sequence[Path], root: Path) -> shapes.Export:
    """Read all files; labels are those of the first, then further ones of others."""
    colors: dict[str, str] = {}
    pictures = []
    for path in files:
        tree = _parse(path)
        labels = {
            name: label.findtext("color", "")
            for label in tree.iterfind("meta/*/labels/label")
            if (name := label.findtext("name")) and not label.findtext("parent")  # of a skeleton
        }
        colors = {**colors, **labels, **colors}  # those of earlier files first
        split = split_in(path.relative_to(root))
        pictures += [_picture(image, labels, path, split) for image in tree.iterfind("image")]
    matches = [_COLOR.fullmatch(color) for color in colors.values()]
    palette = [(int(c[1], 16), int(c[2], 16), int(c[3], 16)) for c in matches if c]
    return shapes.Export([*colors], pictures, palette if len(palette) == len(colors) else None)


def _parse(path: Path) -> Element:
    """Return the root of an XML file of images; without a DOCTYPE no entity can expand."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "<!DOCTYPE" in text:
            raise InputError(f"{path}: it has a DOCTYPE, which CVAT never writes: remove it")
        tree = fromstring(text)
    except (OSError, UnicodeDecodeError, ParseError) as error:
        raise InputError(f"{path}: not XML that can be read ({error})") from error
    if tree.find("track") is not None:
        raise InputError(f"{path}: this is 'CVAT for video': export it as 'CVAT for images 1.1'")
    return tree


def _picture(
    image: Element, labels: Collection[str], path: Path, split: str | None
) -> shapes.Picture:
    if not (name := image.get("name")):
        raise InputError(f"{path}: image {image.get('id')} has no name")
    height, width = shapes.numbers(image.attrib, ("height", "width"), f"{path}, image {name}")
    objects = [
        _object(element, labels, path, f"image {name}, object {i} ({element.tag})")
        for i, element in enumerate(image, start=1)
        if element.tag != "tag"  # of the whole picture
    ]
    objects.sort(key=lambda pair: pair[0])  # stable: equal ones keep their order
    split, size = SPLIT_OF.get(image.get("subset", "").lower(), split), (int(height), int(width))
    return shapes.Picture(path, name, [shape for _, shape in objects], size=size, split=split)


def _object(
    element: Element, labels: Collection[str], path: Path, where: str
) -> tuple[float, shapes.Shape]:
    """Return the z_order of an object, and the object."""
    found, kind, place = element.attrib, element.tag, f"{path}, {where}"
    label = found.get("label", "")
    if label not in labels:
        raise InputError(f"{place}: label={label!r} is not in meta, which has: {', '.join(labels)}")
    keys = ("z_order", "rotation", *_NUMBERS.get(kind, ()))
    found = {"z_order": "0", "rotation": "0", **found}
    order, degrees, *sides = shapes.numbers(found, keys, place)
    rings, bitmap = [], None
    if kind == "polygon":
        pairs = [pair.split(",") for pair in found.get("points", "").split(";")]
        rings = [shapes.polygon(pairs, place)]
    elif kind == "mask":
        bitmap = partial(_decode, found.get("rle", ""), [int(side) for side in sides], place)
    elif sides:
        ring = shapes.box(*sides) if kind == "box" else shapes.ellipse(*sides)
        rings = [shapes.rotated(ring, math.radians(degrees))]
    return order, shapes.Shape(label, where, rings, bitmap=bitmap)


def _decode(rle: str, sides: Sequence[int], place: str) -> shapes.Bitmap:
    """Return a mask from its runs along the rows, the first of them outside."""
    left, top, width, height = sides
    try:
        inside = mask_of_runs([int(run) for run in rle.split(",")], width * height)
        return shapes.Bitmap(inside.reshape(height, width), left, top)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{place}: rle is no mask of {width} x {height}: {error}") from error
