"""Label Studio's JSON and JSON-MIN, and its PNG masks with such a file (labelstud.io/guide/export).

Of the annotations of a task the first that was not cancelled counts; a task without one is left
out. Objects are painted in the order of the file, each in the first of its labels. PNG masks, which
the JSON names the pictures of, are read where it has no brushes itself.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
from pydantic import BaseModel, model_validator

from danet.datasets.exports import shapes
from danet.datasets.image_io import read_labels
from danet.datasets.layout import split_in
from danet.datasets.listing import IMAGE_SUFFIXES, find_files
from danet.errors import InputError


class _Region(BaseModel):
    original_width: int = 0
    original_height: int = 0
    type: str = ""
    value: dict[str, Any] = {}  # a relation of two regions has none


class _Annotation(BaseModel):
    id: int | str | None = None
    was_cancelled: bool | None = None
    result: list[_Region]


class _Task(BaseModel):
    id: int | str
    data: dict[str, Any]
    annotations: list[_Annotation] | None = None  # beside masks it may have none

    @model_validator(mode="before")
    @classmethod
    def _from_json_min(cls, task: Any) -> Any:
        if not isinstance(task, dict) or "annotation_id" not in task:
            return task
        regions = [r for found in task.values() if isinstance(found, list) for r in found]
        result = [{**r, "value": r} for r in regions if isinstance(r, dict)]
        return {"id": task.get("id"), "data": task, "annotations": [{"result": result}]}


# The user is an address without dashes; the tag is the name of the control.
_MASK = re.compile(r"(?:.*/)?task-([^-]+)-annotation-([^-]+)-by-[^-]*-[^-]+-(.+)-\d+\.png", re.I)


class _Mask(NamedTuple):
    """A PNG mask of a brush."""

    annotation: str
    label: str
    path: Path


def find(root: Path) -> list[Path]:
    """Return the JSON files that are lists of tasks."""
    keys = "data|image|" * bool(_masks(root)) + "was_cancelled|annotation_id|file_upload"
    return shapes.files_with(root, (".json",), f'"({keys})"')


def read(files: Sequence[Path], root: Path) -> shapes.Export:
    """Read all files; labels are those of the objects, sorted."""
    here, masks = {Path(name).name for name in find_files(root)}, _masks(root)
    pictures = [
        picture
        for path in files
        for task in shapes.read_json(path, list[_Task])
        if (picture := _picture(task, masks, here, path))
    ]
    for picture in pictures:
        picture.split = split_in(picture.file.relative_to(root))
    labels = {shape.label for picture in pictures for shape in picture.shapes}
    used = [str(mask.path) for found in masks.values() for mask in found]
    return shapes.Export(sorted(labels), pictures, masks=used)


def _masks(root: Path) -> dict[str, list[_Mask]]:
    """Return the masks of each task."""
    found = defaultdict[str, list[_Mask]](list)
    for name in find_files(root, (".png",)):
        if match := _MASK.fullmatch(name):
            found[match[1]].append(_Mask(match[2], match[3], root / name))
    return found


def _picture(
    task: _Task, all_masks: dict[str, list[_Mask]], here: set[str], path: Path
) -> shapes.Picture | None:
    """Return the picture of a task; None if it was not annotated, or all was cancelled."""
    if task.annotations is None and not all_masks:
        raise InputError(f"{path}, task {task.id}: no annotations are there, nor PNG masks")
    masks = all_masks.get(str(task.id), [])
    kept = [one for one in task.annotations or () if not one.was_cancelled]
    if not kept and (task.annotations or not masks):
        return None
    regions = kept[0].result if kept else []
    objects = [*_shapes(regions, path, f"task {task.id}")]
    sizes = [(region.original_height, region.original_width) for region in regions]
    if not any(shape.bitmap for shape in objects):
        own = str(kept[0].id) if kept and kept[0].id is not None else ""
        used = [mask for mask in masks if mask.annotation == (own or masks[0].annotation)]
        sizes += [read_labels(mask.path).shape for mask in used[:1]]
        for mask in used:
            bitmap = partial(_read_mask, mask.path, next(filter(all, sizes)))
            objects.append(shapes.Shape(mask.label, mask.path.name, bitmap=bitmap))
    size = next(filter(all, sizes), None)
    return shapes.Picture(path, _name(task, here, path), objects, size=size, units=100.0)


def _read_mask(path: Path, size: tuple[int, int]) -> shapes.Bitmap:
    values = read_labels(path)
    if values.shape != size:
        raise InputError(f"{path}: a mask of {[*values.shape]}, and its task has {[*size]}")
    return shapes.Bitmap(values > 0)


def _name(task: _Task, here: set[str], path: Path) -> str:
    """Return where a picture is, decoded; of an upload the name, bare if only that is there."""
    for text in map(str, (task.data.get("image"), *task.data.values())):
        local = text.partition("/data/local-files/?d=")[2]
        path_of_url = re.sub(r"^\w+://[^/]*|[?].*", "", text)
        place = PurePosixPath(unquote(local or path_of_url).replace("\\", "/"))
        if place.suffix.lower() in IMAGE_SUFFIXES:
            bare = re.sub("^[0-9a-f]{8}-", "", place.name)
            name = bare if bare in here and place.name not in here else place.name
            return name if "/data/upload/" in text else str(place).lstrip("/")
    raise InputError(f"{path}, task {task.id}: no picture in its data: {', '.join(task.data)}")


def _shapes(regions: Sequence[_Region], path: Path, task: str) -> Iterator[shapes.Shape]:
    for number, region in enumerate(regions, start=1):
        value, size = region.value, (region.original_height, region.original_width)
        labels = next((found for key, found in value.items() if key.endswith("labels")), None)
        where = f"{task}, region {number}"
        if not value and region.type != "relation":
            raise InputError(f"{path}, {where}: it has no value")
        if labels is None:  # choices or texts, or an object whose labels are in another result
            continue
        if not isinstance(labels, list) or not any(labels[:1]):
            raise InputError(f"{path}, {where}: it has no label; give it one, or delete it")
        label, place = str(labels[0]), f"{path}, {where} ({labels[0]})"
        if "rle" in value:
            bitmap = partial(_decode, value["rle"], size, place)
            yield shapes.Shape(label, where, bitmap=bitmap)
        elif "points" in value:
            yield shapes.Shape(label, where, [shapes.polygon(value["points"], place)])
        elif "x" in value and not {"height", "radiusX"} & {*value}:
            yield shapes.Shape(label, where)  # a key point
        else:
            yield shapes.Shape(label, where, [_outline(value, size, place)])


def _outline(value: dict[str, Any], size: tuple[int, int], place: str) -> np.ndarray:
    """Return a rectangle or an ellipse in percentages; its angles are those in pixels."""
    scale = np.array(size[::-1] if all(size) else (100, 100)) / 100
    extent = ("radiusX", "radiusY") if "radiusX" in value else ("width", "height")
    keys = ("x", "y", *extent, "rotation")
    *corner, across, down, angle = shapes.numbers({"rotation": 0, **value}, keys, place)
    outline = shapes.ellipse if "radiusX" in value else shapes.box
    ring = shapes.rotated(outline(0, 0, across * scale[0], down * scale[1]), np.radians(angle))
    # An ellipse turns about its centre, a rectangle about its first corner.
    return (ring - (0 if "radiusX" in value else ring[0])) / scale + corner


def _decode(rle: Any, size: tuple[int, int], place: str) -> shapes.Bitmap:
    """Return where alpha is in RGBA of a picture, packed by rle-pack of thi.ng (github.com).

    The number of values (32 bits) comes first, then, each less one, their bits (5) and four sizes
    of lengths (4 each); then runs: whether a value repeats (1), the choice of a size (2), a length
    less one of this size, and the value, or else as many values.
    """
    values, total = bytearray(), 4 * size[0] * size[1]

    def take(count: int) -> int:
        if len(found := "".join(islice(bits, count))) < count:
            raise ValueError(f"it ends after {len(values)} of {total} values")
        return int(found, 2)

    try:
        bits = iter("".join(f"{byte:08b}" for byte in bytes([*rle])))
        count, width, *lengths = take(32), take(5) + 1, *(take(4) + 1 for _ in range(4))
        if (count, width) != (total, 8):
            raise ValueError(f"{count} values of {width} bits, expected {total} of 8")
        while len(values) < total:
            repeats, length = take(1), take(lengths[take(2)]) + 1
            own = 1 if repeats else length
            values += take(8 * own).to_bytes(own, "big") * (length // own)
        alpha = np.frombuffer(values, np.uint8).reshape(*size, 4)[..., 3]
    except (ValueError, TypeError) as error:
        raise InputError(f"{place}: rle is no brush of this picture ({error})") from error
    return shapes.Bitmap(alpha > 0)
