"""Where results go, and what a file system refuses: no room, no permission, a name."""

import errno
import itertools
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from danet.errors import StorageError

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What the system says when something cannot be written."""


def explain_storage(error: OSError) -> StorageError | None:
    """Return in one line what the file system refused; None for an error of another kind."""
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    if error.errno == errno.ENAMETOOLONG:
        longest = max((len(os.fsencode(part)) for part in name.split(os.sep)), default=0)
        return StorageError(
            f"{name[:60]}...: the file system refuses this name ({error.strerror}): a part of it "
            f"has {longest} bytes and all of it {len(os.fsencode(name))}, and most file systems "
            "take 255 and 4096; give a shorter one"
        )
    if error.errno in (errno.EINVAL, errno.EILSEQ) and name:
        return StorageError(
            f"{name}: the file system refuses this name ({error.strerror}); use letters, digits, "
            "dots, dashes and underscores"
        )
    if error.errno in _REFUSED:
        return StorageError(f"{name or 'writing'}: {error.strerror}")
    return None


def folder_of(wanted: Path, file: str, facts: Mapping[str, Any]) -> Path:
    """Return a folder in which no results of anything else lie.

    Args:
        wanted: The folder; ``wanted-2``, ``wanted-3``, ... are tried where others are there.
        file: JSON in such a folder that states what its results are of. A fact that it does not
            know is no other one; nor is anything stated by a file that cannot be read.
        facts: What the new results are of.
    """
    told = json.loads(json.dumps(facts))
    for number in itertools.count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            found = json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none is there, or half a file
            return folder
        if isinstance(found, dict) and all(found.get(k) in (None, told[k]) for k in told):
            return folder
    raise AssertionError


def require_writable(folder: Path, key: str = "output") -> None:
    """Refuse a folder that could not be written, before hours of work and not after them.

    It is made, a file is written in it and removed, and so is what was made.

    Args:
        folder: Where results are going to be.
        key: The setting that named it, for messages.

    Raises:
        StorageError: It cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
    except OSError as error:
        explained = explain_storage(error)
        reason = explained or f"cannot be written ({error.strerror})"
        raise StorageError(
            f"{key}={reason}" if explained else f"{key}={folder}: {reason}"
        ) from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
        for path in made:
            with suppress(OSError):
                path.rmdir()


def refuse_name(key: str, value: str) -> None:
    """Refuse a path that the file system takes for no name.

    Raises:
        StorageError: With the lengths that it has and may have.
    """
    try:
        os.lstat(os.path.expanduser(value.strip("'\"")))
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ):
            raise StorageError(f"{key}={explain_storage(error)}") from error
