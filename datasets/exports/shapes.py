"""What annotation tools export, in one form, and how it is painted.

A reader of one format is a module with two functions. ``find(root)`` returns the annotation files
of that format below a folder, sorted, and none where it is another format; ``read(files, root)``
returns an Export. Coordinates are x and y from the left upper corner of the picture, whose first
pixel covers 0 to 1.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from pycocotools import mask as coco_mask
from pydantic import TypeAdapter, ValidationError

from danet.datasets.labels import Color
from danet.datasets.listing import find_files
from danet.errors import InputError

T = TypeVar("T")
_FAR = 1e6  # pixels; a larger coordinate is an error of the file
_SNIFFED = 2**16  # bytes

REMARKS = {
    "points": "of fewer than three points, left out",
    "no area": "points or lines, which have no area, left out",
    "outside": "partly or wholly outside their picture, cut off there",
    "overlap": "over objects of other labels, which they hide in part",
}
"""What is counted while objects are painted, and what it says of them."""


class Bitmap(NamedTuple):
    """A mask of a part of a picture."""

    inside: np.ndarray  # bool (h, w)
    left: int = 0
    top: int = 0


class Shape(NamedTuple):
    """One object of a picture."""

    label: str
    where: str  # its place in the file, such as "annotation 12"
    polygons: Sequence[np.ndarray] = ()  # float (N, 2) each, x and y; the object is their union
    holes: Sequence[np.ndarray] = ()  # float (N, 2) each, cut out of the polygons
    bitmap: Callable[[], Bitmap] | None = None  # instead of polygons; called when it is painted
    is_crowd: bool = False  # COCO: a group of objects


@dataclass
class Picture:
    """One picture of an export."""

    file: Path  # that describes it
    name: str  # path of the image file as the export has it
    shapes: Sequence[Shape] = ()  # in the order of painting: later ones hide earlier ones
    mask: Callable[[], np.ndarray] | None = None  # instead: (H, W) positions in labels, from 1 on
    size: tuple[int, int] | None = None  # (H, W) as the export has it
    split: str | None = None  # train, val or test
    units: float = 0.0  # of the coordinates: 1 or 100 is the far edge of the picture; 0: pixels


@dataclass
class Export:
    """All that a tool exported."""

    labels: Sequence[str]  # in the order of the export, each once
    pictures: Sequence[Picture]
    colors: Sequence[Color] | None = None  # of the labels
    is_complete: bool = False  # whether every pixel has a label, as in masks; else some have none
    masks: Sequence[str] = ()  # files that look like pictures and are none


def read_json(path: Path, kind: type[T]) -> T:
    """Read a JSON file as pydantic's form of a type; InputError has the place of what differs."""
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        return TypeAdapter(kind).validate_json(content)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        # Of the kinds that a value may have, the one that fits furthest says most.
        first = max(error.errors(include_url=False), key=lambda found: len(found["loc"]))
        # Without the names of types: segmentation._Runs, segmentation.list[list[float]].
        place = ".".join(p for p in map(str, first["loc"]) if not re.match(r"_[A-Z]|\w+\[", p))
        is_shown = first["type"] not in ("json_invalid", "missing")
        found = f", found {str(first['input'])[:60]!r}" * is_shown
        raise InputError(f"{path}: {place + ': ' * bool(place)}{first['msg']}{found}") from error


def read_lines(path: Path) -> list[str]:
    """Read UTF-8 text, with or without a byte order mark, as stripped lines."""
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{path}: cannot be read ({reason})") from error


def files_with(root: Path, suffixes: Collection[str], *patterns: str) -> list[Path]:
    """Return the files below a folder in whose ends all of some patterns are."""

    def fits(path: Path) -> bool:
        text = ends_of(path)
        return all(re.search(pattern.encode(), text) for pattern in patterns)

    return [path for name in find_files(root, suffixes) if fits(path := root / name)]


def ends_of(path: Path) -> bytes:
    """Return the beginning and the end of a file, 64 KiB each; raise InputError."""
    try:
        with open(path, "rb") as file:
            head = file.read(_SNIFFED)
            file.seek(max(file.tell(), path.stat().st_size - _SNIFFED))
            return head + file.read(_SNIFFED)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def polygon(points: Iterable[Any], where: str) -> np.ndarray:
    """Return x and y of points, float (N, 2), of pairs or of numbers in a row; raise InputError."""
    try:
        numbers = np.asarray([*points], np.float64)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: its points are not pairs of numbers") from error
    if numbers.ndim == 1 and len(numbers) % 2:
        raise InputError(f"{where}: {len(numbers)} coordinates; expected x and y of each point")
    if numbers.size and (numbers.ndim > 2 or (numbers.ndim == 2 and numbers.shape[1] != 2)):
        raise InputError(f"{where}: its points are not pairs of numbers")
    if (far := ~(np.abs(numbers) < _FAR)).any():  # infinity and NaN, too
        shown = f"{numbers[far][0]:g}"
        raise InputError(f"{where}: the coordinate {shown} is no number within a picture")
    return numbers.reshape(-1, 2)


def numbers(found: Mapping[str, Any], keys: Sequence[str], where: str) -> list[float]:
    """Return the numbers of some keys; raise InputError for a missing one or another value."""
    if missing := [key for key in keys if key not in found]:
        raise InputError(f"{where}: it has no {missing[0]}, only {', '.join(found)}")
    shown = ", ".join(f"{key}={found[key]!r}" for key in keys)
    return polygon([(found[key], 0) for key in keys], f"{where}, {shown}")[:, 0].tolist()


def box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """Return the corners of a rectangle, float (4, 2)."""
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], np.float64)


def ellipse(x: float, y: float, radius_x: float, radius_y: float) -> np.ndarray:
    """Return points on an ellipse, float (N, 2), no further than a tenth of a pixel from it."""
    count = int(np.ceil(8 + 8 * np.sqrt(np.clip(max(radius_x, radius_y), 1, _FAR))))
    angle = np.arange(count) * 2 * np.pi / count
    return np.stack([x + radius_x * np.cos(angle), y + radius_y * np.sin(angle)], axis=1)


def rotated(ring: np.ndarray, angle: float) -> np.ndarray:
    """Turn points (N, 2) about their centre, clockwise as one sees them, by radians."""
    turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    return (ring - ring.mean(axis=0)) @ turn + ring.mean(axis=0)


class Painted(NamedTuple):
    """The labels of a picture, and what there was to say of its objects."""

    values: np.ndarray  # uint16 (H, W)
    remarks: dict[str, tuple[int, str]]  # key of REMARKS -> number of objects, and the first


def paint(picture: Picture, size: tuple[int, int], labels: Sequence[str]) -> Painted:
    """Paint a picture of a size (H, W): 0 where no object is, else 1 + the position of its label.

    Objects cover earlier ones. The values of crowds are higher by the number of labels. Polygons
    are filled as COCO's own API does. Raises InputError for objects that cannot be painted.
    """
    if picture.mask is not None:
        values = picture.mask()
        if values.shape != size:
            shown = f"{values.shape[1]} x {values.shape[0]}"
            raise InputError(
                f"{picture.file}: a mask of {shown} for picture {picture.name}, which has "
                f"{size[1]} x {size[0]} (width x height)"
            )
        return Painted(values.astype(np.uint16), {})
    value_of = {label: position for position, label in enumerate(labels, start=1)}
    canvas, counts, first = np.zeros(size, np.uint16), Counter[str](), dict[str, str]()
    for shape in picture.shapes:
        value = value_of[shape.label] + len(labels) * shape.is_crowd
        kinds, (inside, left, top) = _covered(shape, picture, size)
        part = canvas[top : top + inside.shape[0], left : left + inside.shape[1]]
        if ((part != 0) & (part != value) & inside).any():
            kinds.append("overlap")
        part[inside] = value
        for kind in kinds:
            counts[kind] += 1
            first.setdefault(kind, f"{picture.file}, {shape.where} ({shape.label})")
    return Painted(canvas, {kind: (count, first[kind]) for kind, count in counts.items()})


def _covered(shape: Shape, picture: Picture, size: tuple[int, int]) -> tuple[list[str], Bitmap]:
    """Return what there is to say of an object, and its pixels within the picture."""
    height, width = size
    if shape.bitmap is not None:
        inside, left, top = shape.bitmap()
        cut = inside[max(0, -top) : max(0, height - top), max(0, -left) : max(0, width - left)]
        is_cut = cut.shape != inside.shape
        return ["outside"] * is_cut, Bitmap(cut, max(0, min(left, width)), max(0, min(top, height)))
    scale = np.array([width, height]) / picture.units if picture.units else 1.0
    rings = [ring * scale for ring in shape.polygons if len(ring) > 2]
    kinds = ["points"] * (len(rings) < len(shape.polygons)) + ["no area"] * (not shape.polygons)
    if not rings:
        return kinds, Bitmap(np.zeros((0, 0), bool))
    points = np.concatenate(rings)
    if (points < -1).any() or (points > np.array([width, height]) + 1).any():
        kinds.append("outside")
    low = np.clip(np.floor(points.min(axis=0)), 0, (width, height)).astype(int)
    high = np.clip(np.ceil(points.max(axis=0)), 0, (width, height)).astype(int)
    across, down = (high - low).tolist()
    if not across or not down:
        return kinds, Bitmap(np.zeros((0, 0), bool))
    inside = _filled(rings, low, down, across)
    holes = [ring * scale for ring in shape.holes if len(ring) > 2]
    if holes:
        inside &= ~_filled(holes, low, down, across)
    return kinds, Bitmap(inside, *low.tolist())


def _filled(rings: Sequence[np.ndarray], corner: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return bool (height, width): the union of polygons in a window from a corner (x, y) on."""
    flat = [(ring - corner).ravel().tolist() for ring in rings]
    runs = coco_mask.merge(coco_mask.frPyObjects(flat, height, width))
    with warnings.catch_warnings():  # its arrays have numpy 1's signature
        warnings.simplefilter("ignore", DeprecationWarning)
        return coco_mask.decode(runs) > 0


def label_positions(names: Iterable[str], file: Path) -> Mapping[str, int]:
    """Return label -> position; raise InputError for a label without a name or there twice."""
    positions: dict[str, int] = {}
    for name in names:
        if not name.strip() or name in positions:
            raise InputError(f"{file}: the label {name!r} is empty or there twice")
        positions[name] = len(positions)
    if not positions:
        raise InputError(f"{file}: it names no labels")
    return positions
