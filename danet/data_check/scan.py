"""Looks at every pair of a data set, in several processes, and adds up what is there."""

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


class Look(NamedTuple):
    """What one pair is like."""

    place: int
    """Index of the pair in its split."""
    size: tuple[int, int] | None
    """Of the image, (H, W)."""
    mode: str
    """Of the image, in Pillow's words: RGB, L, RGBA, CMYK, ..."""
    is_turned: bool
    """Whether the image has an EXIF turn."""
    num_bytes: int
    """Of the image file."""
    dropped: tuple[str, ...]
    """What reading the image leaves out."""
    levels: Levels | None
    """Of an image with more than 8 bits."""
    values: np.ndarray
    """Numbers that occur in the label file, int64 (V,)."""
    counts: np.ndarray
    """Pixels of each, int64 (V,)."""
    classes: np.ndarray | None
    """What each means, uint8 (V,); None where one has no meaning, or there is no label."""
    problem: str | None


def look(dataset: FileDataset, index: int, *, full: bool = False) -> Look:
    """Decodes one label and looks at its image; a file that is not usable becomes a problem.

    Args:
        dataset: Whose pair it is.
        index: Of the pair.
        full: Whether to decode PNG and JPEG images, too. Without, their structure is walked to the
            end: what is cut off or has a wrong checksum is found. Other kinds are decoded.
    """
    item = dataset.items[index]
    empty = np.zeros(0, np.int64)
    found = Look(index, None, "", False, 0, (), None, empty, empty, None, None)
    try:
        found = _look_at_image(found, dataset, full)
        if item.mask is None:
            return found
        path = Path(item.mask)
        labels = dataset.labels_of(item)
        values, counts = count_values(labels)
        found = found._replace(values=values, counts=counts)
        if labels.shape != found.size:
            dataset.read(index)  # refuses it, in the words of a training
        try:
            classes = dataset.map_labels(values[None].astype(labels.dtype), path)[0]
        except InputError:
            dataset.map_labels(labels, path)  # the same, with count and place
            raise
        return found._replace(classes=classes)
    except InputError as error:
        return found._replace(problem=str(error))


def _look_at_image(found: Look, dataset: FileDataset, full: bool) -> Look:
    path = Path(dataset.items[found.place].image)
    try:
        found = found._replace(num_bytes=path.stat().st_size)
        with warnings.catch_warnings():
            # data.max_pixels stands in for Pillow's own limit, which warns at half of it.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(path)
        with picture:
            width, height = picture.size
            # A PNG may have its EXIF data behind its pixels: looking for them would decode it.
            exif = {} if picture.format == "PNG" else picture.getexif()
            turned = exif.get(ORIENTATION, 1) not in (0, 1)
            found = found._replace(size=(height, width), mode=picture.mode, is_turned=turned)
        dropped, levels = inspect_dropped(path, max_pixels=dataset.reading.max_pixels)
        found = found._replace(dropped=dropped, levels=levels)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        full = True
    if full or not verify_complete(path, max_pixels=dataset.reading.max_pixels):
        image = dataset.read(found.place)[0]  # or refuses it, in the words of a training
        found = found._replace(size=image.shape[:2])
    return found


def count_values(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers that occur in uint8 or uint16 (H, W) and the pixels of each, int64."""
    flat = np.ascontiguousarray(labels).ravel()
    if flat.dtype == np.uint8 and flat.size % 2 == 0:
        # Two pixels as one number: half the counting.
        pairs = np.bincount(flat.view(np.uint16), minlength=65536).reshape(256, 256)
        counts = pairs.sum(axis=0) + pairs.sum(axis=1)
    else:
        counts = np.bincount(flat)
    values = np.flatnonzero(counts)
    return values, counts[values]


@dataclass
class SplitReport:
    """What a split holds.

    Attributes:
        sizes: Of the images, (H, W) -> how many.
        modes: Of the images, in Pillow's words -> how many.
        turned: Names of images with an EXIF turn.
        dropped: What reading them leaves out -> how many.
        squeezed: Names of images of more than 8 bits, with their values before and after.
        pixels: Of each class, int64 (K,).
        values: Numbers that occur in the label files.
        ignored: Pixels that count for no class.
        images_with: Images in which each class occurs, int64 (K,).
        pixels_with: All pixels, ignored or not, of these images, int64 (K,).
        all_ignored: Names of labels without any class.
        bytes_of: Path of each image -> bytes.
        problems: What makes a pair unusable; the first ``keep`` of them.
        num_problems: How many there are.
    """

    split: str
    classes: tuple[str, ...]
    num_images: int
    expected: tuple[int, ...]
    keep: int
    notes: list[str] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    turned: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    squeezed: list[tuple[str, Levels]] = field(default_factory=list)
    values: set[int] = field(default_factory=set)
    ignored: int = 0
    all_ignored: list[str] = field(default_factory=list)
    bytes_of: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0
    has_labels: bool = True

    def __post_init__(self) -> None:
        self.pixels, self.images_with, self.pixels_with = np.zeros((3, len(self.classes)), np.int64)

    def add(self, found: Look, dataset: FileDataset) -> None:
        """Adds one pair."""
        item = dataset.items[found.place]
        if found.problem:
            self.complain(found.problem)
        if found.size is None:
            return
        self.sizes[found.size] += 1
        self.modes[found.mode or "unknown"] += 1
        self.bytes_of[item.image] = found.num_bytes
        self.values.update(found.values.tolist())
        if found.is_turned:
            self.turned.append(item.name)
        self.dropped.update(found.dropped)
        if found.levels is not None:
            self.squeezed.append((item.name, found.levels))
        if found.classes is None:
            return
        counts = np.bincount(found.classes, minlength=256)  # how many values mean it
        present = np.flatnonzero(counts[: len(self.classes)])
        for index in present:
            self.pixels[index] += found.counts[found.classes == index].sum()
        self.images_with[present] += 1
        self.pixels_with[present] += found.counts.sum()
        self.ignored += int(found.counts[found.classes == IGNORE].sum())
        if not present.size:
            self.all_ignored.append(item.name)

    def complain(self, problem: str, *, first: bool = False) -> None:
        """Adds a problem; only the first ones are kept, and one that explains others leads them."""
        self.num_problems += 1
        self.problems.insert(0 if first else len(self.problems), problem)
        del self.problems[self.keep :]


class _Looks(Dataset[Look]):
    """The pairs of a data set as a DataLoader wants them."""

    def __init__(self, dataset: FileDataset, full: bool) -> None:
        self.dataset, self.full = dataset, full

    def __len__(self) -> int:
        return len(self.dataset.items)

    def __getitem__(self, index: int) -> Look:
        return look(self.dataset, index, full=self.full)


def scan(
    dataset: FileDataset,
    *,
    full: bool = False,
    keep: int = 5,
    num_workers: int = 0,
    progress: Callable[[int], object] = lambda _: None,
) -> SplitReport:
    """Looks at all pairs of a split; goes on after a problem.

    Args:
        dataset: The split.
        full: Whether to decode images, too; see ``look``.
        keep: How many problems are kept in full.
        num_workers: Processes that look.
        progress: Is told how many pairs were looked at since it was last told.
    """
    report = SplitReport(
        split=dataset.split,
        classes=dataset.classes,
        num_images=len(dataset),
        expected=tuple(dataset.expected.get(dataset.split, ())),
        keep=keep,
        notes=list(dataset.notes),
        has_labels=dataset.is_labelled,
    )
    looks: Iterable[list[Look]] = DataLoader(
        _Looks(dataset, full),
        batch_size=16,
        collate_fn=list,
        num_workers=num_workers,
        worker_init_fn=_quiet_worker,
    )
    for batch in looks:
        for found in batch:
            report.add(found, dataset)
        progress(len(batch))
    if report.expected and report.num_images not in report.expected:
        report.notes.append(
            f"{report.num_images} images, but the publisher counts "
            f"{' or '.join(map(str, report.expected))}"
        )
    return report


def _quiet_worker(_: int) -> None:
    """Keeps a worker on one core."""
    cv2.setNumThreads(0)
