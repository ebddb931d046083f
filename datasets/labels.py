"""Classes and label values: tables that ship with the package, files of names, value -> class."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from danet.errors import InputError
from danet.types import IGNORE, MAX_CLASSES

Color = tuple[int, int, int]  # RGB, 0..255

# A number beside a name, as tables of classes have it.
_NUMBER_IN_ROW = re.compile(r"[\s;,:]\d+\s*([;,:\s]|$)|^\d+\s*[\s;,:]")

UNKNOWN = 256  # entry of a table for a value on disk without a class


class ClassTable(NamedTuple):
    """Classes of a data set, as a table that ships with the package describes them."""

    classes: tuple[str, ...]
    palette: tuple[Color, ...]
    label_map: dict[int, int]


def read_class_table(name: str) -> ClassTable:
    """Read ``tables/<name>.json``: rows of id on disk, train_id (255 is ignore), name, color."""
    rows = json.loads((Path(__file__).parent / "tables" / f"{name}.json").read_text())
    # -1 is a label without pixels of its own, such as the license plates of Cityscapes.
    trained = sorted((r for r in rows if 0 <= r["train_id"] < IGNORE), key=lambda r: r["train_id"])
    return ClassTable(
        classes=tuple(row["name"] for row in trained),
        palette=tuple((row["color"][0], row["color"][1], row["color"][2]) for row in trained),
        label_map={row["id"]: row["train_id"] for row in rows},
    )


def label_table(label_map: Mapping[int, int], num_classes: int) -> np.ndarray:
    """Return a table, int16 (65536,), from value on disk to class, IGNORE, or UNKNOWN."""
    table = np.full(65536, UNKNOWN, np.int16)
    for value, index in label_map.items():
        if not (0 <= index < num_classes or index == IGNORE):
            raise InputError(
                f"label map: {value} -> {index}, but classes are 0..{num_classes - 1} and "
                f"{IGNORE} is ignore"
            )
        if not 0 <= value < len(table):
            raise InputError(f"label map: {value} -> {index}, but values on disk are 0..65535")
        table[value] = index
    return table


class ClassFile(NamedTuple):
    """The classes of a file, in order."""

    names: list[str]
    colors: list[Color] | None = None  # of the masks, if the file has them


def read_class_file(source: str) -> ClassFile:
    """Read names of classes from a text file.

    One name a line, without blank lines; or the ``_classes.csv`` of Roboflow (value, name), or the
    ``labelmap.txt`` of CVAT (name, colour).

    Raises:
        InputError: There is no such file, it is not text, or its lines are not names.
    """
    path = Path(source).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(
            f"data.classes={source}: neither a list, data.classes=[background,cat], nor a text "
            f"file with a name a line ({path.absolute()}: {reason})"
        ) from error
    lines = [line.strip() for line in lines if line.strip()]
    head = lines[0].replace(" ", "").lower() if lines else ""
    if head.startswith("#label:color_rgb"):
        return _labelmap(lines[1:], source)
    if head in ("pixelvalue,class", "value,class", "id,name", "index,name"):
        return _numbered(lines[1:], source)
    body = lines[1:] if len(lines) > 1 and not _NUMBER_IN_ROW.search(lines[0]) else lines
    is_numbered = bool(body) and all(map(_NUMBER_IN_ROW.search, body))
    if is_numbered or any(line.startswith(("{", "[", "<", "- ")) for line in lines):
        raise InputError(
            f"data.classes={source}: not a list of names, with a line {body[0][:60]!r}; expected "
            "one name a line and nothing else, or the names themselves, as in "
            "data.classes=[background,cat]"
        )
    return ClassFile(lines)


def _labelmap(lines: Sequence[str], source: str) -> ClassFile:
    """Read ``name:red,green,blue:parts:actions``."""
    names, colors = [], []
    for line in lines:
        name, _, rest = line.partition(":")
        numbers = rest.partition(":")[0].split(",")
        if not name or len(numbers) != 3 or not all(n.strip().isdecimal() for n in numbers):
            raise InputError(
                f"data.classes={source}: {line!r} is not name:red,green,blue:: as CVAT writes it"
            )
        names.append(name)
        colors.append(check_color([int(number) for number in numbers], f"data.classes={source}"))
    return ClassFile(names, colors)


def _numbered(lines: Sequence[str], source: str) -> ClassFile:
    """Read ``value, name``; the values must count from 0 in order."""
    names = {}
    for line in lines:
        value, _, name = line.partition(",")
        if not value.strip().isdecimal() or not name.strip():
            raise InputError(f"data.classes={source}: {line!r} is not a number, a comma and a name")
        names[int(value)] = name.strip()
    if list(names) != list(range(len(lines))):
        pairs = ",".join(f"{value}:{index}" for index, value in enumerate(names))
        raise InputError(
            f"data.classes={source}: its values are not 0 to {len(lines) - 1} in order; give a "
            f"file with the names alone, one a line, and set 'data.values={{{pairs}}}'"
        )
    return ClassFile(list(names.values()))


def check_class_names(names: Sequence[str]) -> None:
    """Raise InputError for too few or too many names, or duplicates."""
    if not 2 <= len(names) <= MAX_CLASSES:
        raise InputError(
            f"data.classes: {len(names)} names, expected 2 to {MAX_CLASSES}; for one kind of "
            f"object write [background, object]; found {', '.join(names[:3])}"
        )
    repeated = sorted(name for name in set(names) if list(names).count(name) > 1)
    if repeated:
        raise InputError(f"data.classes: the name {repeated[0]!r} stands there twice")


def check_color(values: Sequence[int], key: str) -> Color:
    """Return three numbers 0..255 as a colour; raise InputError with the key."""
    if len(values) != 3 or not all(0 <= value <= 255 for value in values):
        raise InputError(f"{key}: {list(values)} is not three numbers 0..255")
    return values[0], values[1], values[2]


def check_colors(colors: Sequence[Sequence[int]], count: int, key: str) -> tuple[Color, ...]:
    """Return ``count`` valid colours; raise InputError with the key."""
    if len(colors) != count:
        raise InputError(f"{key}: {len(colors)} colours for {count} class names")
    return tuple(check_color(color, key) for color in colors)


def voc_palette(num_classes: int) -> tuple[Color, ...]:
    """Return the colours of PASCAL VOC's development kit: bits of the index, spread over RGB."""

    def channel(index: int, first: int) -> int:
        # Bits 0, 1, 2 of the index are the highest of R, G, B, the next three the second highest.
        return sum((index >> (3 * bit + first) & 1) << (7 - bit) for bit in range(8))

    return tuple((channel(i, 0), channel(i, 1), channel(i, 2)) for i in range(num_classes))


def ranges(values: Sequence[int]) -> str:
    """Format sorted integers as ranges: [0, 1, 2, 255] as 0..2, 255."""
    runs = groupby(enumerate(values), lambda pair: pair[1] - pair[0])
    found = [[value for _, value in run] for _, run in runs]
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)
