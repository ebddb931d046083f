"""PASCAL Context: the pictures of VOC 2010 with a label for every pixel, 59 or 60 classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from danet.datasets.base import FileDataset, Item
from danet.datasets.formats.matlab import read_mat_labels
from danet.datasets.formats.pascal_in_detail import DetailIndex, detail_index
from danet.datasets.layout import pair_files
from danet.datasets.listing import first_folder
from danet.datasets.lists import SplitList, find_list
from danet.errors import InputError

# Form of the labels -> folder or file, and suffix; "auto" tries them in this order.
_FORMS = {
    "mat": ("trainval", ".mat"),
    "png": ("SegmentationClassContext", ".png"),
    "json": ("trainval_merged.json", ""),
}

# Places of VOC below ``data.root``: the folder that holds VOCdevkit, VOCdevkit, or VOC2010.
_DEVKITS = ("VOCdevkit/VOC2010", "VOC2010", ".")
# Kinds of objects in the original labels; those outside the 59 classes are background.
_NUM_IDS = 459


@dataclass(kw_only=True, eq=False, repr=False)
class PascalContext(FileDataset, published="pascal_context"):
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

    labels: Literal["auto", "mat", "png", "json"] = "auto"

    index: DetailIndex | None = field(default=None, init=False)

    def label_map(self) -> Mapping[int, int]:
        """Return value on disk -> class or background: 0..59 of a PNG, ids 0..459 otherwise."""
        ids = super().label_map()
        if self.labels == "png":
            return dict(enumerate(ids[id_] for id_ in sorted(ids)))
        return {id_: ids.get(id_, ids[0]) for id_ in range(_NUM_IDS + 1)}

    def find_items(self) -> list[Item]:
        """Return the pictures of the split: named by the JSON, a list of the tree, or ours."""
        base = first_folder(self.root, _DEVKITS, self.marker) or self.root
        images = base / self.marker
        if not images.is_dir():
            return []
        labels = self._find_labels(base)
        known, _ = pair_files(images, labels, ("*", f"*{_FORMS[self.labels][1]}"))
        # Main is part of VOC 2010; not ImageSets/Segmentation, which is another task's split.
        own = [
            base / "ImageSets" / f / f"{self.split}.txt" for f in ("SegmentationContext", "Main")
        ]
        if self.labels == "json":
            self.index = detail_index(labels, labels.stat().st_mtime_ns)
            known = {name: item._replace(mask=str(labels)) for name, item in known.items()}
            listed = SplitList(labels, [(name, 0) for name in self.index.phases[self.split]])
        else:
            listed = find_list(own, "pascal_context", self.split)
        items, notes = listed.pairs(known, images)
        self.notes += notes
        return items

    def labels_of(self, item: Item) -> np.ndarray:
        """Read a .mat file or a PNG, or paint the run lengths of the JSON, uint8 or uint16."""
        limit = self.reading.max_pixels
        if self.labels == "mat":
            return read_mat_labels(Path(str(item.mask)), "LabelMap", max_pixels=limit)[0]
        if self.index is None:
            return super().labels_of(item)
        height, width = self.index.sizes[item.name]
        if height * width > limit:
            raise InputError(
                f"{item.mask}: the label of {item.name} has {height} x {width} pixels, more than "
                f"data.max_pixels={limit}"
            )
        return self.index.labels(item.name)

    def _find_labels(self, base: Path) -> Path:
        """Choose the form of the labels that are there; return their folder or file."""
        forms = list(_FORMS) if self.labels == "auto" else [self.labels]
        tried = [(f, b / _FORMS[f][0]) for f in forms for b in (base, base.parent, self.root)]
        there = [(form, place) for form, place in tried if place.exists()]
        if not there:
            raise InputError(
                f"{self}: data.labels={self.labels}, but there are no labels at "
                f"{', '.join(str(place) for _, place in tried[::3])}; expected\n{self.layout}"
            )
        form, place = there[0]
        if self.labels == "auto":
            others = ", ".join(dict.fromkeys(other for other, _ in there if other != form))
            unused = f"; not used: {others}" if others else ""
            self.notes.append(f"{self}: data.labels=auto takes {form}, {place}{unused}")
        self.labels = form  # type: ignore[assignment]
        return place


class PascalContext60(PascalContext, published="pascal_context_60"):
    """PASCAL Context with background as class 0, as in papers that report 60 classes."""
