"""Split lists: one name a line, from files that ship with the package or from a user's own."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from danet.datasets.items import Item
from danet.datasets.layout import PairLayout, stem_of
from danet.datasets.listing import IMAGE_SUFFIXES, find_files
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


class Entry(NamedTuple):
    """One name of a list."""

    name: str
    line: int  # counted from 1, for messages


class SplitList(NamedTuple):
    """A list file and its entries."""

    path: Path
    entries: tuple[Entry, ...]

    @property
    def names(self) -> list[str]:
        """The names in the order of the file, without duplicates."""
        return list(dict.fromkeys(entry.name for entry in self.entries))

    @property
    def repeated(self) -> list[str]:
        """The names that occur more than once, in order."""
        counts = Counter(entry.name for entry in self.entries)
        return [name for name, count in counts.items() if count > 1]

    def line_of(self, name: str) -> int:
        """Return the first line with a name."""
        return next(entry.line for entry in self.entries if entry.name == name)

    def require(self, present: Collection[str], *, tried: str) -> None:
        """Raise InputError if names of the list are missing, with the line and the path.

        Args:
            present: The names that have a file.
            tried: The path of a file, with {name} in the name's place.
        """
        missing = [name for name in self.names if name not in present]
        if missing:
            first = missing[0]
            raise InputError(
                f"{self.path}: line {self.line_of(first)} names {first}, but there is no "
                f"{tried.format(name=first)} ({len(missing)} of {len(self.names)} names have no "
                "such file)"
            )


def read_list(path: Path) -> SplitList:
    """Read a list without blank lines, blanks around names, CRLF and a byte-order mark.

    Raises:
        InputError: It cannot be read, is no text, is empty, or a name leaves the data's folder.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: the list cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the list is not a UTF-8 text ({error.reason})") from error
    # Not splitlines(): it also cuts at characters that a file name may hold.
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    entries = tuple(Entry(name, i) for i, name in enumerate(lines, start=1) if name)
    if not entries:
        raise InputError(f"{path}: the list is empty; expected one name a line")
    for name, line in entries:
        if _OUTSIDE.match(name):
            raise InputError(f"{path}: line {line}: the path {name!r} leaves the data's folder")
    return SplitList(path, entries)


def shipped_list(data_set: str, split: str) -> SplitList:
    """Read the list ``splits/<data_set>/<split>.txt`` of the package."""
    return read_list(SHIPPED / data_set / f"{split}.txt")


class ListedPair(NamedTuple):
    """A pair of files and where a list names it."""

    item: Item
    split: str
    source: Path
    line: int


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

    def read_pairs(
        self, split: str, splits: Sequence[str], root: Path, files: PairLayout
    ) -> list[ListedPair]:
        """Read the list of ``split``, one of ``splits``; images must exist, masks need not.

        Raises:
            InputError: A list or an image is missing, or lists of two splits share a picture.
        """
        lists = self.lists or {}
        if not set(lists) <= set(splits) or split not in lists:
            raise InputError(
                f"data.lists has the splits {', '.join(map(str, lists))}; expected some of "
                f"{', '.join(splits)}, and {split!r} is needed now"
            )
        folders = files.folders(root)
        present = find_files(folders[0])
        by_name = {name: name for name in present} | {stem_of(name): name for name in present}
        on_disk = files.by_name(files.find_masks(folders[1]))
        pairs: dict[str, list[ListedPair]] = {}
        for key in [split] if self.allow_overlap else lists:
            pairs[key] = []
            source = read_list(root / Path(lists[key]).expanduser())
            for line, number in source.entries:
                where = f"{source.path}, line {number}"
                if item := _two_paths(line, root, where):
                    exists = Path(item.image).is_file()
                else:
                    exists = line in by_name
                    item = files.pair(by_name.get(line, line), folders, on_disk)
                if not exists:
                    raise InputError(f"{where} names {line!r}, but there is no image {item.image}")
                pairs[key].append(ListedPair(item, key, source.path, number))
        _check_overlap(pair for listed in pairs.values() for pair in listed)
        return pairs[split]


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


def _check_overlap(pairs: Iterable[ListedPair]) -> None:
    """Raise InputError if two lists share a picture: training data must not be scored."""
    seen: dict[str, ListedPair] = {}
    shared: dict[str, tuple[ListedPair, ListedPair]] = {}
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
