"""Classes and label values: tables that ship with the package, files of names, value -> class."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from danet.errors import InputError
from danet.plain import quoted
from danet.types import IGNORE, MAX_CLASSES

Color = tuple[int, int, int]  # RGB, 0..255

# A text that Hydra reads as one without quotes.
_PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_][\w-]*", re.ASCII | re.IGNORECASE)

_BESIDE_NUMBER = r" +(?=\d)|(?<=\d) +"

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


def read_class_names(source: Sequence[str] | str) -> list[str]:
    """Return names of classes as they are, or read them from a file; raise InputError."""
    return read_class_file(source).names if isinstance(source, str) else list(source)


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
    _refuse_tables(lines, source)
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
    values, names = [], []
    for line in lines:
        value, _, name = line.partition(",")
        if not value.strip().isdecimal() or not name.strip():
            raise InputError(f"data.classes={source}: {line!r} is not a number, a comma and a name")
        values.append(int(value))
        names.append(name.strip())
    if values != list(range(len(values))):
        pairs = ",".join(f"{value}:{index}" for index, value in enumerate(values))
        raise InputError(
            f"data.classes={source}: its values are not 0 to {len(values) - 1} in order; set "
            f"{as_setting('data.classes', names)} 'data.values={{{pairs}}}'"
        )
    return ClassFile(names)


def as_setting(key: str, names: Sequence[str]) -> str:
    """Format a list of texts as a setting, quoted for a shell and for Hydra."""
    shown = (name if _PLAIN.fullmatch(name) else quoted(name) for name in names)
    return shlex.quote(f"{key}=[{','.join(shown)}]")


def _refuse_tables(lines: Sequence[str], source: str) -> None:
    """Raise InputError for a file whose lines have numbers or marks beside the names."""
    mark = next((m for m in ";\t,:" if all(m in line for line in lines)), None)
    rows = [line.split(mark) if mark else re.split(_BESIDE_NUMBER, line) for line in lines]
    cells = [[cell.strip() for cell in row] for row in rows]
    has_head = len(cells) > 1 and not any(cell.isdecimal() for cell in cells[0])
    body = cells[1:] if has_head else cells
    has_numbers = all(len(row) > 1 and any(cell.isdecimal() for cell in row) for row in body)
    is_marked = bool(lines) and lines[0][0] in "{[<"
    if is_marked or (has_numbers and body) or any(line.startswith("- ") for line in lines):
        shown = (lines[1:] or lines)[0][:60]
        raise InputError(
            f"data.classes={source}: not a list of names, with a line {shown!r}; expected "
            "one name a line and nothing else, or the names themselves, as in "
            + as_setting("data.classes", _names_in(lines, body) or ["background", "cat"])
        )


def _names_in(lines: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return the names in JSON, YAML or the rows of a table; empty if they are ambiguous."""
    try:
        found = yaml.safe_load("\n".join(lines))
    except yaml.YAMLError:
        found = None
    if isinstance(found, dict):
        found = next((found[k] for k in ("names", "classes", "categories") if found.get(k)), found)
    if isinstance(found, dict):
        found = [value for value in found.values() if isinstance(value, str)] or list(found)
    if isinstance(found, list):
        names = [item.get("name") if isinstance(item, dict) else item for item in found]
    else:
        names = [next((c.strip("\"'") for c in row if c and not c.isdecimal()), "") for row in body]
    texts = [name for name in names if isinstance(name, str) and name]
    return texts if 1 < len(names) == len(texts) and "<" not in texts[0] else []


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

    def color(index: int) -> Color:
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):  # bits 0, 1, 2 of the index are the highest of R, G, B
                rgb[channel] |= (index >> channel & 1) << (7 - bit)
            index >>= 3
        return rgb[0], rgb[1], rgb[2]

    return tuple(color(i) for i in range(num_classes))


def ranges(values: list[int]) -> str:
    """Format sorted integers as ranges: [0, 1, 2, 255] as 0..2, 255."""
    parts, start = [], 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] != values[i - 1] + 1:
            first, last = values[start], values[i - 1]
            parts.append(str(first) if first == last else f"{first}..{last}")
            start = i
    return ", ".join(parts)
