"""Validation of the members of an archive.

Archives are untrusted. The whole table of contents is validated before anything is written: a
single member that is a link, a device, or lies outside of the target refuses the archive. Only the
name and the contents of a member are used, never its mode, owner or time.
"""

import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

from danet.errors import InputError

MAX_MEMBERS = 500_000
"""The largest official archive has 123,287."""
_SMALL = 2**20
"""Bytes; an archive that unpacks to no more than this is no bomb, whatever its ratio."""


class Limits(NamedTuple):
    """Limits of the unpacked size."""

    ratio: float = 200.0
    """Multiple of the size of the archive."""
    total: int = 200 * 2**30
    """Bytes."""


DEFAULT_LIMITS = Limits()


class Member(NamedTuple):
    """A file in an archive."""

    number: int
    """Position in the table of contents, folders included."""
    path: str
    """Relative, with forward slashes, without ``.`` and ``..``."""
    size: int
    """Unpacked bytes according to the archive; verified when unpacking."""


class Validator:
    """Collects the members one after another; refuses the archive at the first invalid one."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self.limits = path, limits
        self.packed = path.stat().st_size
        self.members: list[Member] = []
        self._count = 0
        self._total = 0
        self._paths: dict[str, tuple[str, bool]] = {}  # folded path -> path, whether a folder

    def add(self, name: str, size: int, *, is_folder: bool, other: str = "") -> None:
        """Validate and add a member; ``other`` describes what is neither file nor folder.

        Raises:
            InputError: The member is not allowed.
        """
        number, self._count = self._count, self._count + 1
        if self._count > MAX_MEMBERS:
            raise InputError(f"{self.path}: more than {MAX_MEMBERS:,} members")
        parts = self._parts(name)
        if other:
            self._refuse(name, f"is {other}; only files and folders are unpacked")
        if not parts and not is_folder:
            self._refuse(name, "has no name")
        for end in range(1, len(parts)):
            self._register("/".join(parts[:end]), name, is_folder=True)
        is_new = not parts or self._register("/".join(parts), name, is_folder=is_folder)
        if is_folder:
            return
        if not is_new:
            self._refuse(name, "is there twice")
        if size < 0:
            self._refuse(name, f"claims {size} bytes")
        self._total += size
        self._check_size()
        self.members.append(Member(number, "/".join(parts), size))

    def _check_size(self) -> None:
        total, packed, limits = self._total, self.packed, self.limits
        if total > limits.total or total > max(_SMALL, limits.ratio * packed):
            raise InputError(
                f"{self.path}: has {packed:,} bytes and unpacks to {total:,} or more; at most "
                f"{limits.ratio:g} times its size and {limits.total:,} bytes are unpacked"
            )

    def _parts(self, name: str) -> list[str]:
        if name.startswith("/") or re.match(r"[A-Za-z]:", name):
            self._refuse(name, "has an absolute path")
        if "\\" in name or any(ord(c) < 32 or ord(c) == 127 for c in name):
            self._refuse(name, "has a backslash or a control character in its name")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts:
            self._refuse(name, "leads out of the folder it is unpacked in")
        if len(os.fsencode(name)) > 1000 or any(len(os.fsencode(part)) > 255 for part in parts):
            self._refuse(name, "has a name too long for file systems")
        return parts

    def _register(self, path: str, name: str, *, is_folder: bool) -> bool:
        """Register a path; return False if it is known as the same kind.

        Names that differ only in case or Unicode normalisation are one on many file systems.
        """
        folded = unicodedata.normalize("NFC", path).casefold()
        known = self._paths.get(folded)
        if known is None:
            self._paths[folded] = (path, is_folder)
            return True
        if known[0] != path:
            self._refuse(name, f"and {known[0]!r} differ only in how letters are written")
        if known[1] != is_folder:
            self._refuse(name, f"needs {path!r} as a file and as a folder")
        return False

    def _refuse(self, name: str, what: str) -> None:
        raise InputError(
            f"{self.path}: the member {name!r} {what}; nothing was unpacked; official archives "
            "hold nothing like this"
        )
