"""PASCAL Context: the pictures of VOC 2010 with a label for every pixel, 59 or 60 classes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from danet.datasets.base import FileDataset, Item, Reading, Transform, check_choice
from danet.datasets.formats.matlab import open_mat, read_mat_labels
from danet.datasets.formats.pascal_in_detail import DetailIndex, detail_index
from danet.datasets.labels import read_class_table
from danet.datasets.layout import first_folder
from danet.datasets.listing import named_files
from danet.datasets.lists import SplitList, find_list
from danet.errors import InputError

Labels = Literal["auto", "mat", "png", "json"]

# Form of the labels -> folder or file; "auto" tries them in this order.
_PLACES = {
    "mat": "trainval",
    "png": "SegmentationClassContext",
    "json": "trainval_merged.json",
}

# Places of VOC below ``data.root``: the folder that holds VOCdevkit, VOCdevkit, or VOC2010.
_DEVKITS = ("VOCdevkit/VOC2010", "VOC2010", ".")
# Kinds of objects in the original labels; those outside the 59 classes are background.
_NUM_IDS = 459


class PascalContext(FileDataset):
    """Reads VOC 2010's pictures and one of three forms of labels; background is ignored.

    The 59 classes are in the ascending order of the original ids, which is alphabetical, as in
    PyTorch-Encoding, DANet's code and mmsegmentation. Mottaghi et al., The role of context for
    object detection and semantic segmentation in the wild, CVPR 2014. 4,998 pictures are for
    training and 5,105 for scoring; the JSON of PASCAL in Detail counts 4,996 and 5,104.

    Args:
        root: The folder VOC2010, VOCdevkit, or the one above.
        split, transform, reading: As in FileDataset.
        labels: "mat": ``trainval/<id>.mat``, the original with ids 0..459. "png":
            ``SegmentationClassContext/<id>.png`` with 0..59, as mmsegmentation writes them. "json":
            ``trainval_merged.json`` of PASCAL in Detail. "auto" takes the first that is there.

    Attributes:
        labels: The form in use, never "auto".
    """

    table = read_class_table("context59")
    classes = table.classes
    palette = table.palette
    splits = ("train", "val")
    expected = {"train": (4998, 4996), "val": (5105, 5104)}
    marker = "JPEGImages"
    layout = (
        "  [VOCdevkit/VOC2010/]JPEGImages/<id>.jpg     of VOCtrainval_03-May-2010.tar, and one of\n"
        "  [VOCdevkit/VOC2010/]trainval/<id>.mat       or beside VOCdevkit\n"
        "  [VOCdevkit/VOC2010/]SegmentationClassContext/<id>.png\n"
        "  [VOCdevkit/VOC2010/]trainval_merged.json"
    )

    def __init__(
        self,
        *,
        root: str | Path,
        split: str,
        labels: Labels = "auto",
        transform: Transform | None = None,
        reading: Reading | None = None,
    ) -> None:
        check_choice("labels", labels, Labels)
        self.labels: str = labels
        self.index: DetailIndex | None = None
        super().__init__(root=root, split=split, transform=transform, reading=reading)

    def label_map(self) -> Mapping[int, int]:
        """Return value on disk -> class or background: 0..59 of a PNG, ids 0..459 otherwise."""
        ids = self.table.label_map
        if self.labels == "png":
            return dict(enumerate(ids[id_] for id_ in sorted(ids)))
        return {id_: ids.get(id_, ids[0]) for id_ in range(_NUM_IDS + 1)}

    def find_items(self) -> list[Item]:
        """Return the pictures of the split: named by the JSON, a list of the tree, or ours."""
        base = first_folder(self.root, _DEVKITS, self.marker) or self.root
        images = named_files(base / self.marker, ".jpg")
        if not images:
            return []
        self.labels, labels = self._find_labels(base)
        if self.labels == "json":
            self.index = detail_index(labels)
            lines = dict.fromkeys(self.index.phases[self.split], 0)
            return SplitList(labels, lines).find(images, lambda _: str(labels))
        # Main is part of VOC 2010; not ImageSets/Segmentation, which is another task's split.
        own = [
            base / "ImageSets" / f / f"{self.split}.txt" for f in ("SegmentationContext", "Main")
        ]
        listed = find_list(own, "pascal_context", self.split)
        self.notes += listed.notes
        return listed.find(images, lambda name: f"{labels}/{name}.{self.labels}")

    def decode_labels(self, path: Path) -> np.ndarray:
        """Read LabelMap of a .mat file, or a PNG, (H, W), uint8 or uint16."""
        if self.labels == "mat":
            return read_mat_labels(open_mat(path), "LabelMap", max_pixels=self.reading.max_pixels)
        return super().decode_labels(path)

    def labels_of(self, item: Item) -> np.ndarray:
        """Read the label of a pair, or paint it from the run lengths of the JSON."""
        if self.index is None:
            return super().labels_of(item)
        height, width = self.index.sizes[item.name]
        if height * width > self.reading.max_pixels:
            raise InputError(
                f"{item.mask}: the label of {item.name} has {height} x {width} pixels, more than "
                f"data.max_pixels={self.reading.max_pixels}"
            )
        return self.index.labels(item.name)

    def _find_labels(self, base: Path) -> tuple[str, Path]:
        """Return the form of the labels and their folder or file."""
        forms = _PLACES if self.labels == "auto" else [self.labels]
        folders = (base, base.parent, self.root)
        places = {form: [folder / _PLACES[form] for folder in folders] for form in forms}
        found = {form: next(filter(Path.exists, paths), None) for form, paths in places.items()}
        there = {form: place for form, place in found.items() if place is not None}
        if not there:
            tried = ", ".join(str(paths[0]) for paths in places.values())
            raise InputError(
                f"{self}: data.labels={self.labels}, but there are no labels at {tried}; "
                f"expected\n{self.layout}"
            )
        form, *others = there
        if self.labels == "auto":
            unused = f"; not used: {', '.join(others)}" if others else ""
            self.notes.append(f"{self}: data.labels=auto takes {form}, {there[form]}{unused}")
        return form, there[form]


class PascalContext60(PascalContext):
    """PASCAL Context with background as class 0, as in papers that report 60 classes."""

    table = read_class_table("context60")
    classes = table.classes
    palette = table.palette
