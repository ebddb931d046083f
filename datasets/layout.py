"""Where a data set lies when it does not lie at ``data.root``."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

_LIMIT = 2000
"""Folders that are looked into at most: this only makes a message better."""


def elsewhere(root: Path, marker: str) -> str:
    """Says which folder near ``root`` does have ``marker``; empty where none has.

    Archives get unpacked inside themselves, and a folder too high or too deep gets named: two
    levels up and three down are searched. Where several folders side by side have it, all of them
    are named: one would hide the others.

    Args:
        root: ``data.root``, in which the marker is not.
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
    """Yields the folders of three levels, the nearest first."""
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
