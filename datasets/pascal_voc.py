"""PASCAL VOC 2012 segmentation, with the masks of SBD for the training split of 10,582 images."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.io

from danet.datasets.base import FileDataset, Item, Reading, Transform
from danet.datasets.formats.matlab import open_mat
from danet.datasets.labels import read_class_table, voc_palette
from danet.datasets.layout import elsewhere
from danet.datasets.lists import SplitList, read_list, shipped_list
from danet.datasets.submission import Submission
from danet.errors import InputError

_TABLE = read_class_table("voc")
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

    classes = _TABLE.classes
    palette = _TABLE.palette
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

    def label_map(self) -> Mapping[int, int]:
        """Return 0..20 as they are and 255 -> IGNORE."""
        return _TABLE.label_map

    def find_items(self) -> list[Item]:
        """Return the images of the split's list with their masks."""
        voc = self._find_voc()
        images = self._find_images(voc)
        lists = self._lists(voc)
        for source in lists:
            source.require(images, tried=str(voc / "JPEGImages" / "{name}.jpg"))
            if source.repeated:
                self.notes.append(
                    f"{source.path}: {len(source.repeated)} names stand there twice and count "
                    f"once: {', '.join(source.repeated[:5])}"
                )
        names = list(dict.fromkeys(name for source in lists for name in source.names))
        if self.split == "test":
            return [Item(images[name], None, name) for name in names]
        masks = self._find_masks(voc)
        missing = [name for name in names if name not in masks]
        if missing and self.split == "trainaug" and not self.reading.allow_missing_labels:
            raise InputError(self._explain_missing(missing, len(names), voc, masks))
        own = voc / "SegmentationClass"  # the base class reports the files that are missing
        return [Item(images[n], masks.get(n, str(own / f"{n}.png")), n) for n in names]

    def decode_labels(self, path: Path) -> np.ndarray:
        """Read a PNG, or a .mat file of SBD."""
        return read_sbd(path) if path.suffix == ".mat" else super().decode_labels(path)

    def submission(self) -> Submission:
        """Return the format of the evaluation server: palette PNGs in a .tgz."""
        return Submission(
            values=range(len(self.classes)),
            folder=f"results/VOC2012/Segmentation/{self.competition}_{self.split}_cls",
            palette=voc_palette(256),
            archive="tgz",
        )

    def _find_voc(self) -> Path:
        for place in _DEVKITS:
            if (self.root / place / "JPEGImages").is_dir():
                return self.root / place
        searched = ", ".join(str(self.root / place / "JPEGImages") for place in _DEVKITS)
        raise InputError(
            f"{self}: no VOC2012 under {self.root}: there is no {searched}"
            f"{elsewhere(self.root, self.marker)}; expected below data.root\n{self.layout}"
        )

    def _find_sbd(self) -> Path | None:
        """Return the folder of SBD that holds cls/ and img/, if there is one."""
        if self.sbd_root is not None:
            given = self.root / Path(self.sbd_root).expanduser()
            roots = [given]
        else:
            roots = [self.root / name for name in _SBD]
        for root in roots:
            for part in _SBD_PARTS:
                if (root / part / "cls").is_dir():
                    return root / part
        if self.sbd_root is not None:
            raise InputError(
                f"data.sbd_root={given}: no folder cls with .mat files is there, nor in dataset/"
                f"{elsewhere(given, 'cls').replace('data.root', 'data.sbd_root')}"
            )
        return None

    def _find_images(self, voc: Path) -> dict[str, str]:
        """Return name -> image; VOC's own have priority over SBD's, which are the same pictures."""
        sbd = self._find_sbd() if self.split == "trainaug" else None
        return (_files(sbd / "img", ".jpg") if sbd else {}) | _files(voc / "JPEGImages", ".jpg")

    def _find_masks(self, voc: Path) -> dict[str, str]:
        """Return name -> mask; VOC's own have priority: they have the border that is ignored."""
        masks = _files(voc / "SegmentationClass", ".png")
        if self.split == "trainaug":
            sbd = self._find_sbd()
            masks = _files(self.root / "SegmentationClassAug", ".png") | masks
            masks = _files(voc / "SegmentationClassAug", ".png") | masks
            masks = (_files(sbd / "cls", ".mat") if sbd else {}) | masks
        return masks

    def _lists(self, voc: Path) -> list[SplitList]:
        """Return the tree's own list of the split, else the shipped ones."""
        shipped = [shipped_list("voc2012", s) for s in _LISTS.get(self.split, (self.split,))]
        path = voc / "ImageSets" / "Segmentation" / f"{self.split}.txt"
        if not path.exists():
            return shipped
        own = read_list(path)
        known = {name for source in shipped for name in source.names}
        unknown = [name for name in own.names if name not in known]
        if self.split == "trainaug" and unknown:
            leaked = set(shipped_list("voc2012", "val").names).intersection(unknown)
            raise InputError(
                f"{path}: {len(unknown)} of {len(own.names)} names are not among the 10,582 of "
                f"trainaug, first {unknown[0]} in line {own.line_of(unknown[0])}"
                + (f"; {len(leaked)} are images of VOC's val, which is scored" if leaked else "")
                + "; remove this list, and the one that ships with this program is used"
            )
        return [own]

    def _explain_missing(
        self, missing: list[str], total: int, voc: Path, masks: Mapping[str, str]
    ) -> str:
        """Return which masks of trainaug are missing, and which split would work."""
        text = (
            f"{self}: {len(missing)} of {total} images of split {self.split!r} have no label "
            f"file: {', '.join(missing[:5])}"
        )
        sbd = self._find_sbd()
        place = sbd / "cls" if sbd else self.root / _SBD[0] / "dataset" / "cls"
        text += (
            f"; the first was looked for at {voc}/SegmentationClass/{missing[0]}.png, "
            f"{voc}/SegmentationClassAug/{missing[0]}.png and {place}/{missing[0]}.mat; unpack SBD "
            "(benchmark.tgz) into data.root, or name its folder with data.sbd_root"
        )
        train = shipped_list("voc2012", "train").names
        if all(name in masks for name in train):
            text += f"; the split 'train' with {len(train):,} images works now"
        return text


def read_sbd(path: Path) -> np.ndarray:
    """Read the classes of a .mat file of SBD, ``GTcls.Segmentation``, as uint16 (H, W).

    Raises:
        InputError: The file is damaged, or lacks that variable.
    """
    mat = open_mat(path)
    try:
        loaded = scipy.io.loadmat(io.BytesIO(mat.content), variable_names=["GTcls"])
        labels: Any = loaded["GTcls"][0, 0]["Segmentation"]
    except KeyError as error:
        found = ", ".join(sorted(mat.shapes)) or "nothing"
        raise InputError(
            f"{path}: a file of SBD's cls/ has the struct GTcls with Segmentation; it holds {found}"
        ) from error
    except Exception as error:  # scipy raises anything on a damaged file
        raise InputError(
            f"{path}: not a readable file of SBD ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no more is known'})"
        ) from error
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or labels.dtype.kind not in "buif":
        raise InputError(f"{path}: GTcls.Segmentation is not an array of numbers (H, W)")
    is_in_range = labels.size and labels.min() >= 0 and labels.max() < 65536  # False for NaN
    whole = labels.astype(np.uint16) if is_in_range else np.empty(0, np.uint16)
    if not np.array_equal(whole, labels):
        raise InputError(
            f"{path}: GTcls.Segmentation must hold whole numbers 0..65535, found {labels.dtype}"
        )
    return whole


def _files(folder: Path, suffix: str) -> dict[str, str]:
    """Return name without suffix -> path of the files of a folder; empty if it does not exist."""
    try:
        with os.scandir(folder) as entries:
            parts = [os.path.splitext(entry.name) for entry in entries]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{folder}: this folder cannot be read ({error.strerror})") from error
    return {
        name: f"{folder}{os.sep}{name}{ending}"
        for name, ending in parts
        if ending.lower() == suffix
    }
