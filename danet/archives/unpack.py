"""Unpacking that resumes after it was killed.

Members are written to a hidden staging folder in the target, ``.unpacking-<archive>``, and each
complete one is recorded in a journal. At the end they are renamed to their places, so that a file
with its final name is always complete.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from danet.archives.members import Listing, explain_damage, read_contents
from danet.archives.rules import Member
from danet.errors import InputError, StorageError
from danet.filesystem import file_lock

_BLOCK = 2**20
_OVERHEAD = 4096
"""Bytes that a file takes on a disk beside its contents, roughly."""


class Unpacked(NamedTuple):
    """Numbers of unpacked files."""

    written: int
    resumed: int
    """Those of them that an earlier, interrupted run had written."""
    present: int
    """Files that existed before, with the same size."""


Progress = Callable[[int], Any]
"""Called with numbers of bytes as they are written or found."""


def unpack(
    listing: Listing, targets: Mapping[str, str], root: Path, progress: Progress
) -> Unpacked:
    """Unpack members below ``root``; resume where an earlier run stopped.

    Args:
        listing: A validated archive.
        targets: Path of a member -> path below root, with forward slashes; others are left out.
        root: Created if it does not exist.
        progress: Called as bytes are written or found.

    Raises:
        InputError: The archive is damaged, or a different file is in the place of a member. What
            was unpacked is removed.
        StorageError: No space or no permission; a second run resumes.
    """
    wanted = {m.number: targets[m.path] for m in listing.members if m.path in targets}
    sizes = {m.number: m.size for m in listing.members}
    present = {n for n, target in wanted.items() if _is_present(root / target, sizes[n], listing)}
    missing = {n: target for n, target in wanted.items() if n not in present}
    for number in present:
        progress(sizes[number])
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    staging = root / f".unpacking-{listing.path.name}"
    with _explain_storage(root):
        if not missing:
            shutil.rmtree(staging, ignore_errors=True)
            return Unpacked(0, 0, len(present))
        root.mkdir(parents=True, exist_ok=True)
        staging.mkdir(mode=0o700, exist_ok=True)
        with (staging / "journal").open("a+b", buffering=0) as journal:
            _lock(journal, staging)
            try:
                done = _write_missing(listing, missing, staging, journal, progress)
            except (InputError, StorageError) as error:
                if isinstance(error, InputError) or not any((staging / "files").iterdir()):
                    shutil.rmtree(staging, ignore_errors=True)
                    for folder in made:
                        with contextlib.suppress(OSError):
                            folder.rmdir()
                raise
            if hasattr(os, "sync"):  # else a power cut could leave empty files under final names
                os.sync()
            _move_into(staging / "files", root)
        shutil.rmtree(staging)
    return Unpacked(len(missing), done, len(present))


def _write_missing(
    listing: Listing,
    missing: Mapping[int, str],
    staging: Path,
    journal: IO[bytes],
    progress: Progress,
) -> int:
    """Write the missing members to the staging folder; return how many were complete already."""
    done = _resume(listing, missing, staging, journal)
    todo = {number: target for number, target in missing.items() if number not in done}
    sizes = {m.number: m.size for m in listing.members}
    for number in done:
        progress(sizes[number])
    needed = sum(sizes[number] + _OVERHEAD for number in todo)
    free = shutil.disk_usage(staging).free
    if needed > free:
        raise StorageError(
            f"root={staging.parent}: {listing.path.name} needs {needed:,} bytes more there, "
            f"{free:,} are free"
        )
    written = 0
    for member, content in read_contents(listing, todo.keys()):
        path = staging / "files" / todo[member.number]
        path.parent.mkdir(parents=True, exist_ok=True)
        crc = _copy(listing, member, content, path, progress)
        journal.write(json.dumps([member.number, member.size, crc]).encode() + b"\n")
        written += 1
    if written != len(todo):
        raise InputError(f"{listing.path}: it was changed while it was unpacked")
    return len(done)


def _copy(
    listing: Listing, member: Member, content: IO[bytes], path: Path, progress: Progress
) -> int:
    """Write a member and return its CRC-32; raise InputError if its size is not the listed one."""
    size = crc = 0
    with path.open("wb") as file:
        while True:
            with explain_damage(listing.path):
                block = content.read(_BLOCK)
            size += len(block)
            if size > member.size or (not block and size < member.size):
                raise InputError(
                    f"{listing.path}: the member {member.path!r} claims {member.size:,} bytes and "
                    f"has {'more' if size > member.size else f'{size:,}'}"
                )
            if not block:
                return crc
            crc = zlib.crc32(block, crc)
            file.write(block)
            progress(len(block))


def _resume(
    listing: Listing, missing: Mapping[int, str], staging: Path, journal: IO[bytes]
) -> set[int]:
    """Return the numbers of members that an earlier run has written, verified by their CRC-32."""
    status = listing.path.stat()
    identity = [listing.path.name, status.st_size, status.st_mtime_ns]
    journal.seek(0)
    entries = list(_entries(journal.read()))
    if entries[:1] != [identity]:
        shutil.rmtree(staging / "files", ignore_errors=True)
        journal.truncate(0)
        entries = []
        journal.write(json.dumps(identity).encode())
    # Ends a last line that may be truncated, so that the next entry is not joined to it.
    journal.write(b"\n")
    sizes = {m.number: m.size for m in listing.members}
    done = set()
    for number, size, crc in entries[1:]:
        target = missing.get(number)
        if target and size == sizes[number] and _crc(staging / "files" / target) == (size, crc):
            done.add(number)
    (staging / "files").mkdir(exist_ok=True)
    return done


def _entries(text: bytes) -> Iterator[list[Any]]:
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, list) and len(entry) == 3:
                yield entry


def _crc(path: Path) -> tuple[int, int]:
    """Return size and CRC-32 of a file; (-1, 0) if it cannot be read."""
    size = crc = 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                size, crc = size + len(block), zlib.crc32(block, crc)
    except OSError:
        return -1, 0
    return size, crc


def _is_present(path: Path, size: int, listing: Listing) -> bool:
    """Return whether the file exists with the size of its member; raise InputError if another."""
    try:
        found = path.stat().st_size if path.is_file() else -1
    except OSError:
        found = -1
    if found == size:
        return True
    if found >= 0 or os.path.lexists(path):
        what = f"is there with {found:,} bytes" if found >= 0 else "is no file"
        raise InputError(
            f"{path}: {what}, in {listing.path.name} it has {size:,}; move it away or choose "
            "another root"
        )
    return False


def _move_into(source: Path, target: Path) -> None:
    """Move the entries of ``source`` into ``target``, folders as a whole where they are new."""
    for path in sorted(source.iterdir()):
        goal = target / path.name
        if path.is_dir() and goal.is_dir():
            _move_into(path, goal)
        elif os.path.lexists(goal):
            raise StorageError(f"{goal}: is in the way of what was unpacked; move it away")
        else:
            path.rename(goal)


def _lock(journal: IO[bytes], staging: Path) -> None:
    is_free = False
    with contextlib.suppress(OSError):
        is_free = file_lock(journal, wait=False)
    if not is_free:
        raise InputError(f"{staging}: another process unpacks this archive just now")


@contextlib.contextmanager
def _explain_storage(root: Path) -> Iterator[None]:
    try:
        yield
    except (InputError, StorageError):
        raise
    except OSError as error:
        raise StorageError(
            f"root={root}: {error.filename or 'writing'}: {error.strerror or error}; run the same "
            "command again when this is mended: it goes on where it stopped"
        ) from error
