"""The pairs of a split in compact arrays: 600,000 of them take 25 MB instead of 300."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple, overload

import numpy as np


class Item(NamedTuple):
    """A pair of files, as absolute paths."""

    image: str
    mask: str | None  # None in a split whose labels the publisher keeps
    name: str  # unique within the split; used for predictions and in messages


class Items(Sequence[Item]):
    """A sequence of Item, sorted by name, whose texts lie in one buffer.

    Nearly every path is a folder, the name, and an ending that hundreds share, so an item is stored
    as its name and the numbers of two such frames; a path without the name is a frame of its own.
    A few large arrays instead of a million small objects: worker processes share their memory,
    since no reference counts are written inside them, and they are pickled in an instant.

    Args:
        items: In any order; may be a generator.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        frames: dict[tuple[str, str, bool], int] = {}
        names: list[bytes] = []
        images, masks = array("i"), array("i")
        for item in items:
            names.append(_pack(item.name))
            images.append(frames.setdefault(_frame(item.image, item.name), len(frames)))
            if item.mask is None:
                masks.append(-1)
            else:
                masks.append(frames.setdefault(_frame(item.mask, item.name), len(frames)))
        order = sorted(range(len(names)), key=names.__getitem__)  # UTF-8 sorts like code points
        self._frames = list(frames)
        self._images = np.frombuffer(images, np.int32)[order] if names else np.empty(0, np.int32)
        self._masks = np.frombuffer(masks, np.int32)[order] if names else np.empty(0, np.int32)
        self._names = b"".join(names[i] for i in order)
        lengths = (len(names[i]) for i in order)
        self._ends = np.fromiter(accumulate(lengths), np.int64, len(names))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]  # resolves negative indices and raises IndexError
        name = self._name(i)
        mask = int(self._masks[i])
        return Item(
            self._path(int(self._images[i]), name),
            None if mask < 0 else self._path(mask, name),
            name,
        )

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that depend on the names of the items."""
        digest = hashlib.sha256(self._names)
        digest.update(self._ends.tobytes())
        return digest.hexdigest()[:16]

    def without_label(self) -> list[int]:
        """Return the indices of items whose label file does not exist.

        Folders are listed: one ``stat`` per file would take minutes on a network disk.
        """
        listed: dict[str, set[str]] = {}
        missing = []
        for i, frame in enumerate(self._masks.tolist()):
            if frame < 0:
                continue
            path = self._path(frame, self._name(i))
            folder, _, file = path.rpartition(os.sep)
            if folder not in listed:
                listed[folder] = _files(folder)
            # Links are checked one by one, as are names that differ in case, which some disks find.
            if file not in listed[folder] and not os.path.exists(path):
                missing.append(i)
        return missing

    def _name(self, i: int) -> str:
        start = int(self._ends[i - 1]) if i else 0
        return self._names[start : int(self._ends[i])].decode("utf-8", "surrogateescape")

    def _path(self, frame: int, name: str) -> str:
        start, end, has_name = self._frames[frame]
        return f"{start}{name}{end}" if has_name else start


def _pack(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _frame(path: str, name: str) -> tuple[str, str, bool]:
    """Return the parts of a path before and after the name, and whether it holds the name."""
    start, found, end = path.rpartition(name) if name else ("", "", path)
    return (start, end, True) if found else (path, "", False)


def _files(folder: str) -> set[str]:
    """Return the names in a folder, without links."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if not entry.is_symlink()}
    except OSError:
        return set()
