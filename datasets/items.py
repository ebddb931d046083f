"""The pairs of a split in compact arrays: 600,000 of them take 25 MB instead of 300."""

import bisect
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

_CODEC = ("utf-8", "surrogateescape")  # not the system's: names come from lists as well


class Item(NamedTuple):
    """A pair of files, as absolute paths."""

    image: str
    mask: str | None  # None in a split whose labels the publisher keeps
    name: str  # unique within the split; used for predictions and in messages


class Items:
    """A sequence of Item, sorted by name, whose texts lie in one buffer.

    Most paths are a folder, the name, and an ending that hundreds share, so an item is its name and
    the number of a frame: both paths with NUL in place of the name. Worker processes share the
    memory of a few large arrays, which have no reference counts inside, and pickle them fast.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        frames: dict[tuple[str, str | None], int] = {}
        found: list[tuple[bytes, int]] = []
        for image, mask, name in items:
            frame = _without(name, image), None if mask is None else _without(name, mask)
            found.append((name.encode(*_CODEC), frames.setdefault(frame, len(frames))))
        found.sort()  # UTF-8 sorts like code points
        self._frames = list(frames)
        self._numbers = np.array([number for _, number in found], np.int32)
        self._names = b"".join(name for name, _ in found)
        self._ends = np.cumsum([len(name) for name, _ in found], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Item]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Item:
        i = range(len(self))[index]  # resolves negative indices and raises IndexError
        name = self._names[self._ends[i - 1] if i else 0 : self._ends[i]].decode(*_CODEC)
        image, mask = self._frames[self._numbers[i]]
        return Item(image.replace("\0", name), mask and mask.replace("\0", name), name)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that depend on the names of the items."""
        digest = hashlib.sha256(self._names)
        digest.update(self._ends.tobytes())
        return digest.hexdigest()[:16]

    def without_label(self) -> list[int]:
        """Return the indices of items whose label file does not exist.

        Folders are listed: one ``stat`` per file would take minutes on a network disk.
        """
        there: set[str] = set()
        for folder in {os.path.dirname(item.mask) for item in self if item.mask}:
            with suppress(OSError), os.scandir(folder) as entries:
                there.update(entry.path for entry in entries if not entry.is_symlink())
        # Links are checked one by one, as are names that differ in case, which some disks find.
        found = ((i, item.mask) for i, item in enumerate(self) if item.mask not in there)
        return [i for i, mask in found if mask and not os.path.exists(mask)]


class JoinedItems(Items):
    """The items of several data sets, one after the other.

    The name of an item begins with the entry of its data set in ``places``, which may be empty.
    """

    def __init__(self, parts: Sequence[Items], places: Sequence[str]) -> None:
        self._parts, self._places = parts, places
        self._firsts = [0, *itertools.accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._firsts[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the data set of an item, and the index there."""
        i = range(len(self))[index]
        part = bisect.bisect_right(self._firsts, i) - 1
        return part, i - self._firsts[part]

    def __getitem__(self, index: int) -> Item:
        part, i = self.locate(index)
        item = self._parts[part][i]
        return item._replace(name=f"{self._places[part]}{item.name}")

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that depend on the names, not on where the data sets lie."""
        text = " ".join(part.fingerprint() for part in self._parts)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without(name: str, path: str) -> str:
    """Return a path with NUL in place of the last occurrence of a name."""
    return "\0".join(path.rsplit(name, 1)) if name else path
