"""Masks in folders of PASCAL VOC, as labelme2voc and CVAT write them.

labelme2voc (github.com/wkentaro/labelme, examples/semantic_segmentation) has class_names.txt, and
masks of numbers, where -1 in arrays and 255 in pictures are ``__ignore__``. CVAT's "Segmentation
mask 1.1" (docs.cvat.ai) has labelmap.txt, masks of its colours, and a list for each subset.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from danet.datasets.exports.shapes import Export, Picture, label_positions
from danet.datasets.formats.color_masks import LabelFormat
from danet.datasets.image_io import MAX_PIXELS, read_labels, whole_labels
from danet.datasets.labels import Color, read_class_file
from danet.datasets.layout import SPLIT_OF, split_in, stem_of
from danet.datasets.listing import LABEL_SUFFIXES, find_files
from danet.datasets.lists import read_list
from danet.errors import InputError

# Of several masks of a picture the last one counts.
_MASKS = ("SegmentationClassPNG", "SegmentationClass", "SegmentationClassNpy")


def find(root: Path) -> list[Path]:
    """Return the files class_names.txt and labelmap.txt with masks beside them."""
    files = [root / name for name in find_files(root, (".txt",))]
    files = [path for path in files if path.name in ("class_names.txt", "labelmap.txt")]
    return [path for path in files if (path.parent / "SegmentationClass").is_dir()]


def read(files: Sequence[Path], root: Path) -> Export:
    """Read where pictures and masks are, in folders with the same classes."""
    classes = read_class_file(str(files[0]))
    names, colors = [name for name in classes.names if name != "__ignore__"], classes.colors
    if colors and len({*colors}) < len(colors):
        raise InputError(f"{files[0]}: two labels have the same colour: {colors}")
    labels = [*label_positions(names, files[0])] + ["__ignore__"] * (not colors)
    pictures = []
    for path in files:
        if path.name == "labelmap.txt" and not colors:
            raise InputError(f"{path}: expected a line '# label:color_rgb:parts:actions' first")
        if read_class_file(str(path)) != classes:
            raise InputError(f"{path}: its classes differ from those of {files[0]}; keep one")
        folder, lists = path.parent, path.parent / "ImageSets" / "Segmentation"
        masks = {
            stem_of(name): folder / kind / name
            for kind in _MASKS
            for name in find_files(folder / kind, LABEL_SUFFIXES)
        }
        images = {stem_of(name): name for name in find_files(folder / "JPEGImages")}
        split = split_in(path.relative_to(root))
        splits: dict[str, str | None] = dict.fromkeys([*masks, *images], split)
        for name in find_files(lists, (".txt",)):
            for line, _ in read_list(lists / name).names:
                stem = line.strip('"')  # as around a name with blanks
                splits[stem] = SPLIT_OF.get(stem_of(name).lower()) or splits.get(stem)
        for stem, split in splits.items():
            image = str(folder / "JPEGImages" / images.get(stem, stem))
            if stem not in masks and not colors:  # CVAT has none of a picture without objects
                raise InputError(f"{image}: its mask {stem}.png is not in SegmentationClass")
            mask = partial(_read, masks[stem], colors, len(labels)) if stem in masks else None
            pictures.append(Picture(masks.get(stem, path), image, mask=mask, split=split))
    return Export(labels, pictures, colors, is_complete=True)


def _read(path: Path, colors: Sequence[Color] | None, count: int) -> np.ndarray:
    """Read a mask as positions in ``count`` labels, from 1 on, uint16 (H, W)."""
    if colors:
        try:
            classes, _ = LabelFormat(colors=colors).read(path, len(colors), MAX_PIXELS)
            return classes.astype(np.uint16) + 1
        except InputError as error:  # it advises keys that this data set does not have
            text = str(error).replace("data.colors", "labelmap.txt")
            raise InputError(re.sub(" or to data.ignore_colors.*", "", text)) from error
    if path.suffix == ".npy":
        try:
            values = np.load(path, allow_pickle=False)
            values = values + 65536 * (values == -1)
        except (OSError, EOFError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a readable array ({error})") from error
        values = whole_labels(values, str(path))
    else:
        values = read_labels(path)
    table = np.zeros(65536, np.uint16)
    table[: count - 1] = range(1, count)
    table[65535 if path.suffix == ".npy" else 255] = count
    if not (found := table[values]).all():
        raise InputError(
            f"{path}: it has the value {values[found == 0][0]}; class_names.txt has the classes "
            f"0..{count - 2}, and __ignore__ is -1 in arrays and 255 in pictures"
        )
    return found
