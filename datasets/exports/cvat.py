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
from danet.datasets.formats.pascal_in_detail import mask_of_runs
from danet.datasets.layout import SPLIT_OF, split_in
from danet.datasets.listing import find_files
from danet.errors import InputError

_COLOR = re.compile("#" + "([0-9a-fA-F]{2})" * 3)
_NUMBERS = {
    "box": ("xtl", "ytl", "xbr", "ybr"),
    "ellipse": ("cx", "cy", "rx", "ry"),
    "mask": ("left", "top", "width", "height"),
}


def find(root: Path) -> list[Path]:
    """Return the XML files of CVAT, also those of videos, which ``read`` refuses."""
    files = [root / name for name in find_files(root, (".xml",))]
    return [path for path in files if shapes.holds(path, "<annotations", "<meta")]


def read(files: Sequence[Path], root: Path) -> shapes.Export:
    """Read all files; labels are those of the first, then further ones of others."""
    colors: dict[str, str] = {}
    pictures = []
    for path in files:
        tree = _parse(path)
        labels = {
            label.findtext("name", ""): label.findtext("color", "")
            for label in tree.iterfind("meta/*/labels/label")
            if not label.findtext("parent")  # else a point of a skeleton
        }
        colors = {**labels, **colors}
        split = split_in(path.relative_to(root))
        pictures += [_picture(image, labels, path, split) for image in tree.iterfind("image")]
    found = [_COLOR.fullmatch(color) for color in colors.values()]
    palette = [(int(c[1], 16), int(c[2], 16), int(c[3], 16)) for c in found if c]
    return shapes.Export([*colors], pictures, palette if len(palette) == len(found) else None)


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
    name = image.get("name") or f"without a name, id {image.get('id')}"
    height, width = shapes.numbers(image.attrib, ("height", "width"), f"{path}, image {name}")
    objects = []
    for number, element in enumerate(image, start=1):
        if element.tag != "tag":  # of the whole picture
            where = f"image {name}, object {number} ({element.tag})"
            attributes = {"z_order": "0", **element.attrib}
            (order,) = shapes.numbers(attributes, ["z_order"], f"{path}, {where}")
            objects.append((order, _shape(element, labels, path, where)))
    objects.sort(key=lambda pair: pair[0])  # stable: equal ones keep their order
    found, split = (
        [shape for _, shape in objects],
        SPLIT_OF.get(image.get("subset", "").lower(), split),
    )
    return shapes.Picture(path, name, found, size=(int(height), int(width)), split=split)


def _shape(element: Element, labels: Collection[str], path: Path, where: str) -> shapes.Shape:
    found, kind, place = {"rotation": "0", **element.attrib}, element.tag, f"{path}, {where}"
    label = found.get("label", "")
    if label not in labels:
        raise InputError(f"{place}: label={label!r} is not in meta, which has: {', '.join(labels)}")
    if kind == "polygon":
        pairs = [pair.split(",") for pair in found.get("points", "").split(";")]
        return shapes.Shape(label, where, [shapes.polygon(pairs, place)])
    if kind not in _NUMBERS:
        return shapes.Shape(label, where)
    *sides, degrees = shapes.numbers(found, (*_NUMBERS[kind], "rotation"), place)
    if kind == "mask":
        bitmap = partial(_decode, found.get("rle", ""), [int(side) for side in sides], place)
        return shapes.Shape(label, where, bitmap=bitmap)
    ring = shapes.box(*sides) if kind == "box" else shapes.ellipse(*sides)
    return shapes.Shape(label, where, [shapes.rotated(ring, math.radians(degrees))])


def _decode(rle: str, sides: Sequence[int], place: str) -> shapes.Bitmap:
    """Return a mask from its runs along the rows, the first of them outside."""
    left, top, width, height = sides
    try:
        inside = mask_of_runs([int(run) for run in rle.split(",")], width * height)
        return shapes.Bitmap(inside.reshape(height, width), left, top)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"{place}: its rle is not of {width} x {height} pixels: {error}"
        ) from error
