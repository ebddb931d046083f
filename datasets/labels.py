"""Classes and label values: tables that ship with the package, files of names, value -> class."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from danet.errors import InputError
from danet.types import IGNORE, MAX_CLASSES, ignore_index

Color = tuple[int, int, int]  # RGB, 0..255
TABLES = Path(__file__).parent / "tables"
_BACKGROUND = ("background", "bg", "unlabeled", "unlabelled", "void", "none", "背景")

# A number beside a name, as tables of classes have it.
_NUMBER_IN_ROW = re.compile(r"[\s;,:]\d+\s*([;,:\s]|$)|^\d+\s*[\s;,:]")
_ROBOFLOW = re.compile(r"(\d+)\s*,\s*(.+)")
_CVAT = re.compile(r"([^:]+):\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*(?::.*)?")


def read_published(name: str) -> dict[str, Any]:
    """Return what tables/published.yaml says of a data set, and its table of classes, if any."""
    facts = yaml.safe_load((TABLES / "published.yaml").read_text())[name]
    return {**facts, **(read_class_table(facts["table"]) if "table" in facts else {})}


def read_class_table(name: str) -> dict[str, Any]:
    """Read ``tables/<name>.json``: rows of id on disk, train_id (255 is ignore), name, color.

    Returns names as ``classes``, colours as ``palette``, and as ``values`` a dictionary from value
    on disk to class or IGNORE.
    """
    rows = json.loads((TABLES / f"{name}.json").read_text())
    # -1 is a label without pixels of its own: the license plates of Cityscapes belong to the car.
    trained = sorted((r for r in rows if 0 <= r["train_id"] < IGNORE), key=lambda r: r["train_id"])
    return {
        "classes": tuple(row["name"] for row in trained),
        "palette": tuple(tuple(row["color"]) for row in trained),
        "values": {row["id"]: row["train_id"] for row in rows if row["id"] >= 0},
    }


def in_order(num_classes: int, first: int = 0) -> dict[int, int]:
    """Return a label map whose classes count from ``first``; the values below are ignored."""
    ignored = ignore_index(num_classes)
    below = dict.fromkeys([ignored, *range(first)], ignored)
    return {**below, **{first + i: i for i in range(num_classes)}}


def label_table(label_map: Mapping[int, int], num_classes: int) -> np.ndarray:
    """Return a table (65536,) from value on disk to class or ignored; others map to one more."""
    ignored = ignore_index(num_classes)
    table = np.full(65536, ignored + 1, np.int16 if ignored == IGNORE else np.int32)
    for value, index in label_map.items():
        if not (0 <= index < num_classes or index == ignored) or not 0 <= value < len(table):
            raise InputError(
                f"label map: {value} -> {index}, but classes are 0..{num_classes - 1} and "
                f"{ignored} is ignore, and values on disk are 0..65535"
            )
        table[value] = index
    return table


class ClassFile(NamedTuple):
    """The classes of a file, in order."""

    names: list[str]
    colors: list[Color] | None = None  # of the masks, if the file has them


def read_class_file(source: str) -> ClassFile:
    """Read names of classes from a text file.

    One name a line, without blank lines; or the ``_classes.csv`` of Roboflow (value, name), or the
    ``labelmap.txt`` of CVAT (name, colour). A file with other content raises InputError.
    """
    path = Path(source).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(
            f"data.classes={source}: neither a list, 'data.classes=[background,cat]', nor a text "
            f"file with a name a line ({path.absolute()}: {reason})"
        ) from error
    lines = [line.strip() for line in lines if line.strip()]
    head, body = "".join(lines[:1]).replace(" ", "").lower(), lines[1:]
    if head.startswith("#label:color_rgb"):
        rows = _match(body, _CVAT, source, "name:red,green,blue:: as CVAT writes it")
        colors = check_colors([list(map(int, row[1:])) for row in rows], f"data.classes={source}")
        return ClassFile([row[0] for row in rows], list(colors))
    if head in ("pixelvalue,class", "value,class", "id,name", "index,name"):
        rows = _match(body, _ROBOFLOW, source, "a number, a comma and a name")
        if [int(value) for value, _ in rows] != list(range(len(rows))):
            pairs = ",".join(f"{int(value)}:{index}" for index, (value, _) in enumerate(rows))
            raise InputError(
                f"data.classes={source}: its values are not 0 to {len(rows) - 1} in order; give a "
                f"file with the names alone, one a line, and set 'data.values={{{pairs}}}'"
            )
        return ClassFile([name for _, name in rows])
    if len(lines) < 2 or _NUMBER_IN_ROW.search(lines[0]):
        body = lines
    is_numbered = bool(body) and all(map(_NUMBER_IN_ROW.search, body))
    if is_numbered or any(line.startswith(("{", "[", "<", "- ")) for line in lines):
        raise InputError(
            f"data.classes={source}: not a list of names, with a line {body[0][:60]!r}; expected "
            "one name a line and nothing else, or the names themselves, as in "
            "'data.classes=[background,cat]'"
        )
    return ClassFile(lines)


def _match(
    lines: Sequence[str], pattern: re.Pattern[str], source: str, form: str
) -> list[tuple[str, ...]]:
    """Return the groups of a pattern in each line; raise InputError with the form it must have."""
    found = [pattern.fullmatch(line) for line in lines]
    if None in found:
        raise InputError(f"data.classes={source}: {lines[found.index(None)]!r} is not {form}")
    return [match.groups() for match in found if match]


def check_class_names(names: Sequence[str]) -> None:
    """Raise InputError for too few or too many names, or duplicates."""
    if not 2 <= len(names) <= MAX_CLASSES:
        raise InputError(
            f"data.classes: {len(names)} names, expected 2 to {MAX_CLASSES}; for one kind of "
            f"object write [background, object]; found {', '.join(names[:3])}"
        )
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise InputError(f"data.classes: the name {repeated[0]!r} stands there twice")


def check_colors(
    colors: Sequence[Sequence[int]], key: str, count: int | None = None
) -> tuple[Color, ...]:
    """Return valid colours, as many as there are classes; raise InputError with the key."""
    if count is not None and len(colors) != count:
        raise InputError(f"{key}: {len(colors)} colours for {count} class names")
    for color in colors:
        if len(color) != 3 or not all(0 <= value <= 255 for value in color):
            raise InputError(f"{key}: {list(color)} is not three numbers 0..255")
    return tuple((red, green, blue) for red, green, blue in colors)


def is_background(name: str) -> bool:
    """Return whether a class is the rest of a picture, by its name: "background", "_void_", ..."""
    return name.strip(" _-").lower() in _BACKGROUND


def default_palette(classes: Sequence[str]) -> tuple[Color, ...]:
    """Return colours for classes without any of their own: black for background, others bright.

    The first seven are those of Okabe and Ito (2008), which differ for the colour-blind, too; the
    others are as far from all before as can be (tables/README.md), up to 255; then come those of
    ``voc_palette`` that are left.
    """
    listed = map(tuple, json.loads((TABLES / "distinct_colors.json").read_text()))
    colors = iter(dict.fromkeys([*listed, *voc_palette(2 * len(classes))[1:]]))
    return tuple((0, 0, 0) if is_background(name) else next(colors) for name in classes)


def voc_palette(num_classes: int) -> tuple[Color, ...]:
    """Return the colours of PASCAL VOC's development kit: bits of the index, spread over RGB."""
    # Bits 0, 1, 2 of the index are the highest of R, G, B, the next three the second highest.
    bit, channel = np.arange(8), np.arange(3)[:, None]
    found = np.arange(num_classes)[:, None, None] >> (3 * bit + channel) & 1  # (K, 3, 8)
    return tuple((red, green, blue) for red, green, blue in (found << (7 - bit)).sum(2).tolist())


def ranges(values: Sequence[int]) -> str:
    """Format sorted integers as ranges: [0, 1, 2, 255] as 0..2, 255."""
    runs = groupby(enumerate(values), lambda pair: pair[1] - pair[0])
    found = [[value for _, value in run] for _, run in runs]
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)
