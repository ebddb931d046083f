"""Inspecting all pairs of a split in several processes, and their statistics."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from danet.datasets.base import FileDataset
from danet.datasets.image_io import Levels, inspect_dropped, verify_complete
from danet.errors import InputError
from danet.types import IGNORE


@dataclass
class PairReport:
    """The properties of an image and its label.

    Attributes:
        index: Position in the split.
        size: (H, W) of the image; None if it cannot be used.
        mode: Pillow's mode of the image: RGB, L, RGBA, CMYK, ...
        is_rotated: Whether EXIF data gives the image another orientation, which is not applied.
        num_bytes: Length of the image file.
        dropped: Parts of the image that are not read, such as alpha.
        levels: Values of an image of more than 8 bits, before and after reading.
        values: Distinct values of the label file, int64 (V,).
        counts: Pixels of each value, int64 (V,).
        classes: Class of each value, uint8 (V,); None where a value has none, or without a label.
        problem: Why the pair cannot be used.
    """

    index: int
    size: tuple[int, int] | None = None
    mode: str = ""
    is_rotated: bool = False
    num_bytes: int = 0
    dropped: tuple[str, ...] = ()
    levels: Levels | None = None
    values: np.ndarray = field(default_factory=partial(np.zeros, 0, np.int64))
    counts: np.ndarray = field(default_factory=partial(np.zeros, 0, np.int64))
    classes: np.ndarray | None = None
    problem: str | None = None


def inspect_pair(dataset: FileDataset, index: int, *, full: bool = False) -> PairReport:
    """Decode one label and inspect its image; a file that is not usable becomes a problem.

    Args:
        dataset: The split.
        index: Of the pair.
        full: Whether to decode PNG and JPEG images, too. Otherwise only their structure and
            checksums are verified, which finds truncated files. Other formats are always decoded.
    """
    pair = PairReport(index)
    try:
        pair.size = _inspect_image(pair, dataset, full)
        if dataset.items[index].mask is not None:
            _inspect_label(pair, dataset)
    except InputError as error:
        pair.problem = str(error)
    return pair


def _inspect_image(pair: PairReport, dataset: FileDataset, full: bool) -> tuple[int, int]:
    """Return the size of an image; raise InputError if it cannot be used."""
    path, size = Path(dataset.items[pair.index].image), (0, 0)
    max_pixels = dataset.reading.max_pixels
    try:
        pair.num_bytes = path.stat().st_size
        with warnings.catch_warnings():
            # data.max_pixels replaces Pillow's own limit, which warns at half of it.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(path)
        with picture:
            size, pair.mode = (picture.height, picture.width), picture.mode
            # PNG may store EXIF data behind the pixels: searching for it would decode them.
            exif = {} if picture.format == "PNG" else picture.getexif()
            pair.is_rotated = exif.get(ExifTags.Base.Orientation, 1) not in (0, 1)
        pair.dropped, pair.levels = inspect_dropped(path, max_pixels=max_pixels)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        full = True
    if full or not verify_complete(path, max_pixels=max_pixels):
        height, width, _ = dataset.read(pair.index)[0].shape  # raises the error of a training
        size = height, width
    return size


def _inspect_label(pair: PairReport, dataset: FileDataset) -> None:
    """Count the values of a label and map them to classes; raise InputError if one has none."""
    item = dataset.items[pair.index]
    labels, path = dataset.labels_of(item), Path(item.mask or "")
    pair.values, pair.counts = count_values(labels)
    if labels.shape != pair.size:
        dataset.read(pair.index)  # raises the error of a training
    try:
        pair.classes = dataset.map_labels(pair.values[None].astype(labels.dtype), path)[0]
    except InputError:
        dataset.map_labels(labels, path)  # the same error with the number of pixels and where
        raise


def count_values(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct values of uint8 or uint16 (H, W) and the pixels of each, int64 (V,)."""
    flat = np.ascontiguousarray(labels).ravel()
    if flat.dtype == np.uint8 and flat.size % 2 == 0:
        # Two pixels as one uint16: half as many values to count.
        pairs = np.bincount(flat.view(np.uint16), minlength=65536).reshape(256, 256)
        counts = pairs.sum(axis=0) + pairs.sum(axis=1)
    else:
        counts = np.bincount(flat)
    values = np.flatnonzero(counts)
    return values, counts[values]


@dataclass
class SplitReport:
    """The pairs of a split that were inspected, and their sums.

    Attributes:
        dataset: The split.
        pairs: In order.
        problems: Why pairs, or all of them together, cannot be used.
        notes: What else is known of the split.
        pixels: Of each class, int64 (K,).
        images_with: Images in which each class occurs, int64 (K,).
        pixels_with: All pixels, ignored or not, of these images, int64 (K,).
        ignored: Number of ignored pixels.
    """

    dataset: FileDataset
    pairs: list[PairReport] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    ignored: int = 0

    def __post_init__(self) -> None:
        shape = 3, len(self.dataset.classes)
        self.pixels, self.images_with, self.pixels_with = np.zeros(shape, np.int64)
        self.notes = list(self.dataset.notes)

    @property
    def usable(self) -> list[PairReport]:
        """The pairs whose image can be used."""
        return [pair for pair in self.pairs if pair.size is not None]

    @property
    def values(self) -> set[int]:
        """Distinct values of the label files."""
        return set().union(*(pair.values.tolist() for pair in self.usable))

    @property
    def bytes_of(self) -> dict[str, int]:
        """Path of each image -> length of the file."""
        return {self.dataset.items[pair.index].image: pair.num_bytes for pair in self.usable}

    def add(self, pair: PairReport) -> None:
        """Add a pair of the data set."""
        self.pairs.append(pair)
        if pair.problem:
            self.problems.append(pair.problem)
        if pair.classes is None:
            return
        for index in np.unique(pair.classes):
            pixels = pair.counts[pair.classes == index].sum()
            if index == IGNORE:
                self.ignored += int(pixels)
            else:
                self.pixels[index] += pixels
                self.images_with[index] += 1
                self.pixels_with[index] += pair.counts.sum()


def scan(
    dataset: FileDataset,
    *,
    full: bool = False,
    num_workers: int = 0,
    progress: Callable[[int], object] = lambda _: None,
) -> SplitReport:
    """Inspect all pairs of a split; problems are collected.

    Args:
        dataset: The split.
        full: Whether to decode images, too; see ``inspect_pair``.
        num_workers: Number of worker processes.
        progress: Called with the number of pairs inspected since the last call.
    """
    report = SplitReport(dataset)
    batches: Iterable[list[PairReport]] = DataLoader(
        range(len(dataset)),  # type: ignore[arg-type]
        batch_size=16,
        collate_fn=partial(_inspect_pairs, dataset, full),
        num_workers=num_workers,
        worker_init_fn=_single_thread,
    )
    for batch in batches:
        for pair in batch:
            report.add(pair)
        progress(len(batch))
    expected = dataset.expected.get(dataset.split, ())
    if expected and len(dataset) not in expected:
        shown = " or ".join(map(str, expected))
        report.notes.append(f"{len(dataset)} images, but the publisher counts {shown}")
    return report


def _inspect_pairs(dataset: FileDataset, full: bool, indices: Iterable[int]) -> list[PairReport]:
    return [inspect_pair(dataset, index, full=full) for index in indices]


def _single_thread(_: int) -> None:
    cv2.setNumThreads(0)
