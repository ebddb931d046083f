"""Where images and masks lie below a folder, and where else they may lie when they do not."""

import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

_LIMIT = 2000  # most folders that are searched: this only makes a message better


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

    def find_masks(self, folder: Path) -> list[str]:
        """Return the names of the masks below a folder, relative to it."""
        return [n for n in find_files(folder, (_last_suffix(self.mask_suffix),)) if self.is_mask(n)]

    def is_mask(self, name: str) -> bool:
        """Return whether a name ends with ``mask_suffix``, whose last part may have capitals."""
        return self._normalized(name).endswith(self.mask_suffix)

    def by_name(self, masks: Sequence[str]) -> dict[str, str]:
        """Return the name that a mask should have -> its name on disk."""
        return {self._normalized(name): name for name in masks}

    def pair(self, name: str, folders: tuple[Path, Path], on_disk: Mapping[str, str]) -> Item:
        """Return the pair of an image, whether or not its mask exists.

        Args:
            name: Of the image, relative to its folder.
            folders: Of images and masks.
            on_disk: As ``by_name`` returns it.
        """
        stem = stem_of(name)
        mask = f"{stem}{self.mask_suffix}"
        # PNG in the place of png: the suffix of a mask may have capitals, as that of an image.
        return Item(f"{folders[0]}/{name}", f"{folders[1]}/{on_disk.get(mask, mask)}", stem)

    def suggest_folders(self, root: Path) -> str:
        """Return which folders may be meant: names in another case, else those with pictures."""
        folders = sorted(path.name for path in root.iterdir() if path.is_dir())
        close = {name.lower(): name for name in folders}
        images, masks = self.images_dir.lower(), self.masks_dir.lower()
        if close.get(images, self.images_dir) != self.images_dir and masks in close:
            return f"; set {folder_settings(close[images], close[masks])}"
        found = {name: find_files(root / name) for name in folders}
        # A folder with a tree of its own is another data set.
        filled = [n for n in folders if found[n] and not (root / n / self.images_dir).is_dir()]
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

    def suggest_masks(self, parent: Path) -> str:
        """Return which folder may have the masks where ``masks_dir`` does not exist."""
        others = (p for p in sorted(parent.iterdir()) if p.is_dir() and p.name != self.images_dir)
        filled = next((path.name for path in others if find_files(path)), None)
        if filled is None:
            return ""
        settings = folder_settings(self.images_dir, filled)
        return f"; there is no folder {self.masks_dir}: set {settings}"

    def _normalized(self, name: str) -> str:
        """Return a name with its suffix in the case of ``mask_suffix``."""
        suffix = _last_suffix(self.mask_suffix)
        end = self.mask_suffix[len(self.mask_suffix) - len(suffix) :]
        return name[: len(name) - len(suffix)] + end if name.lower().endswith(suffix) else name


def stem_of(name: str) -> str:
    """Return a relative path without its suffix, with forward slashes."""
    return PurePosixPath(name).with_suffix("").as_posix()


def folder_settings(images_dir: str, masks_dir: str) -> str:
    """Format the folders of images and masks as settings, quoted for a shell."""
    settings = (f"data.images_dir={images_dir}", f"data.masks_dir={masks_dir}")
    return " ".join(map(shlex.quote, settings))


def elsewhere(root: Path, marker: str) -> str:
    """Return which folder near ``root`` does have ``marker``; empty where none has.

    Archives get unpacked inside themselves, and a folder too high or too deep gets named: two
    levels up and three down are searched. Where several folders side by side have it, all of them
    are named: one would hide the others.

    Args:
        root: ``data.root``, which lacks the marker.
        marker: A relative path that only the right folder has.
    """
    found = [folder for folder in (*root.parents[:2], *_below(root)) if _has(folder, marker)]
    beside = [folder for folder in found if folder.parent == found[0].parent]
    if len(beside) > 1:
        names = ", ".join(map(str, beside[:5]))
        return f"; several folders have {marker}: {names}; set data.root to one of them"
    if found:
        setting = shlex.quote(f"data.root={found[0]}")
        return f"; the folder that has {marker} is {found[0]}: set {setting}"
    return ""


def _has(folder: Path, marker: str) -> bool:
    try:
        return (folder / marker).exists()
    except OSError:
        return False


def _below(root: Path) -> Iterator[Path]:
    """Yield the folders of three levels, the nearest first."""
    level, count = [root], 0
    for _ in range(3):
        deeper: list[Path] = []
        for folder in level:
            try:
                with os.scandir(folder) as entries:
                    names = sorted(e.name for e in entries if e.is_dir() and e.name[:1] != ".")
            except OSError:
                continue
            for name in names:
                count += 1
                if count > _LIMIT:
                    return
                deeper.append(folder / name)
                yield deeper[-1]
        level = deeper


def _last_suffix(name: str) -> str:
    """Return the suffix in lower case, or the whole name if it has none."""
    return os.path.splitext(f"x{name}")[1].lower() or name


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
