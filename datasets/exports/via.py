"""VGG Image Annotator 2: its project file, or annotations as JSON (gitlab.com/vgg/via, CodeDoc.md).

The label of a region is one of its attributes: of those that regions have, the first of class,
label, type, name, category, object; else the one that most regions have. Where no region has any,
all are of one label, "object". Regions are painted in the order of the file.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from danet.datasets.exports import shapes
from danet.datasets.layout import split_in
from danet.errors import InputError

_LABELS = ("class", "label", "type", "name", "category", "object")


class _Attributes(BaseModel, extra="allow"):
    name: str  # of the kind of shape; the other kinds than these have numbers
    all_points_x: list[float] = []
    all_points_y: list[float] = []


class _Region(BaseModel):
    shape_attributes: _Attributes
    region_attributes: dict[str, Any]


# VIA 1 numbers regions: {"0": ..., "1": ...}.
_LISTED = BeforeValidator(lambda found: [*found.values()] if isinstance(found, dict) else found)


class _Image(BaseModel):
    filename: str
    regions: Annotated[list[_Region], _LISTED]


class _Project(BaseModel):
    images: dict[str, _Image] = Field(alias="_via_img_metadata")


def find(root: Path) -> list[Path]:
    """Return the JSON files with the regions of pictures."""
    return shapes.files_with(root, (".json",), '"filename"|"_via_s', '"regions"|"_via_s')


def read(files: Sequence[Path], root: Path) -> shapes.Export:
    """Read all files; labels are those of the regions, sorted."""
    images: list[tuple[Path, _Image]] = []
    for path in files:
        if b'"_via_settings"' in shapes.ends_of(path):
            content = shapes.read_json(path, _Project).images
        else:
            content = shapes.read_json(path, dict[str, _Image])
        images += [(path, image) for image in content.values()]
    found = [region.region_attributes for _, image in images for region in image.regions]
    counts = Counter(key for item in found for key, value in item.items() if value)
    named = [key for name in _LABELS for key in counts if key.lower() == name]
    key = next(iter([*named, *dict(counts.most_common())]), "")
    pictures = []
    for path, image in images:
        objects = [
            _shape(region, key, path, f"{image.filename}, region {i}")
            for i, region in enumerate(image.regions)
        ]
        split = split_in(path.relative_to(root))
        pictures.append(shapes.Picture(path, image.filename, objects, split=split))
    labels = {shape.label for picture in pictures for shape in picture.shapes}
    return shapes.Export(sorted(labels), pictures)


def _shape(region: _Region, key: str, path: Path, where: str) -> shapes.Shape:
    found, kind, place = region.shape_attributes, region.shape_attributes.name, f"{path}, {where}"
    value = region.region_attributes.get(key) if key else "object"
    # Of checkboxes there is each option, with true or false.
    chosen = [name for name in value if value[name]] if isinstance(value, dict) else [value or ""]
    if len(chosen) != 1 or not (label := str(chosen[0])).strip():
        raise InputError(f"{place}: {key}={value!r} is not one label; choose one in VIA")
    others = {"theta": 0, **(found.model_extra or {})}
    if kind == "polygon":
        ring = shapes.polygon(zip(found.all_points_x, found.all_points_y, strict=True), place)
    elif kind == "rect":
        x, y, width, height = shapes.numbers(others, ("x", "y", "width", "height"), place)
        ring = shapes.box(x, y, x + width, y + height)
    elif kind in ("circle", "ellipse"):
        keys = ("cx", "cy", "r", "r") if kind == "circle" else ("cx", "cy", "rx", "ry")
        *sides, theta = shapes.numbers(others, (*keys, "theta"), place)  # radians
        ring = shapes.rotated(shapes.ellipse(*sides), theta)
    elif kind in ("polyline", "point", "line"):
        return shapes.Shape(label, where)
    else:
        raise InputError(f"{place}: a shape of the kind {kind!r}, which VIA 2 does not have")
    return shapes.Shape(label, where, [ring])
