"""Split lists: one name a line, from files that ship with the package or from a user's own."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from danet.datasets.items import Item
from danet.datasets.layout import PairLayout, stem_of
from danet.datasets.listing import IMAGE_SUFFIXES
from danet.errors import InputError

# Folder of the lists that ship with the package; its README.md names their sources.
SHIPPED = Path(__file__).parent / "splits"

# Start of a path that is absolute, on any system, or goes up.
_OUTSIDE = re.compile(r"[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$)")

# A line with the paths of image and mask; both may hold blanks.
_TWO_PATHS = re.compile(
    rf"(?P<image>.+?({'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))}))[\s,;]+(?P<mask>\S.*)",
    re.IGNORECASE,
)


class SplitList(NamedTuple):
    """The names of a list, each once, and where they stand."""

    path: Path
    lines: dict[str, int]
    """Name -> number of its first line, from 1 on; 0 where they stand in no lines."""
    notes: tuple[str, ...] = ()
    """A warning where names stand there twice."""

    def find(self, images: Mapping[str, str], label: Callable[[str], str | None]) -> list[Item]:
        """Return the pairs of the names; none where there is not one image.

        Args:
            images: Name -> path of the images that exist.
            label: From a name to the path of its label, whether or not that exists.

        Raises:
            InputError: Names have no image; with the line and the path of the first.
        """
        if not images:
            return []
        missing = [name for name in self.lines if name not in images]
        if missing:
            line = self.lines[missing[0]]
            place = Path(next(iter(images.values()))).parent / f"{missing[0]}.jpg"
            raise InputError(
                f"{self.path}: {f'line {line} ' * bool(line)}names {missing[0]}, but there is no "
                f"{place} ({len(missing)} of {len(self.lines)} names have no such file)"
            )
        return [Item(images[name], label(name), name) for name in self.lines]


def read_list(path: Path) -> SplitList:
    """Read a list without blank lines, blanks around names, CRLF and a byte-order mark.

    Raises:
        InputError: It cannot be read, is no text, is empty, or a name leaves the data's folder.
    """
    lines: dict[str, int] = {}
    repeated = []
    for name, number in _entries(path):
        if lines.setdefault(name, number) != number:
            repeated.append(name)
    return SplitList(path, lines, _repeated_note(path, repeated))


def find_list(places: Iterable[Path], data_set: str, split: str) -> SplitList:
    """Read the first list of a tree that exists, else the one of the package."""
    own = next(filter(Path.exists, places), None)
    return read_list(own) if own else shipped_list(data_set, split)


def shipped_list(data_set: str, split: str) -> SplitList:
    """Read the list ``splits/<data_set>/<split>.txt`` of the package."""
    return read_list(SHIPPED / data_set / f"{split}.txt")


def _entries(path: Path) -> list[tuple[str, int]]:
    """Return the lines of a list that are not empty, with their numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: the list cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the list is not a UTF-8 text ({error.reason})") from error
    # Not splitlines(): it also cuts at characters that a file name may hold.
    lines = [line.strip() for line in text.split("\n")]
    entries = [(name, i) for i, name in enumerate(lines, start=1) if name]
    if not entries:
        raise InputError(f"{path}: the list is empty; expected one name a line")
    for name, number in entries:
        if _OUTSIDE.match(name):
            raise InputError(f"{path}: line {number}: the path {name!r} leaves the data's folder")
    return entries


def _repeated_note(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return a note on names that stand in a list more than once, or no note."""
    unique = list(dict.fromkeys(names))
    shown = f"images stand there more than once and count once: {', '.join(unique[:5])}"
    return (f"{path}: {len(unique)} {shown}",) if unique else ()


@dataclass(frozen=True)
class SplitRule:
    """How pictures are divided into splits where no folders do it.

    Args:
        lists: Split -> text file, from root on, with a picture a line: its name below images_dir,
            or the paths of image and mask from root on.
        allow_overlap: Whether a picture may stand in several lists.
        val_share: Of a folder without splits, 0..1.

    Raises:
        InputError: ``val_share`` is out of its range.
    """

    lists: Mapping[str, str] | None = None
    allow_overlap: bool = False
    val_share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.val_share < 1:
            raise InputError(f"data.val_share={self.val_share} is not between 0 and 1")

    def choose_val(self, names: Sequence[str]) -> set[str]:
        """Return the names of val: the first round(n * val_share) by their hash, 1 to n - 1."""
        # A hash and not a seed: a picture that is added moves few others between the splits.
        ordered = sorted(names, key=lambda name: (hashlib.sha256(os.fsencode(name)).digest(), name))
        count = round(len(ordered) * self.val_share)
        return set(ordered[: max(0, min(max(count, 1), len(ordered) - 1))])

    def read_items(
        self, split: str, splits: Sequence[str], root: Path, files: PairLayout
    ) -> tuple[list[Item], tuple[str, ...]]:
        """Read the list of ``split``, one of ``splits``; images must exist, masks need not.

        Returns:
            The pairs, each once, and a note on images that stand in the list twice.

        Raises:
            InputError: A list or an image is missing, or lists of two splits share an image.
        """
        lists = self.lists or {}
        if not set(lists) <= set(splits) or split not in lists:
            raise InputError(
                f"data.lists has the splits {', '.join(map(str, lists))}; expected some of "
                f"{', '.join(splits)}, and {split!r} is needed now"
            )
        images, masks = files.folders(root)
        known = files.pairs(images, masks)
        by_name = known | {stem_of(name): item for name, item in known.items()}
        items: dict[str, Item] = {}
        places: dict[str, tuple[str, str]] = {}  # image -> split and line of its list
        repeated, shared = [], []
        for key in [split] if self.allow_overlap else lists:
            path = root / Path(lists[key]).expanduser()
            for line, number in _entries(path):
                where = f"{path}, line {number}"
                item = _two_paths(line, root, where) or by_name.get(line)
                if item is None or not (line in by_name or Path(item.image).is_file()):
                    image = item.image if item else images / line
                    raise InputError(f"{where} names {line!r}, but there is no image {image}")
                first = places.setdefault(item.image, (key, where))
                if first[0] != key:
                    shared.append((Path(item.image).name, first[1], where))
                elif key == split:
                    items[item.image] = item
                    repeated += [Path(item.image).name] * (first[1] != where)
        if shared:
            names = ", ".join(name for name, _, _ in shared[:5])
            raise InputError(
                f"data.lists: {len(shared)} images stand in the lists of two splits: {names}; the "
                f"first in {shared[0][1]}, and {shared[0][2]}; take them out of one list, or set "
                "data.allow_overlap=true to allow it on purpose"
            )
        return list(items.values()), _repeated_note(root / lists[split], repeated)


def _two_paths(line: str, root: Path, where: str) -> Item | None:
    """Return the pair of a line with two paths from ``root`` on; None for other lines."""
    found = _TWO_PATHS.fullmatch(line)
    if found is None:
        return None
    image, mask = found["image"], found["mask"]
    for path in (image, mask):
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise InputError(f"{where}: the path {path!r} leaves {root}")
    return Item(str(root / image), str(root / mask), stem_of(image))
