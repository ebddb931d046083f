"""Anybody's own pictures: a folder of images, a folder of masks, a list of class names."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from danet.datasets.base import FileDataset, Item, Reading, Transform
from danet.datasets.labels import (
    Color,
    check_class_names,
    check_color,
    read_class_names,
    voc_palette,
)
from danet.datasets.listing import IMAGE_SUFFIXES, find_files, unused_labels
from danet.datasets.lists import read_list
from danet.datasets.masks import ColorTable, read_array, read_colors
from danet.errors import InputError
from danet.types import IGNORE

_PAIR = re.compile(
    rf"(?P<image>.+?({'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))}))[\s,;]+(?P<mask>\S.*)",
    re.IGNORECASE,
)
"""A line of a list with two paths; both may hold blanks."""


_NAMED_OTHERWISE = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
"""Names that others give the folders of splits, in any case."""


class Folder(FileDataset):
    """Reads a folder of images and one of masks, with or without a folder per split in each.

    A mask has the name of its image, with ``mask_suffix`` in the place of the image's suffix.
    Which pictures belong to a split is told by ``lists``, else by folders train, val and test in
    both, else ``val_share`` of the images, chosen by a hash of the name so that the choice never
    changes, is the split "val" and the others are "train".

    Args:
        root, split, transform, reading: As in FileDataset.
        classes: K names, or a text file with one a line; the position is the class index.
        palette: K RGB colours for drawing; ``colors``, else those of PASCAL VOC, when None.
        colors: K RGB colours, for masks that are colour pictures; the position is the class index.
            Without, masks hold numbers, and colours of a palette image are not looked at.
        ignore_colors: More colours of such masks, for pixels that do not count.
        values: Value in the masks -> class index, for masks that hold other numbers; a value that
            is mapped to 255, and 255 itself, is ignored.
        labels_start_at: The number of the first class; the numbers below it are ignored.
        images_dir, masks_dir: Folders below root.
        mask_suffix: Ends the names of masks; with .npy they are arrays of whole numbers.
        lists: Split -> text file, from root on, with a picture a line: its name below images_dir,
            or the paths of image and mask from root on.
        allow_overlap: Whether a picture may stand in several lists.
        val_share: Of a folder without splits, 0..1.
    """

    label_hint = (
        "; classes count from 0; other values are mapped with data.values={0:0,255:1}, or with "
        "data.labels_start_at=1 where classes count from 1 and 0 is no class"
    )
    layout = (
        "  images/train/<name>.jpg  images/val/<name>.jpg      or   images/<name>.jpg\n"
        "  masks/train/<name>.png   masks/val/<name>.png            masks/<name>.png\n"
        "  (data.images_dir, data.masks_dir and data.mask_suffix name other places)"
    )

    def __init__(
        self,
        *,
        root: str | Path,
        split: str,
        classes: Sequence[str] | str,
        palette: Sequence[Sequence[int]] | None = None,
        colors: Sequence[Sequence[int]] | None = None,
        ignore_colors: Sequence[Sequence[int]] | None = None,
        values: Mapping[int, int] | None = None,
        labels_start_at: int = 0,
        images_dir: str = "images",
        masks_dir: str = "masks",
        mask_suffix: str = ".png",
        lists: Mapping[str, str] | None = None,
        allow_overlap: bool = False,
        val_share: float = 0.2,
        transform: Transform | None = None,
        reading: Reading | None = None,
    ) -> None:
        self.classes = tuple(read_class_names(classes))
        check_class_names(self.classes)
        meanings = {"colors": colors, "values": values, "labels_start_at": labels_start_at}
        given = [f"data.{key}" for key, value in meanings.items() if value]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} exclude each other: give one of them")
        if labels_start_at < 0:
            raise InputError(f"data.labels_start_at={labels_start_at}: expected 0 or more")
        if ignore_colors and not colors:
            raise InputError("data.ignore_colors is for masks of colours: give data.colors, too")
        if not 0 < val_share < 1:
            raise InputError(f"data.val_share={val_share} is not between 0 and 1")
        self.colors = self._colors_of(colors, "data.colors") if colors else ()
        self.ignore_colors = [check_color(c, "data.ignore_colors") for c in ignore_colors or ()]
        self._color_table = ColorTable(self.colors, self.ignore_colors)
        drawn = palette or colors
        self.palette = (
            self._colors_of(drawn, "data.palette") if drawn else voc_palette(len(self.classes))
        )
        self.values = dict(values) if values else None
        self.labels_start_at = labels_start_at
        self.images_dir, self.masks_dir, self.mask_suffix = images_dir, masks_dir, mask_suffix
        self.marker = images_dir
        self.lists = dict(lists) if lists else None
        self.allow_overlap = allow_overlap
        self.val_share = val_share
        super().__init__(root=root, split=split, transform=transform, reading=reading)

    def _colors_of(self, colors: Sequence[Sequence[int]], key: str) -> tuple[Color, ...]:
        if len(colors) != len(self.classes):
            raise InputError(f"{key}: {len(colors)} colours for {len(self.classes)} class names")
        return tuple(check_color(color, key) for color in colors)

    def label_map(self) -> Mapping[int, int]:
        """Returns ``values`` as given, or the classes in order; 255 is IGNORE unless mapped."""
        if self.values is not None:
            return {IGNORE: IGNORE, **self.values}
        first = self.labels_start_at
        below = dict.fromkeys(range(first), IGNORE)
        return {IGNORE: IGNORE, **below, **{first + i: i for i in range(len(self.classes))}}

    def decode_labels(self, path: Path) -> np.ndarray:
        """Reads numbers, or colours where ``colors`` says what they mean, or an array file."""
        if path.suffix.lower() == ".npy":
            return read_array(path)
        if not self.colors:
            return super().decode_labels(path)
        pixels = read_colors(path, max_pixels=self.reading.max_pixels)
        return self._color_table.decode(pixels, path)

    def find_items(self) -> list[Item]:
        """Returns the pictures of the split with the masks of the same relative names."""
        if self.lists is not None:
            return self._listed_items(self.lists)
        images, masks = self.root / self.images_dir, self.root / self.masks_dir
        has_splits = any((images / split).is_dir() for split in self.splits)
        if not has_splits and images.is_dir():
            below = (path.name for path in images.iterdir() if path.is_dir())
            alike = sorted(name for name in below if name.lower() in _NAMED_OTHERWISE)
            if alike:
                raise InputError(
                    f"{self}: {images} has {', '.join(alike)}, which look like splits; rename them "
                    f"to {', '.join(self.splits)} there and beside the masks, or give data.lists"
                )
        if has_splits:
            images, masks = images / self.split, masks / self.split
        elif self.split == "test":
            raise InputError(f"{self}: {images} has no folder for the split 'test'")
        found = find_files(images)
        if images == masks:
            found = [name for name in found if not name.endswith(self.mask_suffix)]
        items = [_item(images, masks, name, self.mask_suffix) for name in found]
        first = {item.name: item for item in items}
        for item in items:
            if first[item.name] is not item:
                raise InputError(
                    f"{item.image} and {first[item.name].image} would share the mask {item.mask}: "
                    "names must differ in more than their suffix"
                )
        if images != masks:
            self.notes += unused_labels(masks, self.mask_suffix, {item.mask for item in items})
        if has_splits:
            return items
        return [item for item in items if self._is_val(item.name) == (self.split == "val")]

    def _is_val(self, name: str) -> bool:
        digest = hashlib.sha256(name.encode()).digest()
        return int.from_bytes(digest[:4], "big") < self.val_share * 2**32

    def _listed_items(self, lists: Mapping[str, str]) -> list[Item]:
        """Returns the pictures of the list of this split, each once."""
        strange = sorted(set(lists) - set(self.splits))
        if strange or self.split not in lists:
            raise InputError(
                f"data.lists has the splits {', '.join(map(str, lists))}; expected some of "
                f"{', '.join(self.splits)}, and {self.split!r} is needed now"
            )
        below = find_files(self.root / self.images_dir)
        by_name = {name: name for name in below} | {_stem(name): name for name in below}
        needed = [self.split] if self.allow_overlap else list(lists)
        listed = {split: self._read_pairs(split, lists[split], by_name) for split in needed}
        _check_overlap(list(listed.values()))
        own = listed[self.split]
        items = {pair.item.image: pair.item for pair in own}
        if len(items) < len(own):
            counts = Counter(pair.item.image for pair in own)
            twice = [Path(image).name for image in items if counts[image] > 1]
            self.notes.append(
                f"{own[0].source}: {len(twice)} images stand there more than once and count once: "
                f"{', '.join(twice[:5])}"
            )
        return list(items.values())

    def _read_pairs(self, split: str, file: str, by_name: Mapping[str, str]) -> list["_Listed"]:
        """Reads a list; images must exist, masks are looked for later."""
        source = read_list(self.root / Path(file).expanduser())
        images, masks = self.root / self.images_dir, self.root / self.masks_dir
        pairs = []
        for line, number in source.entries:
            where = f"{source.path}, line {number}"
            two = _PAIR.fullmatch(line)
            if two:
                for part in (two["image"], two["mask"]):
                    if PurePosixPath(part).is_absolute() or ".." in PurePosixPath(part).parts:
                        raise InputError(f"{where}: the path {part!r} leaves {self.root}")
                image = self.root / two["image"]
                item = Item(str(image), str(self.root / two["mask"]), _stem(two["image"]))
                exists = image.is_file()
            else:
                exists = line in by_name
                item = _item(images, masks, by_name.get(line, line), self.mask_suffix)
            if not exists:
                raise InputError(f"{where} names {line!r}, but there is no image {item.image}")
            pairs.append(_Listed(item, split, source.path, number))
        return pairs


class _Listed(NamedTuple):
    """A pair and where it is named."""

    item: Item
    split: str
    source: Path
    line: int


def _check_overlap(lists: Sequence[Sequence[_Listed]]) -> None:
    """Refuses a picture in two lists: what is trained on must not be scored."""
    seen: dict[str, _Listed] = {}
    shared: dict[str, tuple[_Listed, _Listed]] = {}
    for pairs in lists:
        for pair in pairs:
            first = seen.setdefault(pair.item.image, pair)
            if first.split != pair.split:
                shared.setdefault(pair.item.image, (first, pair))
    if shared:
        one, other = next(iter(shared.values()))
        names = ", ".join(Path(image).name for image in list(shared)[:5])
        raise InputError(
            f"data.lists: {len(shared)} images stand in the lists of two splits: {names}; the "
            f"first in {one.source}, line {one.line}, and {other.source}, line {other.line}; "
            "data.allow_overlap=true allows it on purpose"
        )


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _item(images: Path, masks: Path, name: str, mask_suffix: str) -> Item:
    stem = _stem(name)
    return Item(f"{images}/{name}", f"{masks}/{stem}{mask_suffix}", stem)
