"""PASCAL VOC 2012 segmentation, with the masks of SBD for the training split of 10,582 images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from danet.datasets.base import FileDataset, Item
from danet.datasets.formats.matlab import read_mat_labels
from danet.datasets.labels import voc_palette
from danet.datasets.listing import elsewhere, first_folder, named_files
from danet.datasets.lists import find_list
from danet.datasets.submission import Submission
from danet.errors import InputError

# Places of VOC below ``data.root``: the folder that holds VOCdevkit, VOCdevkit, or VOC2012.
_DEVKITS = ("VOCdevkit/VOC2012", "VOC2012", ".")
_SBD = ("benchmark_RELEASE", "sbd", "SBD")
_SBD_PARTS = ("dataset", "benchmark_RELEASE/dataset", ".")  # places of cls/ below the folder of SBD


@dataclass(kw_only=True, eq=False, repr=False)
class PascalVOC(FileDataset, published="pascal_voc"):
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

    sbd_root: str | None = None
    competition: Literal["comp5", "comp6"] = "comp6"

    def find_items(self) -> list[Item]:
        """Return the images of the split's list with their masks."""
        voc = first_folder(self.root, _DEVKITS, "JPEGImages") or self.root
        # VOC's own have priority: of images, which are the same, and of masks, which have the
        # border that is ignored.
        images = named_files(voc / "JPEGImages", ".jpg")
        masks = named_files(voc / "SegmentationClass", ".png")
        if self.split == "trainaug":
            sbd = self._find_sbd()
            images = named_files(sbd / "img", ".jpg") | images
            for folder in (self.root, voc):
                masks = named_files(folder / "SegmentationClassAug", ".png") | masks
            masks = named_files(sbd / "cls", ".mat") | masks
            self.missing_hint = (
                f", in SegmentationClassAug, and in {sbd}/cls; unpack SBD (benchmark.tgz) into "
                "data.root, or name its folder with data.sbd_root; the split 'train' needs none"
            )
        known = {
            name: Item(path, masks.get(name, f"{voc}/SegmentationClass/{name}.png"), name)
            for name, path in images.items()
        }
        own = voc / "ImageSets" / "Segmentation" / f"{self.split}.txt"
        items, self.notes = find_list([own], "voc2012", self.split).pairs(known, voc / "JPEGImages")
        return items if self.split != "test" else [item._replace(mask=None) for item in items]

    def labels_of(self, item: Item) -> np.ndarray:
        """Read a PNG, or a .mat file of SBD."""
        path, limit = Path(str(item.mask)), self.reading.max_pixels
        if path.suffix != ".mat":
            return super().labels_of(item)
        return read_mat_labels(path, "GTcls.Segmentation", max_pixels=limit)[0]

    def submission(self) -> Submission:
        """Return the format of the evaluation server: palette PNGs in a .tgz."""
        values, palette = range(len(self.classes)), voc_palette(256)
        folder = f"results/VOC2012/Segmentation/{self.competition}_{self.split}_cls"
        return Submission(values, folder=folder, palette=palette, archive="tgz")

    def _find_sbd(self) -> Path:
        """Return the folder of SBD that holds cls/ and img/, or where it would lie."""
        if self.sbd_root is None:
            places = [f"{name}/{part}" for name in _SBD for part in _SBD_PARTS]
            return first_folder(self.root, places, "cls") or self.root / places[0]
        given = self.root / Path(self.sbd_root).expanduser()
        found = first_folder(given, _SBD_PARTS, "cls")
        if found is None:
            raise InputError(
                f"data.sbd_root={given}: no folder cls with .mat files is there, nor in dataset/"
                f"{elsewhere(given, 'cls', 'data.sbd_root')}"
            )
        return found
