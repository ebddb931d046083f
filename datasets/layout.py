"""Where images and masks of own pictures lie below a folder, and where else they may lie."""

import os
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from danet.datasets.image_io import open_picture
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
        filled = {p: find_files(p) for p in root.iterdir() if not self.folders(p)[0].is_dir()}
        # Masks are PNG, which photographs seldom are, and mostly of one channel.
        found = [
            (all(name.lower().endswith(".png") for name in files), _channels(p / files[0]) < 3, p)
            for p, files in filled.items()
            if files
        ]
        if not found:
            return ""
        advice = (
            "where masks lie beside their images, set data.images_dir=. data.masks_dir=. and "
            "data.mask_suffix to what follows an image's name, such as _mask.png"
        )
        names = [path.name for *_, path in sorted(found)]
        if len(names) > 1 and not {name.lower() for name in names} <= {*_SPLIT_OF}:
            settings = f"data.images_dir={names[0]}", f"data.masks_dir={names[1]}"
            advice = f"name those of images and masks, as in {' '.join(map(shlex.quote, settings))}"
        return f"; the folders with pictures are {', '.join(names[:6])}: {advice}"


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


def _channels(path: Path) -> int:
    """Return the number of channels of a picture; 0 if it cannot be read."""
    with suppress(InputError), open_picture(path) as picture:
        return len(picture.getbands())
    return 0


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
