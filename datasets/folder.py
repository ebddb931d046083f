"""Anybody's own pictures: a folder of images, a folder of masks, a list of class names."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from danet.datasets.base import FileDataset, Item, Reading, Transform
from danet.datasets.formats.color_masks import ColorTable, LabelFormat, read_array, read_colors
from danet.datasets.labels import (
    ClassFile,
    check_class_names,
    check_colors,
    read_class_file,
    voc_palette,
)
from danet.datasets.layout import PairLayout, folder_settings
from danet.datasets.listing import find_files, unused_note
from danet.datasets.lists import SplitRule
from danet.errors import InputError

_Group = TypeVar("_Group")


class Folder(FileDataset):
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
        palette: K RGB colours for drawing; those of the masks, else of PASCAL VOC, when None.
        label_format, files, split_rule: What masks hold, where the files are, and how splits are
            made; the fields, or a mapping of them, as configs have it.

    Attributes:
        division: A note on a division by a hash of the names; empty where there is none.
    """

    layout = (
        "  images/train/<name>.jpg  images/val/<name>.jpg      or   images/<name>.jpg\n"
        "  masks/train/<name>.png   masks/val/<name>.png            masks/<name>.png\n"
        "  (or train/images, train/masks, ...; data.images_dir, data.masks_dir and "
        "data.mask_suffix name other places)"
    )

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
        named = read_class_file(classes) if isinstance(classes, str) else ClassFile(list(classes))
        self.classes = tuple(named.names)
        check_class_names(self.classes)
        self.labels = _group(LabelFormat, label_format).for_classes(named)
        self.files = _group(PairLayout, files)
        self.split_rule = _group(SplitRule, split_rule)
        self._color_table = ColorTable(self.labels.colors or (), self.labels.ignore_colors or ())
        drawn, count = palette or self.labels.colors, len(self.classes)
        self.palette = check_colors(drawn, count, "data.palette") if drawn else voc_palette(count)
        images_dir = self.files.images_dir
        self.marker = "" if Path(images_dir) == Path() else images_dir
        self.division = ""
        self._unused: list[str] = []
        self._masks = Path()
        super().__init__(root=root, split=split, transform=transform, reading=reading)

    def label_map(self) -> Mapping[int, int]:
        """Return value in the masks -> class or IGNORE."""
        return self.labels.label_map(len(self.classes))

    def decode_labels(self, path: Path) -> np.ndarray:
        """Read numbers, or colours where ``colors`` gives their meaning, or an array file."""
        if path.suffix.lower() == ".npy":
            return read_array(path)
        if not self.labels.colors:
            return super().decode_labels(path)
        pixels = read_colors(path, max_pixels=self.reading.max_pixels)
        return self._color_table.decode(pixels, path)

    @property
    def label_hint(self) -> str:  # type: ignore[override]
        """What to do about a value without meaning."""
        return self.labels.hint

    def find_items(self) -> list[Item]:
        """Return the pictures of the split with the masks of the same relative names."""
        if self.split_rule.lists:
            items, notes = self.split_rule.read_items(
                self.split, self.splits, self.root, self.files
            )
            self.notes += notes
            return items
        places = self.files.split_folders(self.root)
        if places:
            return self._pair_folders(*places[self.split]) if self.split in places else []
        images, masks = self.files.folders(self.root)
        if self.split == "test":
            raise InputError(f"{self}: {images} has no folder for the split 'test'")
        items = self._pair_folders(images, masks)
        chosen = self.split_rule.choose_val([item.name for item in items])
        if items:
            self.division = (
                f"{len(items)} images and no folders for splits: by a hash of their names "
                f"{len(chosen)} are val and {len(items) - len(chosen)} train; images that are "
                "added may move some, and lists freeze them: tools/check_data.py writes both"
            )
        return [item for item in items if (item.name in chosen) == (self.split == "val")]

    def _pair_folders(self, images: Path, masks: Path) -> list[Item]:
        """Return all pictures of a folder with their masks, whether or not those exist."""
        items = list(self.files.pairs(images, masks).values())
        first = {item.name: item for item in items}
        for item in items:
            if first[item.name] is not item:
                raise InputError(
                    f"{item.image} and {first[item.name].image} would share the mask {item.mask}: "
                    "names must differ in more than their suffix"
                )
        self._masks = masks
        used = {item.mask for item in items}
        if images != masks:
            found = self.files.find_masks(masks).values()
            self._unused = [name for name in found if f"{masks}/{name}" not in used]
            self.notes += unused_note(masks, self._unused)
        return items

    def explain_no_images(self) -> str:
        """Return why a split has no images, and which setting may be meant."""
        if self.split_rule.lists:
            return ""
        if places := self.files.split_folders(self.root):
            if self.split in places:
                return f": {places[self.split][0]} has none"
            first = next(iter(places))
            images, masks = (path.relative_to(self.root).as_posix() for path in places[first])
            there = ", ".join(str(path.relative_to(self.root)) for path, _ in places.values())
            return (
                f", which has {there}: add one for {self.split}, or divide {images} by a hash of "
                f"the names with {folder_settings(images, masks)}"
            )
        folder, _ = self.files.folders(self.root)
        if folder.is_dir() and (count := len(find_files(folder))):
            return f": {count} image was found, and two splits need two or more"
        return self.files.suggest_folders(self.root) or super().explain_no_images()

    def explain_no_label(self) -> str:
        """Return the names of label files without an image, or a folder that may have masks."""
        if self.split_rule.lists:
            return ""
        if not self._unused:
            has_images = self.files.folders(self.root)[0].is_dir()
            parent = self.root if has_images else self._masks.parent
            has_masks = self.files.folders(parent)[1].is_dir()
            return "" if has_masks else self.files.suggest_folders(parent)
        image = self.items[self.items.without_label()[0]].image
        pair = (os.path.relpath(path, self.root) for path in (image, self._masks / "<its mask>"))
        return (
            f"; {self._masks} has {', '.join(self._unused[:3])}: give them the names of their "
            f"images, or name pairs in data.lists, a line each: {' '.join(pair)}"
        )


def _group(kind: type[_Group], settings: _Group | Mapping[str, Any] | None) -> _Group:
    """Return settings as their dataclass; configs give them as plain mappings."""
    return settings if isinstance(settings, kind) else kind(**(settings or {}))  # type: ignore[arg-type]
