"""COCO-Stuff: 171 kinds of things and stuff in everyday scenes, as 10k and as 164k pictures.

Both have one list of ids: 1..91 are things and 92..182 stuff; 11 of the things were never
annotated. The 171 others in ascending order are the classes. Caesar et al., COCO-Stuff: Thing and
stuff classes in context, CVPR 2018.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from danet.datasets.base import FileDataset, Item
from danet.datasets.formats.matlab import read_mat_labels
from danet.datasets.labels import in_order
from danet.datasets.layout import pair_files
from danet.datasets.lists import find_list
from danet.errors import InputError

# Version 1.0 of the 10k has this many names and other ids: 1 is unlabeled, 2..81 are things.
_NAMES_OF_V1_0 = 172


class CocoStuff10k(FileDataset, published="coco_stuff_10k"):
    """Reads ``images``, ``annotations`` (.mat) and ``imageLists`` of cocostuff-10k-v1.1.

    The field S of a .mat file holds the ids; 0 is unlabeled and ignored. 9,000 pictures are for
    training and 1,000, the split "test", for scoring.
    """

    def find_items(self) -> list[Item]:
        """Return the pictures that the list of the split names."""
        images = self.root / "images"
        known, _ = pair_files(images, self.root / "annotations", ("*", "*.mat"))
        own = self.root / "imageLists" / f"{self.split}.txt"
        items, self.notes = find_list([own], "cocostuff10k", self.split).pairs(known, images)
        return items

    def labels_of(self, item: Item) -> np.ndarray:
        """Read the field S, (H, W), uint8 or uint16; raise InputError for version 1.0."""
        limit = self.reading.max_pixels
        labels, sizes = read_mat_labels(Path(str(item.mask)), "S", max_pixels=limit)
        if sizes.get("names") == _NAMES_OF_V1_0:
            raise InputError(
                f"{item.mask}: a label of COCO-Stuff 10k version 1.0, whose {_NAMES_OF_V1_0} names "
                "have other numbers; take cocostuff-10k-v1.1.zip"
            )
        return labels


@dataclass(kw_only=True, eq=False, repr=False)
class CocoStuff164k(FileDataset, published="coco_stuff_164k"):
    """Reads ``images/{train,val}2017`` and the PNGs of the same name in ``annotations``.

    A PNG of stuffthingmaps_trainval2017.zip holds the id - 1, and 255 for unlabeled: "person", id
    1, is 0. All pictures of the folders are used.

    Args:
        root, split, transform, reading: As in FileDataset.
        labels: "ids" for the PNGs as published; "train_ids" for <name>_labelTrainIds.png, which
            mmsegmentation writes beside them, with 0..170 and 255.
    """

    labels: Literal["ids", "train_ids"] = "ids"

    def label_map(self) -> Mapping[int, int]:
        """Return id - 1 -> class, or with "train_ids" the classes themselves; 255 -> IGNORE."""
        if self.labels == "train_ids":
            return in_order(len(self.classes))
        # The bytes wrap around: 0, unlabeled, becomes 255.
        return {(value - 1) % 256: index for value, index in super().label_map().items()}

    def find_items(self) -> list[Item]:
        """Return every picture of the split with the PNG of the same name."""
        images, labels = (self.root / f / f"{self.split}2017" for f in ("images", "annotations"))
        suffix = "_labelTrainIds.png" if self.labels == "train_ids" else ".png"
        return list(pair_files(images, labels, ("*", f"*{suffix}"))[0].values())
