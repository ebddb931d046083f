"""What label values mean: class tables that ship with the package, and value -> class tables."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from danet.errors import InputError
from danet.types import IGNORE

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
