"""Anybody's own pictures: a folder of images, a folder of masks, a list of class names."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from danet.datasets.base import IMAGE_SUFFIXES, FileDataset, Item, Reading, Transform
from danet.datasets.labels import Color, voc_palette
from danet.errors import InputError
from danet.types import IGNORE, MAX_CLASSES


class Folder(FileDataset):
    """Reads ``images/`` and ``masks/``, with or without a folder per split in each.

    A mask has the name of its image with the suffix .png, and holds class indices (grey or palette
    PNG). Without folders per split, ``val_share`` of the images, chosen by a hash of the name so
    that the choice never changes, is the split "val" and the others are "train".

    Args:
        root, split, transform, reading: As in FileDataset.
        classes: K names; the position is the class index.
        palette: K RGB colours; drawn by the rule of PASCAL VOC when None.
        values: Value in the masks -> class index, for masks that hold other values; a value that
            is mapped to 255, and 255 itself, is ignored.
        val_share: Of a folder without splits, 0..1.
    """

    label_hint = "; classes count from 0; other values are mapped with data.values={0:0,255:1}"
    layout = (
        "  images/train/<name>.jpg  images/val/<name>.jpg      or   images/<name>.jpg\n"
        "  masks/train/<name>.png   masks/val/<name>.png            masks/<name>.png"
    )

    def __init__(
        self,
        *,
        root: str | Path,
        split: str,
        classes: Sequence[str],
        palette: Sequence[Sequence[int]] | None = None,
        values: Mapping[int, int] | None = None,
        val_share: float = 0.2,
        transform: Transform | None = None,
        reading: Reading | None = None,
    ) -> None:
        self.classes = tuple(classes)
        if not 2 <= len(self.classes) <= MAX_CLASSES:
            raise InputError(
                f"data.classes: {len(self.classes)} names, expected 2 to {MAX_CLASSES}; "
                "for one kind of object write [background, object]"
            )
        twice = {name for name in self.classes if self.classes.count(name) > 1}
        if twice:
            raise InputError(f"data.classes: the name {min(twice)!r} stands there twice")
        if palette is not None and len(palette) != len(self.classes):
            raise InputError(
                f"data.palette: {len(palette)} colours for {len(self.classes)} class names"
            )
        if not 0 < val_share < 1:
            raise InputError(f"data.val_share={val_share} is not between 0 and 1")
        self.palette = tuple(_color(c) for c in palette) if palette else voc_palette(len(classes))
        self.values = dict(values) if values else None
        self.val_share = val_share
        super().__init__(root=root, split=split, transform=transform, reading=reading)

    def label_map(self) -> Mapping[int, int]:
        """Returns ``values`` as given, or the identity; 255 is IGNORE unless mapped."""
        if self.values is None:
            return super().label_map()
        return {IGNORE: IGNORE, **self.values}

    def find_items(self) -> list[Item]:
        """Returns every picture below ``images`` with the mask of the same relative name."""
        images, masks = self.root / "images", self.root / "masks"
        has_splits = any((images / split).is_dir() for split in self.splits)
        if has_splits:
            images, masks = images / self.split, masks / self.split
        items = []
        for path in sorted(images.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                relative = path.relative_to(images).with_suffix("")
                items.append(Item(str(path), str(masks / f"{relative}.png"), relative.as_posix()))
        if has_splits:
            return items
        if self.split == "test":
            raise InputError(f"{self}: {images} has no folder for the split 'test'")
        return [item for item in items if self._is_val(item.name) == (self.split == "val")]

    def _is_val(self, name: str) -> bool:
        digest = hashlib.sha256(name.encode()).digest()
        return int.from_bytes(digest[:4], "big") < self.val_share * 2**32


def _color(values: Sequence[int]) -> Color:
    if len(values) != 3 or not all(0 <= v <= 255 for v in values):
        raise InputError(f"data.palette: {list(values)} is not three numbers 0..255")
    return values[0], values[1], values[2]
