"""Cityscapes: 5,000 street scenes of 2048x1024 with fine labels and 20,000 with coarse ones."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from danet.datasets.base import FileDataset, Item
from danet.datasets.image_io import read_labels
from danet.datasets.labels import TABLES, in_order
from danet.datasets.listing import find_files
from danet.datasets.submission import Submission
from danet.errors import InputError
from danet.evaluation.cityscapes import Label, OfficialScorer, OfficialScores

_SUFFIX = "_leftImg8bit.png"
_LABELS = {"ids": "_labelIds.png", "train_ids": "_labelTrainIds.png"}

# All labels, as the official scores need them.
LABELS = tuple(
    Label(r["id"], r["name"], r["category"], r["ignore_in_eval"], r.get("average_instance_size"))
    for r in json.loads((TABLES / "cityscapes.json").read_text())
)

# Class index 0..18 -> label id: the 19 evaluated labels, no others.
LABEL_IDS = tuple(label.id for label in LABELS if not label.is_ignored)


@dataclass(kw_only=True, eq=False, repr=False)
class Cityscapes(FileDataset, published="cityscapes"):
    """Reads ``leftImg8bit`` and ``gtFine`` or ``gtCoarse`` as the publisher ships them.

    Labels are the ``labelIds`` files of the download, 0..33, of which 19 are classes and the others
    are ignored. The label files of the split "test" are dummies and are not read. Cordts et
    al., The Cityscapes Dataset for semantic urban scene understanding, CVPR 2016.

    Args:
        root, split, transform, reading: As in FileDataset.
        annotation: The fine or the coarse labels; train_extra has coarse ones only and gets them.
        labels: Files of label ids, or those of train ids that csCreateTrainIdLabelImgs makes.
    """

    annotation: Literal["fine", "coarse"] = "fine"
    labels: Literal["ids", "train_ids"] = "ids"

    def __post_init__(self) -> None:
        if self.split == "train_extra":
            self.annotation = "coarse"
        super().__post_init__()

    def label_map(self) -> Mapping[int, int]:
        """Return label id or train id -> class or IGNORE."""
        return in_order(len(LABEL_IDS)) if self.labels == "train_ids" else super().label_map()

    def find_items(self) -> list[Item]:
        """Return every image of the split's cities with its label file."""
        items = []
        truth = {"fine": "gtFine", "coarse": "gtCoarse"}[self.annotation]
        for split in ("train", "val") if self.split == "trainval" else (self.split,):
            images = self.root / "leftImg8bit" / split
            for found in find_files(images, {".png"}):
                place = f"{self.root}/{truth}/{split}/{found.removesuffix(_SUFFIX)}_{truth}"
                if found.endswith(_SUFFIX) and found.count("/") == 1:
                    name = found.partition("/")[2].removesuffix(_SUFFIX)
                    label = None if self.split == "test" else place + _LABELS[self.labels]
                    items.append(Item(f"{images}/{found}", label, name))
        if items and self.split != "test" and self.labels == "ids":
            self.notes.append(
                f"{self}: label ids become the {len(self.classes)} classes by a table; files "
                "of train ids are not needed"
            )
        return items

    def instance_path(self, item: Item) -> str | None:
        """Return the path of the file of instance ids of an image; None in the split "test"."""
        return item.mask and item.mask.removesuffix(_LABELS[self.labels]) + "_instanceIds.png"

    def submission(self) -> Submission:
        """Return the format of the benchmark's server: label ids, not classes, in a zip."""
        return Submission(values=LABEL_IDS, pattern="{name}_pred_labelIds.png")

    def official_counter(self) -> "CityscapesCounter":
        """Return a counter for the benchmark's further scores."""
        return CityscapesCounter(self)


class CityscapesCounter:
    """Counts for the scores of the benchmark's own script, beyond the confusion matrix."""

    def __init__(self, dataset: Cityscapes) -> None:
        self._scorer = OfficialScorer(LABELS)
        self._paths = {item.name: dataset.instance_path(item) for item in dataset.items}
        missing = sum(not path or not Path(path).exists() for path in self._paths.values())
        self.note = ""
        if dataset.annotation == "coarse":
            self.note = "iIoU is left out: it is defined for fine labels"
        elif missing:
            self.note = f"iIoU is left out: {missing} of {len(dataset)} images have no instanceIds"

    def update(self, prediction: np.ndarray, name: str) -> None:
        """Count the instances of the image ``name``, given its class indices, (H, W)."""
        path = self._paths[name]
        if self.note or path is None:
            return
        instances = read_labels(Path(path))
        try:
            self._scorer.update_instances(np.asarray(LABEL_IDS, np.uint8)[prediction], instances)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @property
    def counts(self) -> Tensor:
        """The counts, float64 (3, 34), a view: processes may add them up in place."""
        return torch.from_numpy(self._scorer.weighted)

    def scores(self, matrix: np.ndarray) -> OfficialScores:
        """Compute the scores from the confusion matrix of the classes, (19, 19)."""
        # It lacks pixels whose truth is ignored, which no score uses.
        self._scorer.matrix[np.ix_(LABEL_IDS, LABEL_IDS)] = matrix
        return self._scorer.scores(with_instances=not self.note)
