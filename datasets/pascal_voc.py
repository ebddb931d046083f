"""PASCAL VOC 2012 segmentation, with the masks of SBD for the training split of 10,582 images."""

from pathlib import Path
from typing import Literal

import numpy as np

from danet.datasets.base import FileDataset, Item, Reading, Transform
from danet.datasets.formats.matlab import open_mat, read_mat_labels
from danet.datasets.labels import read_class_table, voc_palette
from danet.datasets.layout import elsewhere, first_folder
from danet.datasets.listing import named_files
from danet.datasets.lists import read_list, shipped_list
from danet.datasets.submission import Submission
from danet.errors import InputError

# Split -> lists that ship with the package, where they are not the split itself.
_LISTS = {"trainval": ("train", "val"), "seg11valid": ("seg11valid_736",)}
# Places of VOC below ``data.root``: the folder that holds VOCdevkit, VOCdevkit, or VOC2012.
_DEVKITS = ("VOCdevkit/VOC2012", "VOC2012", ".")
_SBD = ("benchmark_RELEASE", "sbd", "SBD")
_SBD_PARTS = ("dataset", "benchmark_RELEASE/dataset", ".")  # places of cls/ below the folder of SBD


class PascalVOC(FileDataset):
    """Reads VOC2012 as its development kit unpacks it, and SBD beside it.

    Masks hold 0..20; 255, the borders and difficult objects, is ignored. The split "trainaug" is
    that of the papers: (VOC train and all of SBD) without VOC val, 10,582 images. A mask of it is
    VOC's own where there is one, else a PNG of ``SegmentationClassAug``, else SBD's .mat file.
    "seg11valid" is the reduced val of 736 images, for networks that saw all of SBD's train.
    Everingham et al., IJCV 2010; Hariharan et al., Semantic contours from inverse detectors, ICCV
    2011.

    Args:
        root: The folder that holds VOCdevkit, or VOCdevkit, or VOC2012.
        split, transform, reading: As in FileDataset.
        sbd_root: Folder of SBD, from root on; None tries benchmark_RELEASE and sbd in root.
        competition: That of a submission: comp6, or comp5 for networks that saw nothing but VOC's
            own train and val, not even ImageNet.
    """

    table = read_class_table("voc")
    classes = table.classes
    palette = table.palette
    splits = ("train", "val", "trainval", "trainaug", "seg11valid", "test")
    expected = {
        "train": (1464,),
        "val": (1449,),
        "trainval": (2913,),
        "trainaug": (10582,),
        "seg11valid": (736,),
        "test": (1456,),
    }
    marker = "VOC2012/JPEGImages"
    label_hint = "; VOC's masks hold 0..20 and 255"
    layout = (
        "  VOCdevkit/VOC2012/{JPEGImages/<id>.jpg, SegmentationClass/<id>.png,\n"
        "                     ImageSets/Segmentation/{train,val,test}.txt}\n"
        "  for trainaug also VOCdevkit/VOC2012/SegmentationClassAug/<id>.png\n"
        "  or benchmark_RELEASE/dataset/cls/<id>.mat (SBD)"
    )

    def __init__(
        self,
        *,
        root: str | Path,
        split: str,
        sbd_root: str | None = None,
        competition: Literal["comp5", "comp6"] = "comp6",
        transform: Transform | None = None,
        reading: Reading | None = None,
    ) -> None:
        self.sbd_root = sbd_root
        self.competition = competition
        super().__init__(root=root, split=split, transform=transform, reading=reading)

    def find_items(self) -> list[Item]:
        """Return the images of the split's list with their masks."""
        voc = first_folder(self.root, _DEVKITS, "JPEGImages") or self.root
        sbd = self._find_sbd() if self.split == "trainaug" else None
        # VOC's own have priority: of images, which are the same, and of masks, which have the
        # border that is ignored.
        images = named_files(voc / "JPEGImages", ".jpg")
        masks = named_files(voc / "SegmentationClass", ".png")
        if self.split == "trainaug":
            images = (named_files(sbd / "img", ".jpg") if sbd else {}) | images
            masks = named_files(self.root / "SegmentationClassAug", ".png") | masks
            masks = named_files(voc / "SegmentationClassAug", ".png") | masks
            masks = (named_files(sbd / "cls", ".mat") if sbd else {}) | masks
        own = voc / "ImageSets" / "Segmentation" / f"{self.split}.txt"
        parts = _LISTS.get(self.split, (self.split,))
        lists = [read_list(own)] if own.exists() else [shipped_list("voc2012", s) for s in parts]
        items = []
        for listed in lists:
            self.notes += listed.notes
            if self.split == "test":
                items += listed.find(images, lambda _: None)
            else:  # the base class reports files that are missing
                items += listed.find(
                    images, lambda name: masks.get(name, f"{voc}/SegmentationClass/{name}.png")
                )
        return items

    def decode_labels(self, path: Path) -> np.ndarray:
        """Read a PNG, or a .mat file of SBD."""
        if path.suffix != ".mat":
            return super().decode_labels(path)
        limit = self.reading.max_pixels
        return read_mat_labels(open_mat(path), "GTcls.Segmentation", max_pixels=limit)

    def submission(self) -> Submission:
        """Return the format of the evaluation server: palette PNGs in a .tgz."""
        return Submission(
            values=range(len(self.classes)),
            folder=f"results/VOC2012/Segmentation/{self.competition}_{self.split}_cls",
            palette=voc_palette(256),
            archive="tgz",
        )

    def _find_sbd(self) -> Path | None:
        """Return the folder of SBD that holds cls/ and img/, if there is one."""
        if self.sbd_root is None:
            places = [f"{name}/{part}" for name in _SBD for part in _SBD_PARTS]
            return first_folder(self.root, places, "cls")
        given = self.root / Path(self.sbd_root).expanduser()
        found = first_folder(given, _SBD_PARTS, "cls")
        if found is None:
            raise InputError(
                f"data.sbd_root={given}: no folder cls with .mat files is there, nor in dataset/"
                f"{elsewhere(given, 'cls').replace('data.root', 'data.sbd_root')}"
            )
        return found

    def explain_no_label(self) -> str:
        """Return where masks of SBD are looked for, and which split works without."""
        if self.split != "trainaug":
            return ""
        place = self._find_sbd() or self.root / _SBD[0] / "dataset"
        text = (
            f", in SegmentationClassAug, and in {place}/cls; unpack SBD (benchmark.tgz) into "
            "data.root, or name its folder with data.sbd_root"
        )
        train = shipped_list("voc2012", "train").lines
        if train.keys() & {self.items[i].name for i in self.items.without_label()}:
            return text
        return f"{text}; the split 'train' with {len(train):,} images works now"
