"""Where images and masks of own pictures lie below a folder, and where else they may lie."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from danet.datasets.items import Item
from danet.datasets.listing import find_files
from danet.errors import InputError

# Name of a folder, in any case -> its split.
_SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True)
class PairLayout:
    """Where images and masks lie below a folder, and how a mask is named after its image."""

    images_dir: str = "images"
    masks_dir: str = "masks"
    mask_suffix: str = ".png"  # end of the names of masks; .npy: arrays of whole numbers

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

    def suggest_folders(self, root: Path) -> str:
        """Return which settings may find the images: folders with pictures, masks beside them."""
        # A folder with a tree of its own is another data set.
        filled = {p.name: find_files(p) for p in root.iterdir() if not self.folders(p)[0].is_dir()}
        # Masks are PNG, which photographs seldom are.
        found = sorted(
            (all(file.lower().endswith(".png") for file in files), name)
            for name, files in filled.items()
            if files
        )
        if not found:
            return ""
        advice = (
            "where masks lie beside their images, set data.images_dir=. data.masks_dir=. and "
            "data.mask_suffix to what follows an image's name, such as _mask.png"
        )
        if len(found) > 1 and not {name.lower() for _, name in found} <= {*_SPLIT_OF}:
            settings = f"data.images_dir={found[0][1]}", f"data.masks_dir={found[1][1]}"
            advice = f"name those of images and masks, as in {' '.join(map(shlex.quote, settings))}"
        names = ", ".join(name for _, name in found[:6])
        return f"; the folders with pictures are {names}: {advice}"


def pair_files(
    images: Path, masks: Path, suffix: str = ".png"
) -> tuple[dict[str, Item], list[str]]:
    """Return name -> pair of all images of a folder, and a note on masks without an image.

    A mask has the name of its image, with ``suffix``, in any case, in the place of the image's; it
    need not exist.

    Raises:
        InputError: Images differ in nothing but their suffix.
    """

    def is_mask(name: str) -> bool:
        return name.lower().endswith(suffix.lower())

    on_disk = filter(is_mask, find_files(masks, (os.path.splitext(f"x{suffix}")[1].lower(),)))
    unused = {name[: len(name) - len(suffix)]: name for name in on_disk}
    items: dict[str, Item] = {}
    for name in find_files(images):
        if images == masks and is_mask(name):
            continue
        stem = stem_of(name)
        item = Item(f"{images}/{name}", f"{masks}/{unused.pop(stem, stem + suffix)}", stem)
        if items.setdefault(stem, item) is not item:
            raise InputError(
                f"{item.image} and {items[stem].image} would share a mask: names must differ in "
                "more than their suffix"
            )
    names = ", ".join([*unused.values()][:5])
    note = f"{masks}: {len(unused)} label files have no image and are not used: {names}"
    return items, [note] if unused and images != masks else []


def stem_of(name: str) -> str:
    """Return a relative path without its suffix, with forward slashes."""
    return PurePosixPath(name).with_suffix("").as_posix()


def _split_names(parent: Path) -> dict[str, str]:
    """Return split -> the name of its folder, of those that exist in ``parent``.

    Raises:
        InputError: Two folders could be one split.
    """
    found: dict[str, str] = {}
    folders = sorted(parent.iterdir()) if parent.is_dir() else []
    for path in folders:
        split = _SPLIT_OF.get(path.name.lower())
        if split and path.is_dir() and found.setdefault(split, path.name) != path.name:
            raise InputError(
                f"{path} and {parent / found[split]} are both the split {split!r}: rename or move "
                "one, or give data.lists"
            )
    return found
