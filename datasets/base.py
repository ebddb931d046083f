"""Base classes of data sets: pairs of files, reading them, mapping labels to classes."""

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch.utils.data import Dataset

from danet.datasets.band_io import read_bands
from danet.datasets.cache import Cache, cache_folder
from danet.datasets.image_io import read_labels
from danet.datasets.items import Item as Item
from danet.datasets.items import Items, JoinedItems
from danet.datasets.labels import Color, in_order, label_table, ranges, read_published
from danet.datasets.listing import elsewhere
from danet.datasets.lists import SplitRule
from danet.datasets.reading import Reading as Reading
from danet.datasets.reading import check_choices
from danet.errors import InputError
from danet.types import IGNORE, Sample, SampleKey, ignore_index

Transform = Callable[..., Sample]
"""Maps a sample and the seed of all that is random to a sample.

With rare-class sampling it gets the class as a third argument."""


@dataclass(kw_only=True, eq=False, repr=False)
class SegmentationDataset(Dataset[Sample], ABC):
    """Images with a class index for every pixel.

    A data set that draws its pictures overrides ``read`` and ``__len__``; one that has files
    derives from FileDataset.
    """

    classes: ClassVar[tuple[str, ...]]  # K names; the position is the class index
    palette: ClassVar[tuple[Color, ...]]
    is_labelled = True  # whether the split has labels; a test split of a challenge has none

    split: str
    transform: Transform | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples of the split."""

    def fingerprint(self) -> str:
        """Return a text that identifies the samples of the split by number and names."""
        return f"{type(self).__name__} {self.split}, {len(self)} samples"

    @abstractmethod
    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Return image, mask and name; see Sample."""

    def __getitem__(self, key: SampleKey | int) -> Sample:
        """Return one sample; a bare index gets the augmentation of seed 0."""
        key = SampleKey(*key) if isinstance(key, tuple) else SampleKey(int(key), 0)
        sample = Sample(*self.read(key.index))
        if len(self.classes) > IGNORE:  # transforms know what is ignored by the type
            sample = sample._replace(mask=sample.mask.astype(np.uint16, copy=False))
        if self.transform is None:
            return sample
        focus = () if key.focus is None else (key.focus,)
        return self.transform(sample, key.seed, *focus)


@dataclass(kw_only=True, eq=False, repr=False)
class FileDataset(SegmentationDataset):
    """Pairs of an image file and a label file below one folder.

    Subclasses name their entry in tables/published.yaml, or have ``classes`` and ``palette`` of
    their own, and define ``find_items``; where labels are not pictures of class indices or of the
    values in the table, ``labels_of`` and ``label_map``, too. Without such a folder or split,
    images, or labels they raise InputError.

    Args:
        root: The folder as the publisher ships it; ``~`` is expanded.
        split: One of those in ``expected``.
        transform: Applied to every sample.
        reading: How files are read.

    Attributes:
        items: Of the split, sorted by name; then those of the data sets that were joined.
        parts: This data set, then those that were joined.
        notes: Warnings for the user, one line each.
        division: A note on a division by a hash of the names; empty where there is none.
        undivided: A note, instead, where such a division leaves no picture for "val".
    """

    root: Path
    reading: Reading = field(default_factory=Reading)

    # See tables/published.yaml.
    expected: ClassVar[Mapping[str, Sequence[int]]] = {"train": (), "val": (), "test": ()}
    layout: ClassVar[str] = ""
    marker: ClassVar[str] = ""
    value_hint = missing_hint = ""
    values: ClassVar[Mapping[int, int]] = {}
    division = undivided = ""

    def __init_subclass__(cls, published: str = "") -> None:
        """Take what the publisher says from ``tables``: classes, label values, the layout."""
        for key, value in read_published(published).items() if published else ():
            setattr(cls, key, value)

    def __post_init__(self) -> None:
        check_choices(self)
        self.root = Path(self.root).expanduser().absolute()
        if self.split not in self.expected:
            splits = ", ".join(self.expected)
            raise InputError(f"{self}: split={self.split!r} is not one of {splits}")
        if not self.root.is_dir():
            missing = f"data.root={self.root}: there is no such folder"
            raise InputError(f"{missing}; {self} expects\n{self.layout}")
        self.notes: list[str] = []
        self.parts: Sequence[FileDataset] = (self,)
        self.items = Items(self.find_items())
        if not self.items:
            hint = self.explain_no_images() or f"; expected\n{self.layout}"
            raise InputError(f"{self}: no images for split {self.split!r} under {self.root}{hint}")
        self._leave_out_unlabelled()
        self.is_labelled = self.items[0].mask is not None
        self._table = label_table(self.label_map(), len(self.classes))
        self._cache: Cache | None = None
        if self.reading.cache != "none":
            folder, limit = cache_folder(self.reading.cache_dir), self.reading.cache_gib * 2**30
            self._cache = Cache(folder, root=self.root, kind=self.decoding(), limit=int(limit))

    def __str__(self) -> str:
        return type(self).__name__

    def _leave_out_unlabelled(self) -> None:
        """Leave out images without a label file where that is allowed; else raise InputError."""
        if not (missing := self.items.without_label()):
            return
        names = ", ".join(Path(self.items[i].image).name for i in missing[:5])
        is_all = len(missing) == len(self.items)
        found = (
            f"{len(missing)} of {len(self.items)} images of split {self.split!r} have no label "
            f"file: {names}; the first was looked for at {self.items[missing[0]].mask}"
            f"{self.explain_no_labels(of_all=is_all)}"
        )
        if is_all or not self.reading.allow_missing_labels:
            advice = "; data.allow_missing_labels=true leaves such images out" * (not is_all)
            raise InputError(f"{self}: {found}{advice}")
        self.notes.append(f"left out: {found}")
        left_out = set(missing)
        self.items = Items(item for i, item in enumerate(self.items) if i not in left_out)

    @abstractmethod
    def find_items(self) -> Iterable[Item]:
        """Return the pairs of ``self.split``, in any order, without opening files."""

    def divide(self, names: Sequence[str], rule: SplitRule) -> set[str]:
        """Return the names of val where no folders or lists make splits; note how many they are."""
        chosen = rule.choose_val(names)
        if chosen:
            self.division = (
                f"{len(names)} images and no folders for splits: by a hash of their names "
                f"{len(chosen)} are val and {len(names) - len(chosen)} train"
            )
        elif names:
            self.undivided = f"{len(names)} image(s) and no folders for splits, so all are train"
        return chosen

    def explain_no_images(self) -> str:
        """Return the end of the message about a split without images: where they may be."""
        return elsewhere(self.root, self.marker) if self.marker else ""

    def explain_no_labels(self, *, of_all: bool) -> str:
        """Return the end of the message about images without labels: where they may be."""
        return self.missing_hint

    def explain_value(self, labels: np.ndarray) -> str:
        """Return the end of the message about a value of labels (H, W) that has no meaning."""
        return self.value_hint

    def label_map(self) -> Mapping[int, int]:
        """Return value on disk -> class or ignored, of the table; other values are errors."""
        return self.values or in_order(len(self.classes))

    def labels_of(self, item: Item) -> np.ndarray:
        """Read the label of a pair that has one as whole numbers, (H, W), uint8 or uint16."""
        return read_labels(Path(str(item.mask)), max_pixels=self.reading.max_pixels)

    def __len__(self) -> int:
        return len(self.items)

    def join(self, others: Sequence["FileDataset"]) -> None:
        """Append the samples of other data sets of this class and these settings.

        In messages the names of their items begin with their folder and split.
        """
        places = [f"{other.root}/{other.split}/" for other in others]
        self.parts = (self, *others)
        self.items = JoinedItems([part.items for part in self.parts], ["", *places])
        for place, other in zip(places, others, strict=True):
            self.notes += [f"{place}: {note}" for note in other.notes]
        self.expected = dict.fromkeys(self.expected, ())  # type: ignore[misc]  # no longer

    def locate(self, index: int) -> tuple["FileDataset", int]:
        """Return the part that holds a sample, and the index there."""
        if not isinstance(self.items, JoinedItems):
            return self, index
        part, index = self.items.locate(index)
        return self.parts[part], index

    def fingerprint(self) -> str:
        """Return a text that identifies the samples of the split by number and names."""
        return f"{super().fingerprint()}, {self.items.fingerprint()}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Read one pair; the mask is all ignored in a split without labels."""
        part, place = self.locate(index)
        if part is not self:
            return *part.read(place)[:2], self.items[index].name
        item = self.items[index]
        if self._cache is None:
            image, mask = self._decode(item)
        else:
            image, mask = self._cache.read(item.image, item.mask, partial(self._decode, item))
        if mask is None:
            ignored = ignore_index(len(self.classes))
            mask = np.full(image.shape[:2], ignored, np.min_scalar_type(ignored))
        return image, mask, item.name

    def _decode(self, item: Item) -> tuple[np.ndarray, np.ndarray | None]:
        reading = self.reading
        image, missing = read_bands(Path(item.image), reading.bands, max_pixels=reading.max_pixels)
        if item.mask is None:
            return image, None
        labels = self.labels_of(item)
        if image.shape[:2] != labels.shape:
            remedy = (
                f"; if an EXIF tag makes viewers turn the image to {_size(labels)}, that is not "
                "done here: images are read as their pixels lie, so turn the image file or its "
                "label"
                if image.shape[1::-1] == labels.shape
                else "; resize the label by nearest neighbour, if both show the same, or replace it"
            )
            raise InputError(
                f"{item.mask}: the label is {_size(labels)} and its image {item.image} is "
                f"{_size(image)} (width x height); they must be equal{remedy}"
            )
        mask = self.map_labels(labels, Path(item.mask))
        if missing is not None:
            mask[missing.all(axis=2)] = ignore_index(len(self.classes))
        return image, mask

    def decoding(self) -> bytes:
        """Return a text of all that decides what a pair is decoded to, besides its files."""
        # Any other attribute may change how labels are mapped; one too many does no harm.
        own = ("split", "transform", "reading", "root", "items", "parts", "notes", "expected")
        settings = {k: v for k, v in vars(self).items() if k not in own and k != "_cache"}
        settings |= {"bands": bands} if (bands := self.reading.bands) else {}
        return pickle.dumps((type(self).__module__, type(self).__qualname__, settings))

    def map_labels(self, labels: np.ndarray, path: Path) -> np.ndarray:
        """Map values on disk (H, W) to class indices; an unknown value is an error."""
        mapped, ignored = self._table.take(labels), ignore_index(len(self.classes))  # (H, W), ()
        if mapped.max(initial=0) > ignored:
            unknown = mapped > ignored
            value = int(labels[unknown][0])
            row, column = (int(i[0]) for i in np.nonzero(unknown & (labels == value)))
            raise InputError(
                f"{path}: label value {value} on {int((labels == value).sum())} pixels, first at "
                f"row {row}, column {column}; {self} has {len(self.classes)} classes, with values "
                f"{ranges(sorted(self.label_map()))}{self.explain_value(labels)}"
            )
        return mapped.astype(np.min_scalar_type(ignored))  # uint8 or uint16


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"
