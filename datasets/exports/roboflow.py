"""Roboflow's "Semantic Segmentation Masks" (docs.roboflow.com): NAME.jpg and NAME_mask.png.

They lie in folders train, valid and test, or in one, with a _classes.csv each: rows of a value of
the masks and the name of its class.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from danet.datasets.exports.shapes import Export, Picture, label_positions, read_lines
from danet.datasets.image_io import read_labels
from danet.datasets.labels import ranges
from danet.datasets.layout import split_in, stem_of
from danet.datasets.listing import find_files
from danet.errors import InputError


def find(root: Path) -> list[Path]:
    """Return every _classes.csv."""
    return [root / n for n in find_files(root, (".csv",)) if Path(n).name == "_classes.csv"]


def read(files: Sequence[Path], root: Path) -> Export:
    """Pair pictures with masks; labels are in the order of values, the same in all folders."""
    names, pictures = _names(files[0]), []
    values = np.zeros(2**16, np.uint16)
    values[[*names]] = np.arange(1, len(names) + 1)
    for path in files:
        if (found := _names(path)) != names:
            raise InputError(f"{path}: {found}, but {files[0]}: {names}; export all splits at once")
        stems = {stem_of(name): name for name in find_files(path.parent) if "/" not in name}
        # What has a mask is a picture, face_mask.jpg, too; the picture of a mask may be missing.
        of_picture = (s if f"{s}_mask" in stems else s.removesuffix("_mask") for s in stems)
        for stem in sorted({*of_picture}):
            image, mask = path.parent / stems.get(stem, stem), stems.get(f"{stem}_mask")
            if mask is None:
                raise InputError(f"{image}: its mask {stem}_mask.png is not beside it")
            read_mask = partial(_read, image.with_name(mask), values)
            split = split_in(path.relative_to(root))
            pictures.append(Picture(image.with_name(mask), str(image), mask=read_mask, split=split))
    return Export([*names.values()], pictures, is_complete=True)


def _names(path: Path) -> dict[int, str]:
    """Return value -> name, by value."""
    lines = [re.split(" *, *", line, maxsplit=1) for line in read_lines(path) if line]
    try:
        (head, _), *rows = lines
        names = {int(value): name for value, name in rows}
        if head.lower() != "pixel value" or len(names) < len(rows) or {*names} - {*range(2**16)}:
            raise ValueError(f"found {head!r} and {', '.join(value for value, _ in rows)}")
    except ValueError as error:
        form = "expected a line 'Pixel Value, Class', then values 0..65535 with names, each once"
        raise InputError(f"{path}: {form} ({error})") from error
    label_positions(names.values(), path)
    return dict(sorted(names.items()))


def _read(path: Path, values: np.ndarray) -> np.ndarray:
    labels = values[mask := read_labels(path)]
    if not labels.all():
        unknown, known = np.unique(mask[labels == 0]).tolist(), np.flatnonzero(values).tolist()
        raise InputError(f"{path}: value {ranges(unknown)}; _classes.csv has {ranges(known)}")
    return labels
