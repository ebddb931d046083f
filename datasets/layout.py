"""Where images and masks lie below a folder, and where else they may lie when they do not."""

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath

from danet.datasets.hints import is_coloured
from danet.datasets.items import Item
from danet.datasets.listing import find_files
from danet.errors import InputError

# Split -> accepted names of its folder, in any case.
_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, names in _SPLITS.items() for name in names}

_LIMIT = 2000  # folders of a level that are searched: this only makes a message better


@dataclass(frozen=True)
class PairLayout:
    """Where images and masks lie below a folder, and how a mask is named after its image.

    Args:
        images_dir, masks_dir: Folders below root.
        mask_suffix: End of the names of masks; with .npy they are arrays of whole numbers.
    """

    images_dir: str = "images"
    masks_dir: str = "masks"
    mask_suffix: str = ".png"

    def folders(self, parent: Path) -> tuple[Path, Path]:
        """Return the folders of images and masks below ``parent``."""
        return parent / self.images_dir, parent / self.masks_dir

    def split_folders(self, root: Path) -> dict[str, tuple[Path, Path]]:
        """Return split -> its folders of images and masks; empty without such folders."""
        images, masks = self.folders(root)
        if inside := _split_names(images):
            labels = _split_names(masks)
            return {s: (images / n, masks / labels.get(s, n)) for s, n in inside.items()}
        around = {s: self.folders(root / name) for s, name in _split_names(root).items()}
        return {split: pair for split, pair in around.items() if pair[0].is_dir()}

    def find_masks(self, folder: Path) -> dict[str, str]:
        """Return name without ``mask_suffix`` -> name of the masks below a folder."""
        found = find_files(folder, (os.path.splitext(f"x{self.mask_suffix}")[1].lower(),))
        return {
            name[: len(name) - len(self.mask_suffix)]: name for name in found if self._is_mask(name)
        }

    def pairs(self, images: Path, masks: Path) -> dict[str, Item]:
        """Return name -> pair of all images of a folder, whether or not the masks exist."""
        on_disk = self.find_masks(masks)
        found = {}
        for name in find_files(images):
            if images != masks or not self._is_mask(name):
                stem = stem_of(name)
                mask = on_disk.get(stem, f"{stem}{self.mask_suffix}")
                found[name] = Item(f"{images}/{name}", f"{masks}/{mask}", stem)
        return found

    def suggest_folders(self, root: Path) -> str:
        """Return which settings may find the images: folders with pictures, masks beside them."""
        found = {path.name: find_files(path) for path in sorted(root.iterdir()) if path.is_dir()}
        # A folder with a tree of its own is another data set.
        filled = [n for n in found if found[n] and not (root / n / self.images_dir).is_dir()]
        if filled and all(name.lower() in _SPLIT_OF for name in filled):
            suffix = _suffix_of_masks(found[filled[0]])
            suffix = shlex.quote(f"data.mask_suffix={suffix}") * bool(suffix)
            return f"; set data.images_dir=. data.masks_dir=. {suffix}" * bool(suffix)
        if len(filled) < 2:
            return ""
        # Masks are PNG, which photographs seldom are, and mostly of one channel.
        is_png = {n: all(file.lower().endswith(".png") for file in found[n]) for n in filled}
        filled.sort(key=lambda name: (is_png[name], not is_coloured(root / name / found[name][0])))
        return (
            f"; the folders with pictures are {', '.join(filled[:6])}: set data.images_dir and "
            f"data.masks_dir, as in {folder_settings(filled[0], filled[1])}"
        )

    def _is_mask(self, name: str) -> bool:
        # The suffix of a mask may have capitals, as that of an image.
        return name.lower().endswith(self.mask_suffix.lower())


def stem_of(name: str) -> str:
    """Return a relative path without its suffix, with forward slashes."""
    return PurePosixPath(name).with_suffix("").as_posix()


def folder_settings(images_dir: str, masks_dir: str) -> str:
    """Format the folders of images and masks as settings, quoted for a shell."""
    settings = (f"data.images_dir={images_dir}", f"data.masks_dir={masks_dir}")
    return " ".join(map(shlex.quote, settings))


def first_folder(root: Path, places: Iterable[str], marker: str) -> Path | None:
    """Return the first of some places below ``root`` that has a folder ``marker``."""
    return next((root / place for place in places if (root / place / marker).is_dir()), None)


def elsewhere(root: Path, marker: str) -> str:
    """Return which folder near ``root`` does have ``marker``; empty where none has.

    Archives get unpacked inside themselves, and a folder too high or too deep gets named: two
    levels up and three down are searched. Where several folders side by side have it, all of them
    are named: one would hide the others.

    Args:
        root: ``data.root``, which lacks the marker.
        marker: A relative path that only the right folder has.
    """
    below = (sorted(islice(root.glob("*/" * depth), _LIMIT)) for depth in (1, 2, 3))
    near = chain(root.parents[:2], *below)
    found = [folder for folder in near if os.path.exists(folder / marker)]
    beside = [folder for folder in found if folder.parent == found[0].parent]
    if len(beside) > 1:
        names = ", ".join(map(str, beside[:5]))
        return f"; several folders have {marker}: {names}; set data.root to one of them"
    if found:
        setting = shlex.quote(f"data.root={found[0]}")
        return f"; the folder that has {marker} is {found[0]}: set {setting}"
    return ""


def _split_names(parent: Path) -> dict[str, str]:
    """Return split -> the name of its folder, of those that exist in ``parent``.

    Raises:
        InputError: Two folders could be one split.
    """
    found: dict[str, str] = {}
    if not parent.is_dir():
        return found
    for path in sorted(path for path in parent.iterdir() if path.is_dir()):
        split = _SPLIT_OF.get(path.name.lower())
        if split in found:
            raise InputError(
                f"{path} and {parent / found[split]} are both the split {split!r}: rename or move "
                "one, or give data.lists"
            )
        if split is not None:
            found[split] = path.name
    return {split: found[split] for split in _SPLITS if split in found}


def _suffix_of_masks(names: Sequence[str]) -> str:
    """Return the commonest ending of masks that lie beside their images; empty if none do."""
    images = {stem_of(name) for name in names if not name.lower().endswith(".png")}
    ends = Counter(
        name[len(stem) :]
        for stem in images or set(map(stem_of, names))
        for name in names
        if name.lower().endswith(".png") and name.startswith(stem) and stem_of(name) != stem
    )
    return ends.most_common(1)[0][0] if ends else ""
