"""What all data sets share: pairs of files, reading them, mapping labels."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from danet.datasets.files import read_image, read_labels
from danet.datasets.labels import UNKNOWN, Color, label_table, ranges
from danet.errors import InputError
from danet.types import IGNORE, Draw, Sample

Transform = Callable[[Sample, int], Sample]
"""Maps a sample to a sample; the int is the seed of all that is random in it."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
"""Compared in lower case."""


class Item(NamedTuple):
    """A pair of files, as absolute paths; text, since 600,000 Path objects are a gigabyte."""

    image: str
    mask: str | None
    """None in a split whose labels the publisher keeps."""
    name: str
    """Unique within the split; what predictions and messages call it."""


@dataclass(frozen=True)
class Reading:
    """How files are read: the same for every data set, from keys of the config group ``data``.

    Args:
        max_pixels: Larger pictures are refused before they are decoded.
    """

    max_pixels: int = 178_956_970


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
    than class indices, ``label_map``; where labels are not pictures, ``decode_labels``.

    Args:
        root: The folder as the publisher ships it; ``~`` is expanded.
        split: One of ``splits``.
        transform: Applied to every sample.
        reading: How files are read.

    Attributes:
        items: Of the split, sorted by name.

    Raises:
        InputError: No such folder or split, no images, or images without labels.
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    expected: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    """Split -> how many images the publisher counts; several where releases differ."""
    label_hint: ClassVar[str] = ""
    """What to do about a label value without meaning; ends that message."""
    layout: ClassVar[str] = ""
    """A few lines that show the expected tree; printed when nothing is found."""

    def __init__(
        self,
        *,
        root: str | Path,
        split: str,
        transform: Transform | None = None,
        reading: Reading | None = None,
    ) -> None:
        super().__init__(split=split, transform=transform)
        self.reading = reading or Reading()
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
        lonely = [item for item in self.items if item.mask and not Path(item.mask).exists()]
        if lonely:
            names = ", ".join(Path(item.image).name for item in lonely[:5])
            raise InputError(
                f"{self}: {len(lonely)} of {len(self.items)} images of split {split!r} have no "
                f"label file: {names}; the first was looked for at {lonely[0].mask}"
            )
        self._table = label_table(self.label_map(), len(self.classes))

    def __str__(self) -> str:
        return type(self).__name__

    @abstractmethod
    def find_items(self) -> Iterable[Item]:
        """Returns the pairs of ``self.split``, in any order, without opening files."""

    def label_map(self) -> Mapping[int, int]:
        """Returns value on disk -> class or IGNORE; other values are refused."""
        return {**{i: i for i in range(len(self.classes))}, IGNORE: IGNORE}

    def decode_labels(self, path: Path) -> np.ndarray:
        """Reads a label file as whole numbers 0..65535, (H, W), uint8 or uint16."""
        return read_labels(path)

    @property
    def is_labelled(self) -> bool:
        """Tells whether the split has labels; a test split of a challenge has none."""
        return self.items[0].mask is not None

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Reads one pair; the mask is all IGNORE in a split without labels.

        Raises:
            InputError: A file is not usable; with path, value and pixel.
        """
        item = self.items[index]
        image = read_image(Path(item.image))
        if item.mask is None:
            return image, np.full(image.shape[:2], IGNORE, np.uint8), item.name
        path = Path(item.mask)
        labels = self.decode_labels(path)
        if image.shape[:2] != labels.shape:
            raise InputError(
                f"{path}: the label is {_size(labels)} and its image {item.image} is "
                f"{_size(image)} (width x height); they must be equal"
            )
        return image, self.map_labels(labels, path), item.name

    def map_labels(self, labels: np.ndarray, path: Path) -> np.ndarray:
        """Maps values on disk to class indices; a value without meaning is an error."""
        mapped = self._table[labels]
        unknown = mapped == UNKNOWN
        if unknown.any():
            value = int(labels[unknown][0])
            row, column = (int(i[0]) for i in np.nonzero(unknown & (labels == value)))
            known = sorted(self.label_map())
            raise InputError(
                f"{path}: label value {value} on {int((labels == value).sum())} pixels, first at "
                f"row {row}, column {column}; {self} has {len(self.classes)} classes, with values "
                f"{ranges(known)}" + self.label_hint
            )
        return mapped.astype(np.uint8)


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"
