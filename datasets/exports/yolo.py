"""YOLO's polygons: a text file for each picture, and a data.yaml.

The form is that of docs.ultralytics.com/datasets/segment: a line is the number of a class, and x
and y of each point as shares of the picture. Ultralytics paints smaller objects over larger ones,
and so does this reader. A line of four numbers is a box.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from danet.datasets.exports import shapes as form
from danet.datasets.exports.shapes import Export, Picture, Shape
from danet.datasets.layout import SPLIT_OF, split_in, stem_of
from danet.datasets.listing import find_files
from danet.errors import InputError


def find(root: Path) -> list[Path]:
    """Return a YAML file with the names of classes, else data.yaml, which should have them."""
    files = form.files_with(root, (".yaml", ".yml"), "names:")
    return files[:1] or [path for path in [root / "data.yaml"] if path.is_file()]


def read(files: Sequence[Path], root: Path) -> Export:
    """Read the labels beside, or in place of, each picture; one without a file has no object."""
    (path,) = files
    settings = _settings(path)
    names = settings["names"]
    pictures = [
        _picture(path.parent, image, names, split)
        for split, place in _places(settings, path).items()
        for image in _images(path.parent, place)
    ]
    if not pictures:
        raise InputError(
            f"{path}: no pictures are where train, val and test say, nor in images/ beside the file"
        )
    used, here = {picture.file for picture in pictures}, {*map(stem_of, find_files(path.parent))}
    for name in find_files(path.parent, (".txt",)):
        image = stem_of(name).replace("labels/", "images/")
        is_known = path.parent / name in used or image in here or name.endswith("classes.txt")
        if "labels/" in name and not is_known:  # its picture is missing; classes.txt is LabelImg's
            pictures.append(Picture(path.parent / name, str(path.parent / image)))
    return Export(names, pictures)


def _settings(path: Path) -> dict[str, Any]:
    """Return the content of data.yaml with names as a list; raise InputError."""
    try:
        # All scalars are texts: yes, on, null and 1 are names of classes, too.
        content = yaml.load(path.read_bytes(), yaml.BaseLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        if {*names} != {*map(str, range(len(names)))}:
            raise InputError(
                f"{path}: names has the keys {', '.join(names)}; expected 0, 1, 2, ..."
            )
        names = [names[str(i)] for i in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names or [0]):
        raise InputError(f"{path}: names={names!r}: expected the names of the classes")
    return {**content, "names": [*form.label_positions(names, path)]}


def _places(settings: Mapping[str, Any], path: Path) -> dict[str | None, list[str]]:
    """Return split -> its folders or lists; those of the file, else all pictures beside it."""
    base = str(settings.get("path") or "")
    places: dict[str | None, list[str]] = {}
    for key, split in SPLIT_OF.items():
        found = settings.get(key) or ()
        # Roboflow writes ../train/images, from a folder that the file is not in.
        for place in [found] if isinstance(found, str) else found:
            near = [Path(base, str(place)), Path(str(place)), Path(str(place).lstrip("./"))]
            exists = [str(p) for p in near if (path.parent / p).exists()]
            if exists:
                places.setdefault(split, []).append(exists[0])
    if places and settings.get("train") and "train" not in places:
        raise InputError(f"{path}: train: {settings['train']} is not there; correct the path")
    return places or {None: [""]}


def _images(root: Path, places: Sequence[str]) -> list[Path]:
    """Return the pictures of folders, and of lists, a path a line."""
    found: list[Path] = []
    for place in (root / place for place in places):
        if place.suffix == ".txt":
            found += [root / line for line in form.read_lines(place) if line]
        else:
            found += [place / name for name in find_files(place)]
    return list(dict.fromkeys(found))


def _picture(root: Path, image: Path, names: Sequence[str], split: str | None) -> Picture:
    """Return a picture with the objects of its text file."""
    # Ultralytics' rule: the last folder "images" of the path becomes "labels".
    head, found, tail = str(image).rpartition("/images/")
    text = Path(f"{head}/labels/{tail}" if found else image).with_suffix(".txt")
    text = text if text.is_file() or not found else image.with_suffix(".txt")
    lines = form.read_lines(text) if text.is_file() else []
    shapes = [
        _shape(line.split(), names, text, i) for i, line in enumerate(lines, 1) if line.split()
    ]
    shapes.sort(key=lambda shape: -_area(shape.polygons[0]))  # stable: equal ones keep their order
    split = split or split_in(image.parent.relative_to(root))
    return Picture(text, str(image), shapes, split=split, units=1.0)


def _shape(words: Sequence[str], names: Sequence[str], text: Path, line: int) -> Shape:
    where = f"line {line}"
    try:
        number, numbers = int(words[0]), [float(word) for word in words[1:]]
    except ValueError as error:
        raise InputError(f"{text}, {where}: expected a class and coordinates ({error})") from error
    if not 0 <= number < len(names):
        raise InputError(
            f"{text}, {where}: class {number}, and data.yaml names 0..{len(names) - 1}"
        )
    if numbers and not -1 <= min(numbers) <= max(numbers) <= 2:
        raise InputError(
            f"{text}, {where}: coordinates from {min(numbers):g} to {max(numbers):g}; expected "
            "shares of the picture, 0 to 1"
        )
    if len(numbers) == 4:  # of the centre, and the size
        x, y, width, height = numbers
        corners = form.box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        numbers = corners.ravel().tolist()
    return Shape(names[number], where, [form.polygon(numbers, f"{text}, {where}")])


def _area(ring: np.ndarray) -> float:
    """Return the area of a polygon, by the shoelace formula."""
    x, y = ring.T
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2
