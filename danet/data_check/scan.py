"""Inspecting all pairs of a split in several processes, and their statistics."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from danet.datasets.base import FileDataset
from danet.datasets.hints import ORIENTATION
from danet.datasets.image_io import Levels, inspect_dropped, verify_complete
from danet.errors import InputError
from danet.types import IGNORE


class PairReport(NamedTuple):
    """The properties of an image and its label."""

    pair_index: int
    """Position in the split."""
    size: tuple[int, int] | None
    """(H, W) of the image."""
    mode: str
    """Pillow's mode of the image: RGB, L, RGBA, CMYK, ..."""
    is_rotated: bool
    """Whether EXIF data gives the image another orientation, which is not applied."""
    num_bytes: int
    """Length of the image file."""
    dropped: tuple[str, ...]
    """Parts of the image that are not read, such as alpha."""
    levels: Levels | None
    """Values of an image of more than 8 bits, before and after reading."""
    values: np.ndarray
    """Distinct values of the label file, int64 (V,)."""
    counts: np.ndarray
    """Pixels of each value, int64 (V,)."""
    classes: np.ndarray | None
    """Class of each value, uint8 (V,); None where a value has none, or without a label."""
    problem: str | None


def inspect_pair(dataset: FileDataset, index: int, *, full: bool = False) -> PairReport:
    """Decode one label and inspect its image; a file that is not usable becomes a problem.

    Args:
        dataset: The split.
        index: Of the pair.
        full: Whether to decode PNG and JPEG images, too. Otherwise only their structure and
            checksums are verified, which finds truncated files. Other formats are always decoded.
    """
    item = dataset.items[index]
    empty = np.zeros(0, np.int64)
    pair = PairReport(index, None, "", False, 0, (), None, empty, empty, None, None)
    try:
        pair = _inspect_image(pair, dataset, full)
        if item.mask is None:
            return pair
        path = Path(item.mask)
        labels = dataset.labels_of(item)
        values, counts = count_values(labels)
        pair = pair._replace(values=values, counts=counts)
        if labels.shape != pair.size:
            dataset.read(index)  # raises the error that training would raise
        try:
            classes = dataset.map_labels(values[None].astype(labels.dtype), path)[0]
        except InputError:
            dataset.map_labels(labels, path)  # the same error with the number of pixels and where
            raise
        return pair._replace(classes=classes)
    except InputError as error:
        return pair._replace(problem=str(error))


def _inspect_image(pair: PairReport, dataset: FileDataset, full: bool) -> PairReport:
    path = Path(dataset.items[pair.pair_index].image)
    try:
        pair = pair._replace(num_bytes=path.stat().st_size)
        with warnings.catch_warnings():
            # data.max_pixels replaces Pillow's own limit, which warns at half of it.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(path)
        with picture:
            width, height = picture.size
            # PNG may store EXIF data behind the pixels: searching for it would decode them.
            exif = {} if picture.format == "PNG" else picture.getexif()
            is_rotated = exif.get(ORIENTATION, 1) not in (0, 1)
            pair = pair._replace(size=(height, width), mode=picture.mode, is_rotated=is_rotated)
        dropped, levels = inspect_dropped(path, max_pixels=dataset.reading.max_pixels)
        pair = pair._replace(dropped=dropped, levels=levels)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        full = True
    if full or not verify_complete(path, max_pixels=dataset.reading.max_pixels):
        image = dataset.read(pair.pair_index)[0]  # raises the error that training would raise
        pair = pair._replace(size=image.shape[:2])
    return pair


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
    """The statistics of a split.

    Attributes:
        sizes: (H, W) -> number of images.
        modes: Pillow's mode -> number of images.
        rotated: Names of images with an EXIF orientation.
        dropped: Part of images that is not read -> number of images.
        quantized: Names of images of more than 8 bits, with their values before and after.
        pixels: Of each class, int64 (K,).
        values: Distinct values of the label files.
        ignored: Number of ignored pixels.
        images_with: Images in which each class occurs, int64 (K,).
        pixels_with: All pixels, ignored or not, of these images, int64 (K,).
        all_ignored: Names of labels without any class.
        bytes_of: Path of each image -> length of the file.
        problems: Why pairs cannot be used; the first ``max_problems`` of them.
        num_problems: How many there are.
    """

    split: str
    classes: tuple[str, ...]
    num_images: int
    expected: tuple[int, ...]
    max_problems: int
    notes: list[str] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    rotated: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    quantized: list[tuple[str, Levels]] = field(default_factory=list)
    values: set[int] = field(default_factory=set)
    ignored: int = 0
    all_ignored: list[str] = field(default_factory=list)
    bytes_of: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0
    has_labels: bool = True

    def __post_init__(self) -> None:
        self.pixels, self.images_with, self.pixels_with = np.zeros((3, len(self.classes)), np.int64)

    def add(self, pair: PairReport, dataset: FileDataset) -> None:
        """Add a pair of ``dataset``."""
        item = dataset.items[pair.pair_index]
        if pair.problem:
            self.add_problem(pair.problem)
        if pair.size is None:
            return
        self.sizes[pair.size] += 1
        self.modes[pair.mode or "unknown"] += 1
        self.bytes_of[item.image] = pair.num_bytes
        self.values.update(pair.values.tolist())
        if pair.is_rotated:
            self.rotated.append(item.name)
        self.dropped.update(pair.dropped)
        if pair.levels is not None:
            self.quantized.append((item.name, pair.levels))
        if pair.classes is None:
            return
        counts = np.bincount(pair.classes, minlength=256)  # label values per class
        present = np.flatnonzero(counts[: len(self.classes)])
        for index in present:
            self.pixels[index] += pair.counts[pair.classes == index].sum()
        self.images_with[present] += 1
        self.pixels_with[present] += pair.counts.sum()
        self.ignored += int(pair.counts[pair.classes == IGNORE].sum())
        if not present.size:
            self.all_ignored.append(item.name)

    def add_problem(self, problem: str, *, first: bool = False) -> None:
        """Count a problem and keep it if it is among the first; ``first`` puts it in front."""
        self.num_problems += 1
        self.problems.insert(0 if first else len(self.problems), problem)
        del self.problems[self.max_problems :]


class _Pairs(Dataset[PairReport]):
    """The reports of all pairs, for a DataLoader."""

    def __init__(self, dataset: FileDataset, full: bool) -> None:
        self.dataset, self.full = dataset, full

    def __len__(self) -> int:
        return len(self.dataset.items)

    def __getitem__(self, index: int) -> PairReport:
        return inspect_pair(self.dataset, index, full=self.full)


def scan(
    dataset: FileDataset,
    *,
    full: bool = False,
    max_problems: int = 5,
    num_workers: int = 0,
    progress: Callable[[int], object] = lambda _: None,
) -> SplitReport:
    """Inspect all pairs of a split; problems are collected.

    Args:
        dataset: The split.
        full: Whether to decode images, too; see ``inspect_pair``.
        max_problems: How many problems are kept in full.
        num_workers: Number of worker processes.
        progress: Called with the number of pairs inspected since the last call.
    """
    report = SplitReport(
        split=dataset.split,
        classes=dataset.classes,
        num_images=len(dataset),
        expected=tuple(dataset.expected.get(dataset.split, ())),
        max_problems=max_problems,
        notes=list(dataset.notes),
        has_labels=dataset.is_labelled,
    )
    batches: Iterable[list[PairReport]] = DataLoader(
        _Pairs(dataset, full),
        batch_size=16,
        collate_fn=list,
        num_workers=num_workers,
        worker_init_fn=_single_thread,
    )
    for batch in batches:
        for pair in batch:
            report.add(pair, dataset)
        progress(len(batch))
    if report.expected and report.num_images not in report.expected:
        report.notes.append(
            f"{report.num_images} images, but the publisher counts "
            f"{' or '.join(map(str, report.expected))}"
        )
    return report


def _single_thread(_: int) -> None:
    cv2.setNumThreads(0)
