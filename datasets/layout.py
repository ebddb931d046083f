"""Where images and masks of own pictures lie below a folder, and how their names make pairs."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from danet.datasets.items import Item
from danet.datasets.listing import IMAGE_SUFFIXES, LABEL_SUFFIXES, find_files
from danet.errors import InputError

# Name of a folder, in any case -> its split.
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True)
class PairLayout:
    """Where images and masks lie below a folder, and how a mask is named after its image.

    In a pattern ``*`` stands for what both names share; folders above a name are shared, too.
    """

    images_dir: str = "images"
    masks_dir: str = "masks"
    mask_suffix: str = ".png"  # end of the names of masks; .npy: arrays of whole numbers
    image_suffix: str | None = None  # end of the names of images; None for any picture
    pairs: Sequence[str] | None = None  # the patterns of images and masks, instead of suffixes

    def __post_init__(self) -> None:
        patterns = self.pairs or self.patterns
        if len(patterns) != 2 or any(pattern.count("*") != 1 for pattern in patterns):
            raise InputError(
                f"data.pairs={list(patterns)}: expected the patterns of images and masks, each "
                "with one * for what both names share, as in 'data.pairs=[img_*.jpg,mask_*.png]'"
            )
        if self.pairs and (self.image_suffix or self.mask_suffix != PairLayout.mask_suffix):
            raise InputError(
                "data.pairs replaces data.image_suffix and data.mask_suffix: leave them out"
            )

    @property
    def patterns(self) -> tuple[str, str]:
        """The patterns of images and of masks."""
        suffixes = self.image_suffix or "", self.mask_suffix
        images, masks = self.pairs or [f"*{suffix.removeprefix('*')}" for suffix in suffixes]
        return images, masks

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


def pair_files(
    images: Path, masks: Path, patterns: tuple[str, str] = ("*", "*.png")
) -> tuple[dict[str, Item], list[str]]:
    """Return name -> pair of all images of a folder, and a note on masks without an image.

    ``patterns`` are those of images and masks, in any case. A mask need not exist. Images that
    differ in nothing but their suffix raise InputError.
    """
    image_name, mask_name = map(_namer, patterns)
    before, after = patterns[1].split("*")
    suffix = os.path.splitext(f"x{after}")[1].lower()
    files = find_files(masks, (suffix,) if suffix else LABEL_SUFFIXES)
    unused = {stem: name for name in files if (stem := mask_name(name))}
    items: dict[str, Item] = {}
    array = {".npy"} & {os.path.splitext(patterns[0])[1].lower()}  # where they are asked for
    for name in find_files(images, IMAGE_SUFFIXES | array):
        # Where both lie in one folder, the longer pattern says more.
        if images == masks and mask_name(name) and len(patterns[1]) >= len(patterns[0]):
            continue
        if not (stem := image_name(name)):
            continue
        folder, _, own = stem.rpartition("/")
        mask = unused.pop(stem, os.path.join(folder, f"{before}{own}{after}"))
        item = Item(f"{images}/{name}", f"{masks}/{mask}", stem)
        if items.setdefault(stem, item) is not item:
            raise InputError(
                f"{item.image} and {items[stem].image} would share a mask: names must differ in "
                "more than their suffix"
            )
    names = ", ".join([*unused.values()][:5])
    note = f"{masks}: {len(unused)} label files have no image and are not used: {names}"
    return items, [note] if unused and images != masks else []


def _namer(pattern: str) -> Callable[[str], str]:
    """Return a function from a relative path to its name by a pattern; "" where it does not fit."""
    before, after = map(re.escape, pattern.split("*"))
    # Without the suffix of a file at its end a pattern stands for all of them.
    any_suffix = "" if re.search(r"\\\.\w+$", after) else r"\.[^./]+"
    fits = re.compile(f"((?:.*/)?){before}(.+){after}{any_suffix}", re.IGNORECASE | re.DOTALL)
    return lambda path: "".join(found.groups()) if (found := fits.fullmatch(path)) else ""


def split_in(path: PurePath) -> str | None:
    """Return the split that a word in the name of a file says, else in that of a folder above."""
    parts = path.with_suffix("").parts if path.name else ()
    words = (re.split("[^a-z]+", part.lower()) for part in reversed(parts))
    return next((SPLIT_OF[word] for part in words for word in part if word in SPLIT_OF), None)


def stem_of(name: str) -> str:
    """Return a relative path without its suffix, with forward slashes."""
    return PurePosixPath(name).with_suffix("").as_posix()


def _split_names(parent: Path) -> dict[str, str]:
    """Return split -> the name of its folder in ``parent``; raise InputError if it has two."""
    found: dict[str, str] = {}
    folders = sorted(parent.iterdir()) if parent.is_dir() else []
    for path in folders:
        split = SPLIT_OF.get(path.name.lower())
        if split and path.is_dir() and found.setdefault(split, path.name) != path.name:
            raise InputError(
                f"{path} and {parent / found[split]} are both the split {split!r}: rename or move "
                "one, or give data.lists"
            )
    return found
