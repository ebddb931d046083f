"""COCO-Stuff: 171 kinds of things and stuff in everyday scenes, as 10k and as 164k pictures.

Both have one list of ids: 1..91 are things and 92..182 stuff; 11 of the things were never
annotated. The 171 others in ascending order are the classes. Caesar et al., COCO-Stuff: Thing and
stuff classes in context, CVPR 2018.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from danet.datasets.base import FileDataset, Item, Reading, Transform, check_choice
from danet.datasets.formats.matlab import open_mat, read_mat_labels
from danet.datasets.labels import read_class_table
from danet.datasets.listing import named_files
from danet.datasets.lists import find_list
from danet.errors import InputError
from danet.types import IGNORE

_TABLE = read_class_table("cocostuff171")
# Version 1.0 of the 10k has this many names and other ids: 1 is unlabeled, 2..81 are things.
_NAMES_OF_V1_0 = 172

Labels = Literal["ids", "train_ids"]


_REMOVED = (
    "; a .mat file of the 10k holds the id, 1..182, and 0 for unlabeled, a PNG of the 164k the id "
    "- 1; 11 of the ids were removed"
)


class CocoStuff10k(FileDataset):
    """Reads ``images``, ``annotations`` (.mat) and ``imageLists`` of cocostuff-10k-v1.1.

    The field S of a .mat file holds the ids; 0 is unlabeled and ignored. 9,000 pictures are for
    training and 1,000, the split "test", for scoring.
    """

    classes = _TABLE.classes
    palette = _TABLE.palette
    splits = ("train", "test")
    marker = "annotations"
    expected = {"train": (9000,), "test": (1000,)}
    label_hint = _REMOVED
    layout = (
        "  images/COCO_train2014_<12 digits>.jpg\n"
        "  annotations/COCO_train2014_<12 digits>.mat\n"
        "  imageLists/{train,test}.txt      (the lists of the package where these are missing)"
    )

    def label_map(self) -> Mapping[int, int]:
        """Return 0 -> IGNORE and the 171 ids -> 0..170."""
        return {0: IGNORE, **_TABLE.label_map}

    def find_items(self) -> list[Item]:
        """Return the pictures that the list of the split names."""
        own = self.root / "imageLists" / f"{self.split}.txt"
        listed = find_list([own], "cocostuff10k", self.split)
        self.notes += listed.notes
        labels = self.root / "annotations"
        images = named_files(self.root / "images", ".jpg")
        return listed.find(images, lambda name: f"{labels}/{name}.mat")

    def decode_labels(self, path: Path) -> np.ndarray:
        """Read the field S, (H, W), uint8 or uint16.

        Raises:
            InputError: Damaged, or a file of version 1.0.
        """
        mat = open_mat(path)
        if math.prod(mat.shapes.get("names", (0,))) == _NAMES_OF_V1_0:
            raise InputError(
                f"{path}: a label of COCO-Stuff 10k version 1.0, whose {_NAMES_OF_V1_0} names have "
                "other numbers; take cocostuff-10k-v1.1.zip"
            )
        return read_mat_labels(mat, "S", max_pixels=self.reading.max_pixels)


class CocoStuff164k(FileDataset):
    """Reads ``images/{train,val}2017`` and the PNGs of the same name in ``annotations``.

    A PNG of stuffthingmaps_trainval2017.zip holds the id - 1, and 255 for unlabeled: "person", id
    1, is 0. All pictures of the folders are used.

    Args:
        root, split, transform, reading: As in FileDataset.
        labels: "ids" for the PNGs as published; "train_ids" for <name>_labelTrainIds.png, which
            mmsegmentation writes beside them, with 0..170 and 255.
    """

    classes = _TABLE.classes
    palette = _TABLE.palette
    splits = ("train", "val")
    marker = "images/train2017"
    expected = {"train": (118287,), "val": (5000,)}
    label_hint = _REMOVED
    layout = (
        "  images/{train2017,val2017}/<12 digits>.jpg\n"
        "  annotations/{train2017,val2017}/<12 digits>.png      of stuffthingmaps_trainval2017.zip"
    )

    def __init__(
        self,
        *,
        root: str | Path,
        split: str,
        labels: Labels = "ids",
        transform: Transform | None = None,
        reading: Reading | None = None,
    ) -> None:
        check_choice("labels", labels, Labels)
        self.labels = labels
        super().__init__(root=root, split=split, transform=transform, reading=reading)

    def label_map(self) -> Mapping[int, int]:
        """Return id - 1 -> class, or with "train_ids" the classes themselves; 255 -> IGNORE."""
        if self.labels == "train_ids":
            return super().label_map()
        return {IGNORE: IGNORE, **{id_ - 1: train for id_, train in _TABLE.label_map.items()}}

    def find_items(self) -> list[Item]:
        """Return every picture of the split with the PNG of the same name."""
        images = self.root / "images" / f"{self.split}2017"
        labels = self.root / "annotations" / f"{self.split}2017"
        suffix = "_labelTrainIds.png" if self.labels == "train_ids" else ".png"
        found = named_files(images, ".jpg")
        return [Item(path, f"{labels}/{name}{suffix}", name) for name, path in found.items()]
