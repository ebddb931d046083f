"""What label values mean: class tables that ship with the package, and value -> class tables."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from danet.errors import InputError
from danet.types import IGNORE, MAX_CLASSES

Color = tuple[int, int, int]
"""RGB, 0..255."""

UNKNOWN = 256
"""In a table: a value on disk that has no meaning."""


class ClassTable(NamedTuple):
    """Classes of a data set, as a table that ships with the package describes them."""

    classes: tuple[str, ...]
    palette: tuple[Color, ...]
    label_map: dict[int, int]


def read_class_table(name: str) -> ClassTable:
    """Reads ``tables/<name>.json``: rows of id on disk, train_id (255 is ignore), name, color."""
    rows = json.loads((Path(__file__).parent / "tables" / f"{name}.json").read_text())
    trained = sorted((r for r in rows if 0 <= r["train_id"] < IGNORE), key=lambda r: r["train_id"])
    return ClassTable(
        classes=tuple(row["name"] for row in trained),
        palette=tuple((row["color"][0], row["color"][1], row["color"][2]) for row in trained),
        label_map={row["id"]: row["train_id"] for row in rows},
    )


def label_table(label_map: Mapping[int, int], num_classes: int) -> np.ndarray:
    """Makes a table, int16 (65536,), from value on disk to class, IGNORE, or "unknown" (256)."""
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


def read_class_names(source: Sequence[str] | str) -> list[str]:
    """Returns names of classes: as they are, or one a line from a text file, without blank lines.

    Raises:
        InputError: There is no such file, or it is not text.
    """
    if not isinstance(source, str):
        return list(source)
    path = Path(source).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(
            f"data.classes={source}: neither a list, data.classes=[background,cat], nor a text "
            f"file with a name a line ({path.absolute()}: {reason})"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def check_class_names(names: Sequence[str]) -> None:
    """Refuses lists that cannot be meant; raises InputError."""
    if not 2 <= len(names) <= MAX_CLASSES:
        raise InputError(
            f"data.classes: {len(names)} names, expected 2 to {MAX_CLASSES}; for one kind of "
            f"object write [background, object]; found {', '.join(names[:3])}"
        )
    twice = sorted(name for name in set(names) if list(names).count(name) > 1)
    if twice:
        raise InputError(f"data.classes: the name {twice[0]!r} stands there twice")


def check_color(values: Sequence[int], key: str) -> Color:
    """Returns three numbers 0..255 as a colour; raises InputError with the key."""
    if len(values) != 3 or not all(0 <= value <= 255 for value in values):
        raise InputError(f"{key}: {list(values)} is not three numbers 0..255")
    return values[0], values[1], values[2]


def voc_palette(num_classes: int) -> tuple[Color, ...]:
    """Returns the colours of PASCAL VOC's development kit: bits of the index, spread over RGB."""

    def color(index: int) -> Color:
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= (index >> channel & 1) << (7 - bit)
            index >>= 3
        return rgb[0], rgb[1], rgb[2]

    return tuple(color(i) for i in range(num_classes))


def ranges(values: list[int]) -> str:
    """Writes sorted integers as ranges: [0, 1, 2, 255] as 0..2, 255."""
    parts, start = [], 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] != values[i - 1] + 1:
            first, last = values[start], values[i - 1]
            parts.append(str(first) if first == last else f"{first}..{last}")
            start = i
    return ", ".join(parts)
