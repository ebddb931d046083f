"""Split lists: one name a line, from files that ship with the package or from a user's own."""

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from danet.errors import InputError

SHIPPED = Path(__file__).parent / "splits"
"""Folder of the lists that ship with the package; its README.md names their sources."""

_LEAVES = re.compile(r"[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$)")
"""Begins a path that is absolute, on any system, or goes up."""


class Entry(NamedTuple):
    """One name of a list."""

    name: str
    line: int
    """Counted from 1, for messages."""


class SplitList(NamedTuple):
    """A list file and what stands in it."""

    path: Path
    entries: tuple[Entry, ...]

    @property
    def names(self) -> list[str]:
        """The names in the order of the file, each once: a second mention adds no picture."""
        return list(dict.fromkeys(entry.name for entry in self.entries))

    @property
    def repeated(self) -> list[str]:
        """The names that stand there more than once, in order."""
        counts = Counter(entry.name for entry in self.entries)
        return [name for name, count in counts.items() if count > 1]

    def line_of(self, name: str) -> int:
        """Returns the line that a name stands on first."""
        return next(entry.line for entry in self.entries if entry.name == name)

    def demand(self, present: Collection[str], *, tried: str) -> None:
        """Refuses names of the list that are not present.

        Args:
            present: The names that have a file.
            tried: Where the first one was looked for, with {name} in the name's place.

        Raises:
            InputError: Names the list, the line, the path and how many are missing.
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
    """Reads a list; blank lines, blanks around names, CRLF and a byte-order mark are left out.

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
        if _LEAVES.match(name):
            raise InputError(f"{path}: line {line}: the path {name!r} leaves the data's folder")
    return SplitList(path, entries)


def shipped_list(data_set: str, split: str) -> SplitList:
    """Reads the list ``splits/<data_set>/<split>.txt`` of the package."""
    return read_list(SHIPPED / data_set / f"{split}.txt")
