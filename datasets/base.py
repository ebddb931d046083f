"""What all data sets share: finding pairs of files, reading them, mapping labels."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import cv2
import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from danet.errors import InputError
from danet.types import IGNORE, Draw, Sample

Transform = Callable[[Sample, int], Sample]
"""Maps a sample to a sample; the int is the seed of all that is random in it."""

Color = tuple[int, int, int]
"""RGB, 0..255."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
"""Compared in lower case."""


class Item(NamedTuple):
    """A pair of files."""

    image: Path
    mask: Path
    name: str


class SegmentationDataset(Dataset[Sample], ABC):
    """Images with a class index for every pixel.

    A data set that draws its pictures overrides ``read`` and ``__len__``; one that has files
    derives from FileDataset.

    Attributes:
        classes: K names; the position is the class index.
        palette: K RGB colours.
    """

    classes: tuple[str, ...]
    palette: tuple[Color, ...]

    def __init__(self, *, split: str, transform: Transform | None = None) -> None:
        self.split = split
        self.transform = transform

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of samples of the split."""

    @abstractmethod
    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Returns RGB uint8 (H, W, 3), classes or IGNORE as uint8 (H, W), and a name."""

    def __getitem__(self, draw: Draw | int) -> Sample:
        """Reads one sample; a bare index gets the augmentation of seed 0."""
        index, seed = draw if isinstance(draw, tuple) else (int(draw), 0)
        sample = Sample(*self.read(index))
        return self.transform(sample, seed) if self.transform else sample


class FileDataset(SegmentationDataset):
    """Pairs of an image file and a label file below one folder.

    Subclasses give ``classes``, ``palette``, ``find_items`` and, where the files hold other values
    than class indices, ``label_map``.

    Args:
        root: The folder as the publisher ships it; ``~`` is expanded.
        split: One of ``splits``.
        transform: Applied to every sample.

    Raises:
        InputError: No such folder or split, no images, or images without labels.
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    label_hint: ClassVar[str] = ""
    """What to do about a label value without meaning; ends that message."""
    layout: ClassVar[str] = ""
    """A few lines that show the expected tree; printed when nothing is found."""

    def __init__(self, *, root: str | Path, split: str, transform: Transform | None = None) -> None:
        super().__init__(split=split, transform=transform)
        self.root = Path(root).expanduser().absolute()
        if split not in self.splits:
            raise InputError(f"{self}: split={split!r} is not one of {', '.join(self.splits)}")
        if not self.root.is_dir():
            raise InputError(
                f"data.root={self.root}: there is no such folder; {self} expects\n{self.layout}"
            )
        self.items = sorted(self.find_items(), key=lambda item: item.name)
        if not self.items:
            raise InputError(
                f"{self}: no images for split {split!r} under {self.root}; expected\n{self.layout}"
            )
        lonely = [item for item in self.items if not item.mask.exists()]
        if lonely:
            names = ", ".join(item.image.name for item in lonely[:5])
            raise InputError(
                f"{self}: {len(lonely)} of {len(self.items)} images of split {split!r} have no "
                f"label file: {names}; the first was looked for at {lonely[0].mask}"
            )
        self._table = label_table(self.label_map(), len(self.classes))

    def __str__(self) -> str:
        return type(self).__name__

    @abstractmethod
    def find_items(self) -> list[Item]:
        """Returns the pairs of ``self.split``, in any order."""

    def label_map(self) -> Mapping[int, int]:
        """Returns value on disk -> class or IGNORE; other values are refused."""
        return {**{i: i for i in range(len(self.classes))}, IGNORE: IGNORE}

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Reads one pair. Raises InputError with path, value and pixel when it is not usable."""
        item = self.items[index]
        image = read_image(item.image)
        labels = read_labels(item.mask)
        if image.shape[:2] != labels.shape:
            raise InputError(
                f"{item.mask}: the label is {_size(labels)} and its image {item.image} is "
                f"{_size(image)} (width x height); they must be equal"
            )
        return image, self.map_labels(labels, item.mask), item.name

    def map_labels(self, labels: np.ndarray, path: Path) -> np.ndarray:
        """Maps values on disk to class indices; a value without meaning is an error."""
        mapped = self._table[labels]
        unknown = mapped == _UNKNOWN
        if unknown.any():
            value = int(labels[unknown][0])
            row, column = (int(i[0]) for i in np.nonzero(unknown & (labels == value)))
            known = sorted(self.label_map())
            raise InputError(
                f"{path}: label value {value} on {int((labels == value).sum())} pixels, first at "
                f"row {row}, column {column}; {self} has {len(self.classes)} classes, with values "
                f"{_ranges(known)}" + self.label_hint
            )
        return mapped.astype(np.uint8)


_UNKNOWN = 256


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
    table = np.full(65536, _UNKNOWN, np.int16)
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


def read_image(path: Path) -> np.ndarray:
    """Reads a picture as uint8 (H, W, 3), RGB; grey, palette, CMYK and alpha are converted.

    Pillow decodes, since OpenCV returns half of a truncated JPEG without an error. An EXIF turn is
    not applied, so the picture lies as its label does.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode in ("I;16", "I;16B", "I"):  # convert() would clip, not scale
                wide = np.asarray(picture).astype(np.int64)
                grey = np.clip(wide // 257, 0, 255).astype(np.uint8)
                return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
            return np.array(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image ({_reason(error, path)})") from error


def read_labels(path: Path) -> np.ndarray:
    """Reads a label picture as (H, W) indices, uint8 or uint16; a palette is not looked up."""
    try:
        with Image.open(path) as picture:
            mode, kind = picture.mode, picture.format
            labels = np.array(picture)  # (H, W), bool for one bit a pixel
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable label ({_reason(error, path)})") from error
    if kind == "JPEG":
        raise InputError(f"{path}: JPEG is lossy and would change class values; use PNG")
    if labels.ndim != 2:
        raise InputError(
            f"{path}: a label must have one channel of class indices, this has {labels.shape[2]} "
            f"(mode {mode}); colour labels must be turned into class indices first"
        )
    if labels.dtype == np.bool_:
        labels = labels.astype(np.uint8)
    if labels.dtype == np.int32 and labels.size and labels.min() >= 0 and labels.max() < 65536:
        labels = labels.astype(np.uint16)
    if labels.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{path}: labels must be whole numbers 0..65535, found {labels.dtype}")
    return labels


def _reason(error: Exception, path: Path) -> str:
    """Says why a file could not be decoded; looks at its first bytes."""
    if not path.exists():
        return "the file does not exist"
    head = path.read_bytes()[:16]
    if not head:
        return "the file is empty"
    text = str(error).replace(str(path), "").strip(" :'")
    return f"{text}; it begins with {head!r}" if "identify" in text else text


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"


def _ranges(values: list[int]) -> str:
    """Writes sorted integers as ranges: [0, 1, 2, 255] as 0..2, 255."""
    parts, start = [], 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] != values[i - 1] + 1:
            first, last = values[start], values[i - 1]
            parts.append(str(first) if first == last else f"{first}..{last}")
            start = i
    return ", ".join(parts)
