"""ADE20K in the form of the scene parsing challenge: ADEChallengeData2016, 150 classes."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from danet.datasets.base import FileDataset, Item
from danet.datasets.hints import is_coloured
from danet.datasets.labels import read_class_table
from danet.datasets.listing import find_files
from danet.datasets.submission import Submission
from danet.errors import InputError

_TABLE = read_class_table("ade20k")
_FOLDERS = {"train": "training", "val": "validation", "test": "testing"}
_FULL_RELEASE = (
    "the full ADE20K release colours its labels by 3,000 kinds of objects and is another task; "
    "expected ADEChallengeData2016.zip, whose labels have one channel with 0..150"
)


class ADE20K(FileDataset):
    """Reads ``images/{training,validation}`` and the PNGs of the same name in ``annotations``.

    A PNG holds 0 for everything outside the 150 classes, which is ignored, and 1..150. Zhou et al.,
    Scene parsing through ADE20K dataset, CVPR 2017.
    """

    classes = _TABLE.classes
    palette = _TABLE.palette
    expected = {"train": (20210,), "val": (2000,)}
    marker = "images/training"
    label_hint = "; ADEChallengeData2016 has 0 for other things and 1..150"
    layout = (
        "  [ADEChallengeData2016/]images/{training,validation}/ADE_{train,val}_<8 digits>.jpg\n"
        "  [ADEChallengeData2016/]annotations/{training,validation}/<the same>.png"
    )

    def label_map(self) -> Mapping[int, int]:
        """Return 0 -> IGNORE and 1..150 -> 0..149."""
        return _TABLE.label_map

    def find_items(self) -> list[Item]:
        """Return every picture of the split; those of the challenge's test set have no label."""
        base = self.root / "ADEChallengeData2016"
        base = base if base.is_dir() else self.root
        images = base / "images" / _FOLDERS[self.split]
        labels = base / "annotations" / _FOLDERS[self.split]
        names = find_files(images, {".jpg"})
        # Bounded, since a root may be any folder, and this only improves a message.
        if not names and any(p.match("*_seg.png") for p in islice(self.root.rglob("*"), 20000)):
            raise InputError(f"{self}: {self.root} holds labels named *_seg.png; {_FULL_RELEASE}")
        items = []
        for name in names:
            stem = name.rpartition(".")[0]
            label = None if self.split == "test" else str(labels / f"{stem}.png")
            items.append(Item(str(images / name), label, stem))
        return items

    def decode_labels(self, path: Path) -> np.ndarray:
        """Read a PNG as uint8 (H, W), 0..150.

        Raises:
            InputError: Not one channel; with an explanation for the files of the full release.
        """
        try:
            return super().decode_labels(path)
        except InputError as error:
            if is_coloured(path):
                raise InputError(f"{path}: a colour picture; {_FULL_RELEASE}") from error
            raise

    def submission(self) -> Submission:
        """Return the format of the challenge's server: PNGs with 1..150, named as the pictures."""
        values = {index: value for value, index in self.label_map().items() if value}
        return Submission(values=[values[i] for i in range(len(self.classes))])
