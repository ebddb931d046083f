"""Inspecting all pairs of a split in several processes, and their statistics."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags
from torch.utils.data import DataLoader
from tqdm import tqdm

from danet.data.workers import init_worker
from danet.datasets.band_io import read_bands
from danet.datasets.base import FileDataset
from danet.datasets.folder import Folder
from danet.datasets.image_io import Levels, inspect_dropped, open_picture
from danet.datasets.label_statistics import class_pixels
from danet.errors import InputError


@dataclass
class PairReport:
    """The properties of an image and its label."""

    index: int
    name: str
    size: tuple[int, int] | None = None  # (H, W) of the image; None if it cannot be used
    remarks: list[str] = field(default_factory=list)  # what reading changes, and the like
    levels: Levels | None = None  # of an image of more than 8 bits
    values: set[int] = field(default_factory=set)  # in the label file
    unlisted: int = 0  # pixels that have a class because of data.nearest
    pixels: np.ndarray | None = None  # of each class and ignored, int64 (K + 1,); None on error
    problem: str | None = None  # why the pair cannot be used


def inspect_pair(dataset: FileDataset, index: int, *, full: bool = False) -> PairReport:
    """Decode one label and inspect its image; a file that is not usable becomes a problem.

    Unless ``full``, only the structure and checksums of PNG and JPEG images are verified, which
    finds truncated files. Other formats are always decoded.
    """
    pair = PairReport(index, dataset.items[index].name)
    part, place = dataset.locate(index)
    try:
        pair.size = _inspect_image(pair, part, place, full)
        if part.items[place].mask is not None:
            _inspect_label(pair, part, place)
    except InputError as error:
        pair.problem = str(error)
    return pair


def _inspect_image(
    pair: PairReport, dataset: FileDataset, index: int, full: bool
) -> tuple[int, int]:
    """Return the size of an image; raise InputError if it cannot be used."""
    path, max_pixels = Path(dataset.items[index].image), dataset.reading.max_pixels
    if bands := dataset.reading.bands:
        image, missing = read_bands(path, bands, max_pixels=max_pixels)
        if missing is not None:
            pair.remarks.append("values are missing (NaN, infinite or nodata) and become black")
        return image.shape[0], image.shape[1]
    with open_picture(path, max_pixels=max_pixels) as picture:
        size = picture.height, picture.width
        if picture.mode != "RGB":
            pair.remarks.append(f"mode {picture.mode} becomes 8-bit RGB")
        # PNG may store EXIF data behind the pixels: searching for it would decode them.
        if picture.format != "PNG":
            with suppress(SyntaxError, ValueError):  # EXIF data that cannot be read
                if picture.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1):
                    pair.remarks.append("an EXIF turn, which is not applied")
        if picture.format in ("JPEG", "MPO"):
            picture.draft(None, (1, 1))  # an eighth of the size: the whole file is read
            picture.load()
        is_whole = picture.format in ("PNG", "JPEG", "MPO")
    dropped, pair.levels = inspect_dropped(path, max_pixels=max_pixels)
    pair.remarks += [f"{text}; data.channels reads files as they are" for text in dropped]
    if full or not is_whole:
        dataset.read(index)  # raises the error of a training
    return size


def _inspect_label(pair: PairReport, dataset: FileDataset, index: int) -> None:
    """Count the values of a label and map them to classes; raise InputError if one has none."""
    item = dataset.items[index]
    labels, path = dataset.labels_of(item), Path(item.mask or "")
    counts = np.bincount(labels.ravel())
    pair.values = set(np.flatnonzero(counts).tolist())
    if isinstance(dataset, Folder) and dataset.labels.nearest:
        pair.unlisted = dataset.count_unlisted(item)
    if labels.shape != pair.size:
        dataset.read(index)  # raises the error of a training
    pair.pixels = class_pixels(dataset, labels, counts, path)
    if not pair.pixels[:-1].any():
        pair.remarks.append("the label is ignored everywhere and teaches nothing")


@dataclass
class SplitReport:
    """The pairs of a split that were inspected, and their sums."""

    dataset: FileDataset
    pairs: list[PairReport] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # of pairs, or of all of them together
    ignored: int = 0  # pixels

    def __post_init__(self) -> None:
        shape = 3, len(self.dataset.classes)
        # Pixels of each class, images in which it occurs, and all pixels of these images.
        self.pixels, self.images_with, self.pixels_with = np.zeros(shape, np.int64)
        self.notes = list(self.dataset.notes)

    @property
    def usable(self) -> list[PairReport]:
        """The pairs whose image can be used."""
        return [pair for pair in self.pairs if pair.size is not None]

    @property
    def values(self) -> set[int]:
        """Distinct values of the label files."""
        return set().union(*(pair.values for pair in self.usable))

    def add(self, pair: PairReport) -> None:
        """Add a pair of the data set."""
        self.pairs.append(pair)
        if pair.problem:
            self.problems.append(pair.problem)
        if pair.pixels is not None:
            pixels = pair.pixels[:-1]
            self.ignored += int(pair.pixels[-1])
            self.pixels += pixels
            self.images_with += pixels > 0
            self.pixels_with += (pixels > 0) * pair.pixels.sum()


def scan(dataset: FileDataset, *, full: bool = False, num_workers: int = 0) -> SplitReport:
    """Inspect all pairs of a split, with a progress bar; for ``full`` see ``inspect_pair``."""
    report = SplitReport(dataset)
    pairs: Iterable[PairReport] = DataLoader(
        range(len(dataset)),  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=partial(inspect_pair, dataset, full=full),
        num_workers=num_workers,
        worker_init_fn=init_worker,
    )
    for pair in tqdm(pairs, desc=dataset.split, unit="pair", dynamic_ncols=True):
        report.add(pair)
    expected = dataset.expected.get(dataset.split, ())
    if expected and len(dataset) not in expected:
        shown = " or ".join(map(str, expected))
        report.notes.append(f"{len(dataset)} images, but the publisher counts {shown}")
    return report
