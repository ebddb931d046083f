"""Anybody's own pictures: a folder of images, a folder of masks, a list of class names."""

import hashlib
import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from danet.datasets.base import FileDataset, Item, Reading, Transform
from danet.datasets.formats.color_masks import ColorTable, read_array, read_colors
from danet.datasets.labels import (
    ClassFile,
    Color,
    check_class_names,
    check_color,
    read_class_file,
    voc_palette,
)
from danet.datasets.listing import IMAGE_SUFFIXES, find_files, unused_note
from danet.datasets.lists import read_list
from danet.errors import InputError
from danet.types import IGNORE

_PAIR = re.compile(
    rf"(?P<image>.+?({'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))}))[\s,;]+(?P<mask>\S.*)",
    re.IGNORECASE,
)
"""A line of a list with two paths; both may hold blanks."""


_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""Split -> what its folder may be called, in any case."""
_SPLIT_OF = {name: split for split, names in _SPLITS.items() for name in names}


class Folder(FileDataset):
    """Reads a folder of images and one of masks, with or without folders for the splits.

    A mask has the name of its image, with ``mask_suffix`` in the place of the image's suffix.
    Which pictures belong to a split is told by ``lists``; else by folders train, val and test (or
    training, valid, validation, dev, testing, in any case) inside both folders or around both; else
    ``val_share`` of the images, rounded and at least one, are the split "val" and the others
    "train", in the order of a hash of their names.

    Args:
        root, split, transform, reading: As in FileDataset.
        classes: K names, or a file of names, see ``labels.read_class_file``; the position is the
            class index.
        palette: K RGB colours for drawing; ``colors``, else those of PASCAL VOC, when None.
        colors: K RGB colours, for masks that are colour pictures; the position is the class index.
            Without, masks hold numbers, and colours of a palette image are not looked at.
        ignore_colors: More colours of such masks, for pixels that do not count.
        values: Value in the masks -> class index, for masks that hold other numbers; a value that
            is mapped to 255, and 255 itself, is ignored.
        labels_start_at: The number of the first class; the numbers below it are ignored.
        images_dir, masks_dir: Folders below root.
        mask_suffix: Ends the names of masks; with .npy they are arrays of whole numbers.
        lists: Split -> text file, from root on, with a picture a line: its name below images_dir,
            or the paths of image and mask from root on.
        allow_overlap: Whether a picture may stand in several lists.
        val_share: Of a folder without splits, 0..1.

    Attributes:
        division: What to tell where a hash of the names divides the pictures; else empty.
    """

    layout = (
        "  images/train/<name>.jpg  images/val/<name>.jpg      or   images/<name>.jpg\n"
        "  masks/train/<name>.png   masks/val/<name>.png            masks/<name>.png\n"
        "  (or train/images, train/masks, ...; data.images_dir, data.masks_dir and "
        "data.mask_suffix name other places)"
    )

    def __init__(
        self,
        *,
        root: str | Path,
        split: str,
        classes: Sequence[str] | str,
        palette: Sequence[Sequence[int]] | None = None,
        colors: Sequence[Sequence[int]] | None = None,
        ignore_colors: Sequence[Sequence[int]] | None = None,
        values: Mapping[int, int] | None = None,
        labels_start_at: int = 0,
        images_dir: str = "images",
        masks_dir: str = "masks",
        mask_suffix: str = ".png",
        lists: Mapping[str, str] | None = None,
        allow_overlap: bool = False,
        val_share: float = 0.2,
        transform: Transform | None = None,
        reading: Reading | None = None,
    ) -> None:
        named = read_class_file(classes) if isinstance(classes, str) else ClassFile(list(classes))
        self.classes = tuple(named.names)
        check_class_names(self.classes)
        if not (colors or values or labels_start_at):
            colors = named.colors
        meanings = {"colors": colors, "values": values, "labels_start_at": labels_start_at}
        given = [f"data.{key}" for key, value in meanings.items() if value]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} exclude each other: give one of them")
        if labels_start_at < 0:
            raise InputError(f"data.labels_start_at={labels_start_at}: expected 0 or more")
        if ignore_colors and not colors:
            raise InputError("data.ignore_colors is for masks of colours: give data.colors, too")
        if not 0 < val_share < 1:
            raise InputError(f"data.val_share={val_share} is not between 0 and 1")
        self.colors = self._colors_of(colors, "data.colors") if colors else ()
        self.ignore_colors = [check_color(c, "data.ignore_colors") for c in ignore_colors or ()]
        self._color_table = ColorTable(self.colors, self.ignore_colors)
        drawn = palette or colors
        self.palette = (
            self._colors_of(drawn, "data.palette") if drawn else voc_palette(len(self.classes))
        )
        self.values = dict(values) if values else None
        self.labels_start_at = labels_start_at
        self.images_dir, self.masks_dir, self.mask_suffix = images_dir, masks_dir, mask_suffix
        self.marker = "" if Path(images_dir) == Path() else images_dir
        self.lists = dict(lists) if lists else None
        self.allow_overlap = allow_overlap
        self.val_share = val_share
        self.division = ""
        self._unused: list[str] = []
        self._masks = Path()
        super().__init__(root=root, split=split, transform=transform, reading=reading)

    def _colors_of(self, colors: Sequence[Sequence[int]], key: str) -> tuple[Color, ...]:
        if len(colors) != len(self.classes):
            raise InputError(f"{key}: {len(colors)} colours for {len(self.classes)} class names")
        return tuple(check_color(color, key) for color in colors)

    def label_map(self) -> Mapping[int, int]:
        """Returns ``values`` as given, or the classes in order; 255 is IGNORE unless mapped."""
        if self.values is not None:
            return {IGNORE: IGNORE, **self.values}
        first = self.labels_start_at
        below = dict.fromkeys(range(first), IGNORE)
        return {IGNORE: IGNORE, **below, **{first + i: i for i in range(len(self.classes))}}

    def decode_labels(self, path: Path) -> np.ndarray:
        """Reads numbers, or colours where ``colors`` says what they mean, or an array file."""
        if path.suffix.lower() == ".npy":
            return read_array(path)
        if not self.colors:
            return super().decode_labels(path)
        pixels = read_colors(path, max_pixels=self.reading.max_pixels)
        return self._color_table.decode(pixels, path)

    @property
    def label_hint(self) -> str:  # type: ignore[override]
        """What to do about a value without meaning: it depends on what was said of values."""
        if self.values is None:
            return (
                "; classes count from 0; other values are mapped with data.values={0:0,VALUE:1}, "
                "or with data.labels_start_at=1 where classes count from 1 and 0 is no class"
            )
        hint = "; data.values does not list it: add it there, with a class or 255 to ignore it"
        if len(self.values) != 2:  # smoothed edges of several values cannot be told apart
            return hint
        first, last = sorted(self.values)
        return (
            f"{hint}; if edges were smoothed, save the masks without, or as "
            f"numpy.where(mask > {(first + last) // 2}, {last}, {first}).astype('uint8')"
        )

    def find_items(self) -> list[Item]:
        """Returns the pictures of the split with the masks of the same relative names."""
        if self.lists is not None:
            return self._listed_items(self.lists)
        places = self._places()
        if places:
            return self._pairs(*places[self.split]) if self.split in places else []
        images, masks = self.root / self.images_dir, self.root / self.masks_dir
        if self.split == "test":
            raise InputError(f"{self}: {images} has no folder for the split 'test'")
        items = self._pairs(images, masks)
        chosen = self._chosen_for_val([item.name for item in items])
        if items:
            self.division = (
                f"{len(items)} images and no folders for splits: by a hash of their names "
                f"{len(chosen)} are val and {len(items) - len(chosen)} train; images that are "
                "added may move some, and lists freeze them: tools/check_data.py writes both"
            )
        return [item for item in items if (item.name in chosen) == (self.split == "val")]

    def _places(self) -> dict[str, tuple[Path, Path]]:
        """Returns the folders of images and masks of each split; empty without such folders."""
        images, masks = self.root / self.images_dir, self.root / self.masks_dir
        if inside := _split_folders(images):
            labels = _split_folders(masks)
            return {s: (images / n, masks / labels.get(s, n)) for s, n in inside.items()}
        around = {s: self.root / name for s, name in _split_folders(self.root).items()}
        return {
            split: (folder / self.images_dir, folder / self.masks_dir)
            for split, folder in around.items()
            if (folder / self.images_dir).is_dir()
        }

    def _pairs(self, images: Path, masks: Path) -> list[Item]:
        """Returns all pictures of a folder with their masks, whether or not those are there."""
        found = find_files(images)
        labels = find_files(masks, (_last_suffix(self.mask_suffix),))
        if images == masks:
            own = {name for name in found if self._is_mask(name)}
            found = [name for name in found if name not in own]
        # PNG in the place of png: the suffix of a mask may have capitals, as that of an image.
        real = {self._plain(name): name for name in labels if self._is_mask(name)}
        items = [_item(images, masks, name, self.mask_suffix, real) for name in found]
        first = {item.name: item for item in items}
        for item in items:
            if first[item.name] is not item:
                raise InputError(
                    f"{item.image} and {first[item.name].image} would share the mask {item.mask}: "
                    "names must differ in more than their suffix"
                )
        self._unused = []
        if images != masks:
            used = {item.mask for item in items}
            mine = (name for name in labels if self._is_mask(name))
            self._unused = [name for name in mine if f"{masks}/{name}" not in used]
            self._masks = masks
            if self._unused:
                self.notes.append(unused_note(masks, self._unused))
        return items

    def _is_mask(self, name: str) -> bool:
        """Tells whether a name ends as those of masks do; capitals in its suffix do not matter."""
        return self._plain(name).endswith(self.mask_suffix)

    def _plain(self, name: str) -> str:
        """Returns a name with its suffix written as in ``mask_suffix``."""
        suffix = _last_suffix(self.mask_suffix)
        end = self.mask_suffix[len(self.mask_suffix) - len(suffix) :]
        return name[: len(name) - len(suffix)] + end if name.lower().endswith(suffix) else name

    def _chosen_for_val(self, names: Sequence[str]) -> set[str]:
        """Returns which names are val: the first round(n * val_share) by their hash, 1 to n - 1."""
        ordered = sorted(names, key=lambda name: (hashlib.sha256(os.fsencode(name)).digest(), name))
        count = round(len(ordered) * self.val_share)
        return set(ordered[: max(0, min(max(count, 1), len(ordered) - 1))])

    def nearby(self) -> str:
        """Says why a split has no images, and what may be meant."""
        if self.lists is not None:
            return ""
        if places := self._places():
            if self.split in places:
                return f": {places[self.split][0]} has none"
            first = next(iter(places))
            images, masks = (path.relative_to(self.root).as_posix() for path in places[first])
            there = ", ".join(str(path.relative_to(self.root)) for path, _ in places.values())
            return (
                f", which has {there}: add one for {self.split}, or divide {images} by a hash of "
                f"the names with {_as_settings(images, masks)}"
            )
        folder = self.root / self.images_dir
        if folder.is_dir() and (count := len(find_files(folder))):
            return f": {count} image was found, and two splits need two or more"
        return _similar(self.root, self.images_dir, self.masks_dir) or super().nearby()

    def other_labels(self) -> str:
        """Says how the label files are called that no image has."""
        if not self._unused:
            around = self.root if (self.root / self.images_dir).is_dir() else self._masks.parent
            is_told = self.lists is not None or (around / self.masks_dir).is_dir()
            return "" if is_told else _other_masks(around, self.images_dir, self.masks_dir)
        names, lonely = ", ".join(self._unused[:3]), self.items[self.items.without_label()[0]]
        numbers = re.findall(r"\d+", lonely.name)
        alike = [name for name in self._unused if numbers and re.findall(r"\d+", name) == numbers]
        pair = (
            os.path.relpath(path, self.root)
            for path in (lonely.image, self._masks / (alike or ["<its mask>"])[0])
        )
        return (
            f"; {self._masks} has {names}: give them the names of their images, or name pairs in "
            f"data.lists, a line each: {' '.join(pair)}"
        )

    def _listed_items(self, lists: Mapping[str, str]) -> list[Item]:
        """Returns the pictures of the list of this split, each once."""
        strange = sorted(set(lists) - set(self.splits))
        if strange or self.split not in lists:
            raise InputError(
                f"data.lists has the splits {', '.join(map(str, lists))}; expected some of "
                f"{', '.join(self.splits)}, and {self.split!r} is needed now"
            )
        below = find_files(self.root / self.images_dir)
        by_name = {name: name for name in below} | {_stem(name): name for name in below}
        needed = [self.split] if self.allow_overlap else list(lists)
        labels = find_files(self.root / self.masks_dir, (_last_suffix(self.mask_suffix),))
        real = {self._plain(name): name for name in labels if self._is_mask(name)}
        listed = {split: self._read_pairs(split, lists[split], by_name, real) for split in needed}
        _check_overlap(list(listed.values()))
        own = listed[self.split]
        items = {pair.item.image: pair.item for pair in own}
        if len(items) < len(own):
            counts = Counter(pair.item.image for pair in own)
            twice = [Path(image).name for image in items if counts[image] > 1]
            self.notes.append(
                f"{own[0].source}: {len(twice)} images stand there more than once and count once: "
                f"{', '.join(twice[:5])}"
            )
        return list(items.values())

    def _read_pairs(
        self, split: str, file: str, by_name: Mapping[str, str], real: Mapping[str, str]
    ) -> list["_Listed"]:
        """Reads a list; images must exist, masks are looked for later."""
        source = read_list(self.root / Path(file).expanduser())
        images, masks = self.root / self.images_dir, self.root / self.masks_dir
        pairs = []
        for line, number in source.entries:
            where = f"{source.path}, line {number}"
            two = _PAIR.fullmatch(line)
            if two:
                for part in (two["image"], two["mask"]):
                    if PurePosixPath(part).is_absolute() or ".." in PurePosixPath(part).parts:
                        raise InputError(f"{where}: the path {part!r} leaves {self.root}")
                image = self.root / two["image"]
                item = Item(str(image), str(self.root / two["mask"]), _stem(two["image"]))
                exists = image.is_file()
            else:
                exists = line in by_name
                item = _item(images, masks, by_name.get(line, line), self.mask_suffix, real)
            if not exists:
                raise InputError(f"{where} names {line!r}, but there is no image {item.image}")
            pairs.append(_Listed(item, split, source.path, number))
        return pairs


class _Listed(NamedTuple):
    """A pair and where it is named."""

    item: Item
    split: str
    source: Path
    line: int


def _check_overlap(lists: Sequence[Sequence[_Listed]]) -> None:
    """Refuses a picture in two lists: what is trained on must not be scored."""
    seen: dict[str, _Listed] = {}
    shared: dict[str, tuple[_Listed, _Listed]] = {}
    for pairs in lists:
        for pair in pairs:
            first = seen.setdefault(pair.item.image, pair)
            if first.split != pair.split:
                shared.setdefault(pair.item.image, (first, pair))
    if shared:
        one, other = next(iter(shared.values()))
        names = ", ".join(Path(image).name for image in list(shared)[:5])
        raise InputError(
            f"data.lists: {len(shared)} images stand in the lists of two splits: {names}; the "
            f"first in {one.source}, line {one.line}, and {other.source}, line {other.line}; "
            "take them out of one list, or set data.allow_overlap=true to allow it on purpose"
        )


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _item(images: Path, masks: Path, name: str, mask_suffix: str, real: Mapping[str, str]) -> Item:
    """Makes the pair of an image; ``real``: how a mask's name is written on disk."""
    stem = _stem(name)
    mask = f"{stem}{mask_suffix}"
    return Item(f"{images}/{name}", f"{masks}/{real.get(mask, mask)}", stem)


def _last_suffix(name: str) -> str:
    """Returns the suffix in lower case, or all of a name that has none."""
    return os.path.splitext(f"x{name}")[1].lower() or name


def _split_folders(parent: Path) -> dict[str, str]:
    """Returns split -> the name of its folder, of those that are there.

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


def _similar(root: Path, images_dir: str, masks_dir: str) -> str:
    """Names folders that may be meant: the same in other letters, else those with pictures."""
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    close = {name.lower(): name for name in folders}
    if close.get(images_dir.lower(), images_dir) != images_dir and masks_dir.lower() in close:
        return f"; set {_as_settings(close[images_dir.lower()], close[masks_dir.lower()])}"
    found = {name: find_files(root / name) for name in folders}
    # A folder with a tree of its own is another data set.
    filled = [n for n in folders if found[n] and not (root / n / images_dir).is_dir()]
    if filled and all(name.lower() in _SPLIT_OF for name in filled):
        suffix = _suffix_of_masks(found[filled[0]])
        suffix = shlex.quote(f"data.mask_suffix={suffix}") * bool(suffix)
        return f"; set data.images_dir=. data.masks_dir=. {suffix}" * bool(suffix)
    if len(filled) < 2:
        return ""
    # Masks are PNG, which photographs seldom are, and mostly of one channel.
    are_png = {name: all(file.lower().endswith(".png") for file in found[name]) for name in filled}
    filled.sort(key=lambda name: (are_png[name], not _is_coloured(root / name / found[name][0])))
    return (
        f"; the folders with pictures are {', '.join(filled[:6])}: set data.images_dir and "
        f"data.masks_dir, as in {_as_settings(filled[0], filled[1])}"
    )


def _is_coloured(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return picture.mode in ("RGB", "RGBA", "CMYK", "YCbCr")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _other_masks(around: Path, images_dir: str, masks_dir: str) -> str:
    """Names a folder that may have the masks, where the one that was looked in is not there."""
    others = (p for p in sorted(around.iterdir()) if p.is_dir() and p.name != images_dir)
    filled = next((path.name for path in others if find_files(path)), None)
    if filled is None:
        return ""
    return f"; there is no folder {masks_dir}: set {_as_settings(images_dir, filled)}"


def _as_settings(images_dir: str, masks_dir: str) -> str:
    """Writes where images and masks are as settings that a shell takes."""
    settings = (f"data.images_dir={images_dir}", f"data.masks_dir={masks_dir}")
    return " ".join(map(shlex.quote, settings))


def _suffix_of_masks(names: Sequence[str]) -> str:
    """Returns what most masks end with that lie beside their images; empty if none do."""
    stems = {_stem(name) for name in names if not name.lower().endswith(".png")} or set(
        map(_stem, names)
    )
    ends = Counter(
        name[len(stem) :]
        for stem in stems
        for name in names
        if name.lower().endswith(".png") and name.startswith(stem) and _stem(name) != stem
    )
    return ends.most_common(1)[0][0] if ends else ""
