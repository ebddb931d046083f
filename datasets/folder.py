"""Anybody's own pictures: a folder of images, a folder of masks, a list of class names."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from danet.datasets.base import FileDataset, Item, Reading, Transform
from danet.datasets.formats.color_masks import LabelFormat
from danet.datasets.labels import check_class_names, check_colors, default_palette, read_class_file
from danet.datasets.layout import PairLayout, pair_files
from danet.datasets.listing import find_files
from danet.datasets.lists import UNSCORED, SplitRule
from danet.datasets.near_misses import suggest
from danet.datasets.reading import as_dataclass


class Folder(FileDataset, published="folder"):
    """Reads a folder of images and one of masks, with or without folders for the splits.

    A mask has the name of its image, with ``mask_suffix`` in the place of the image's suffix.
    ``lists`` name the pictures of each split; else folders train, val and test do (or training,
    valid, validation, dev, testing, in any case) inside both folders or around both; else
    ``val_share`` of the images, rounded and at least one, are the split "val" and the others
    "train", in the order of a hash of their names.

    Args:
        root, split, transform, reading: As in FileDataset.
        classes: K names, or a file of names, see ``labels.read_class_file``; the position is the
            class index.
        palette: K RGB colours for drawing; when None, those of the masks or ``default_palette``.
        label_format, files, split_rule: What masks hold, where the files are, and how splits are
            made; the fields, or a mapping of them, as configs have it.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        split: str,
        classes: Sequence[str] | str,
        palette: Sequence[Sequence[int]] | None = None,
        label_format: LabelFormat | Mapping[str, Any] | None = None,
        files: PairLayout | Mapping[str, Any] | None = None,
        split_rule: SplitRule | Mapping[str, Any] | None = None,
        transform: Transform | None = None,
        reading: Reading | None = None,
    ) -> None:
        names = read_class_file(classes).names if isinstance(classes, str) else classes
        check_class_names(names)
        self.classes = tuple(names)  # type: ignore[misc]  # of this data set alone
        self.labels = as_dataclass(LabelFormat, label_format).for_classes(len(names))
        self.files = as_dataclass(PairLayout, files)
        self.split_rule = as_dataclass(SplitRule, split_rule)
        drawn = palette or self.labels.colors or default_palette(names)
        self.palette = check_colors(drawn, "data.palette", len(names))  # type: ignore[misc]
        is_root = Path(self.files.images_dir) == Path()
        self.marker = "" if is_root else self.files.images_dir  # type: ignore[misc]
        super().__init__(
            root=Path(root), split=split, transform=transform, reading=reading or Reading()
        )

    def label_map(self) -> Mapping[int, int]:
        """Return value in the masks -> class or ignored."""
        return self.labels.label_map(len(self.classes))

    def labels_of(self, item: Item) -> np.ndarray:
        """Read numbers, or colours where ``colors`` gives their meaning, or an array file."""
        return self.labels.read(Path(str(item.mask)), len(self.classes), self.reading.max_pixels)[0]

    def count_unlisted(self, item: Item) -> int:
        """Return how many pixels of a mask have a class because of ``nearest`` alone."""
        return self.labels.read(Path(str(item.mask)), len(self.classes), self.reading.max_pixels)[1]

    def fingerprint(self) -> str:
        """Return a text that identifies the samples of the split."""
        return super().fingerprint() + ", nearest values" * bool(self.labels.nearest)

    def explain_value(self, labels: np.ndarray) -> str:
        """Return which setting gives a value of labels (H, W) a meaning."""
        return self.labels.explain(labels, len(self.classes))

    def find_items(self) -> list[Item]:
        """Return the pictures of the split with the masks of the same relative names."""
        rule, splits = self.split_rule, tuple(self.expected)
        if rule.lists:
            items, self.notes = rule.read_items(self.split, splits, self.root, self.files)
            return items
        if places := self.files.split_folders(self.root):
            return self._pair_folders(*places[self.split]) if self.split in places else []
        items = self._pair_folders(*self.files.folders(self.root))
        chosen = self.divide([item.name for item in items], rule)
        return [i for i in items if self.split == ("val" if i.name in chosen else "train")]

    def _pair_folders(self, images: Path, masks: Path) -> list[Item]:
        """Return all pictures of a folder with their masks, whether or not those exist."""
        items, self.notes = pair_files(images, masks, self.files.patterns)
        if self.notes:
            pair = (os.path.relpath(f"{path}/<name>", self.root) for path in (images, masks))
            self.missing_hint = (
                f"; {self.notes[0]}: give them the names of their images, or name pairs in "
                f"data.lists, a line each: {' '.join(pair)}"
            )
        return list(items.values())

    def explain_no_labels(self, *, of_all: bool) -> str:
        """Return which settings find labels, or which label files are of no image."""
        return suggest(self.root, self.files, self.missing_hint) if of_all else self.missing_hint

    def explain_no_images(self) -> str:
        """Return why a split has no images, and which setting may be meant."""
        if self.undivided:
            return f": {self.undivided}"
        places = self.files.split_folders(self.root)
        folders = [path for path, _ in places.values()] or [self.files.folders(self.root)[0]]
        counts = {path: len(find_files(path)) for path in folders}
        if any(counts.values()):
            there = ", ".join(f"{path} has {count}" for path, count in counts.items())
            training = (
                "; a training divides a folder that data.images_dir and data.masks_dir name by a "
                f"hash of the names{UNSCORED}"
            ) * (self.split == "val")
            take = "is {}; take it" if len(places) == 1 else "are {}; take one of them"
            splits = take.format(" and ".join(places or ("train", "val")))
            return f": {there}; there {splits}, or data.root=<folder with {self.split}>{training}"
        return super().explain_no_images() or suggest(self.root, self.files)
