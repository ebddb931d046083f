"""Cityscapes: 5,000 street scenes of 2048x1024 with fine labels and 20,000 with coarse ones."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from danet.datasets.base import FileDataset, Item, Reading, Transform, check_choice
from danet.datasets.image_io import read_labels
from danet.datasets.labels import read_class_table
from danet.datasets.listing import find_files
from danet.datasets.submission import Submission
from danet.errors import InputError
from danet.evaluation.cityscapes import Label, OfficialScorer, OfficialScores

_TABLE = read_class_table("cityscapes")
_FOLDERS = {"trainval": ("train", "val")}  # split -> folders, where they are not the split itself
_SUFFIX = "_leftImg8bit.png"
_FILES = {"ids": "labelIds", "train_ids": "labelTrainIds"}

Annotation = Literal["fine", "coarse"]
Labels = Literal["ids", "train_ids"]

# All labels, as the official scores need them.
LABELS = tuple(
    Label(
        id=row["id"],
        name=row["name"],
        category=row["category"],
        is_ignored=row["ignore_in_eval"],
        average_size=row.get("average_instance_size"),
    )
    for row in json.loads((Path(__file__).parent / "tables" / "cityscapes.json").read_text())
)

# Class index 0..18 -> label id: the 19 evaluated labels, no others.
LABEL_IDS = tuple(next(x.id for x in LABELS if x.name == name) for name in _TABLE.classes)


class Cityscapes(FileDataset):
    """Reads ``leftImg8bit`` and ``gtFine`` or ``gtCoarse`` as the publisher ships them.

    Labels are the ``labelIds`` files of the download, 0..33, of which 19 are classes and the others
    are ignored. The label files of the split "test" are dummies and are not read. Cordts et
    al., The Cityscapes Dataset for semantic urban scene understanding, CVPR 2016.

    Args:
        root, split, transform, reading: As in FileDataset.
        annotation: The fine or the coarse labels; train_extra has coarse ones only and gets them.
        labels: Files of label ids, or those of train ids that csCreateTrainIdLabelImgs makes.
    """

    classes = _TABLE.classes
    palette = _TABLE.palette
    splits = ("train", "val", "trainval", "train_extra", "test")
    expected = {
        "train": (2975,),
        "val": (500,),
        "trainval": (3475,),
        "train_extra": (19998, 19997),  # one image of the download is said to be damaged
        "test": (1525,),
    }
    marker = "leftImg8bit"
    label_hint = (
        "; data.labels says which files are read: ids, *_labelIds.png with 0..33, or train_ids, "
        "*_labelTrainIds.png with 0..18 and 255"
    )
    layout = (
        "  leftImg8bit/{train,val,test,train_extra}/<city>/<city>_<seq>_<frame>_leftImg8bit.png\n"
        "  gtFine/{train,val}/<city>/<city>_<seq>_<frame>_gtFine_labelIds.png\n"
        "  gtCoarse/{train,val,train_extra}/<city>/<city>_<seq>_<frame>_gtCoarse_labelIds.png"
    )

    def __init__(
        self,
        *,
        root: str | Path,
        split: str,
        annotation: Annotation = "fine",
        labels: Labels = "ids",
        transform: Transform | None = None,
        reading: Reading | None = None,
    ) -> None:
        check_choice("annotation", annotation, Annotation)
        check_choice("labels", labels, Labels)
        self.annotation = "coarse" if split == "train_extra" else annotation
        self.labels = labels
        super().__init__(root=root, split=split, transform=transform, reading=reading)

    def label_map(self) -> Mapping[int, int]:
        """Return label id or train id -> class or IGNORE."""
        if self.labels == "train_ids":
            return super().label_map()
        # A label with a negative id (license plate) is not drawn: its pixels belong to the car.
        return {value: index for value, index in _TABLE.label_map.items() if value >= 0}

    def find_items(self) -> list[Item]:
        """Return every image of the split's cities with its label file."""
        items = []
        for folder in _FOLDERS.get(self.split, (self.split,)):
            images = self.root / "leftImg8bit" / folder
            for found in find_files(images, {".png"}):
                if found.endswith(_SUFFIX) and found.count("/") == 1:
                    name = found.partition("/")[2].removesuffix(_SUFFIX)
                    items.append(Item(f"{images}/{found}", self._label_of(images / found), name))
        if items and self.split != "test" and self.labels == "ids":
            self.notes.append(
                f"{self}: label ids become the {len(self.classes)} classes by a table; files "
                "of train ids are not needed"
            )
        return items

    def explain_no_label(self) -> str:
        """Return which files there are and which package holds them."""
        if self.labels == "train_ids":
            return (
                "; files of train ids are not in the download: leave data.labels=ids, which gives "
                "the same classes"
            )
        package = {"fine": "gtFine_trainvaltest.zip", "coarse": "gtCoarse.zip"}[self.annotation]
        return f"; unpack {package} into data.root"

    def _label_of(self, image: Path, kind: str | None = None) -> str | None:
        """Return the path of the label file, or of another ``kind`` of file beside it."""
        if self.split == "test":
            return None
        truth = "gtFine" if self.annotation == "fine" else "gtCoarse"
        split, city = image.parts[-3:-1]
        name = image.name.removesuffix(_SUFFIX)
        kind = kind or _FILES[self.labels]
        return str(self.root / truth / split / city / f"{name}_{truth}_{kind}.png")

    def instance_path(self, item: Item) -> str | None:
        """Return the path of the file of instance ids of an image; None in the split "test"."""
        return self._label_of(Path(item.image), "instanceIds")

    def submission(self) -> Submission:
        """Return the format of the benchmark's server: label ids, not classes, in a zip."""
        return Submission(values=LABEL_IDS, pattern="{name}_pred_labelIds.png")

    def official_counter(self) -> "CityscapesCounter":
        """Return a counter for the benchmark's further scores."""
        return CityscapesCounter(self)


class CityscapesCounter:
    """Counts for the scores of the benchmark's own script, beyond the confusion matrix.

    Args:
        dataset: The split that is scored.
    """

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
        self._scorer.matrix[:] = 0
        self._scorer.update_classes(matrix, LABEL_IDS)
        return self._scorer.scores(with_instances=not self.note)
