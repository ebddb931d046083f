"""Unpacking that can be killed at any moment and started again.

Members are written below a hidden folder inside the target, ``.unpacking-<archive>``, and every one
that is complete is entered in a journal. When all are there the folders are renamed to where they
belong, so whatever stands under its final name is whole.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from danet.archives.members import Listing, read_contents, readable
from danet.archives.rules import Member
from danet.errors import InputError, StorageError
from danet.filesystem import file_lock

_BLOCK = 2**20
_OVERHEAD = 4096
"""Bytes that a file takes on a disk beside its own, roughly."""


class Unpacked(NamedTuple):
    """What became of an archive; numbers of files."""

    written: int
    resumed: int
    """Of those, how many an earlier run that was cut off had written."""
    present: int
    """Were there before, with the same size."""


Progress = Callable[[int], Any]
"""Is told bytes as they are written or found."""


def unpack(listing: Listing, targets: Mapping[str, str], root: Path, seen: Progress) -> Unpacked:
    """Unpacks members to where they belong below ``root``; goes on where an earlier run stopped.

    Args:
        listing: A judged archive.
        targets: Path of a member -> path below root, with forward slashes; others are left out.
        root: Is made if it does not exist.
        seen: Progress.

    Raises:
        InputError: The archive turns out damaged, or another file is where a member belongs. What
            was unpacked of it is removed.
        StorageError: No space, no permission. Run again: it goes on.
    """
    wanted = {m.number: targets[m.path] for m in listing.members if m.path in targets}
    sizes = {m.number: m.size for m in listing.members}
    present = {n for n, target in wanted.items() if _is_present(root / target, sizes[n], listing)}
    missing = {n: target for n, target in wanted.items() if n not in present}
    for number in present:
        seen(sizes[number])
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    stage = root / f".unpacking-{listing.path.name}"
    with _storage(root):
        if not missing:
            shutil.rmtree(stage, ignore_errors=True)
            return Unpacked(0, 0, len(present))
        root.mkdir(parents=True, exist_ok=True)
        stage.mkdir(mode=0o700, exist_ok=True)
        with (stage / "journal").open("a+b", buffering=0) as journal:
            _lock(journal, stage)
            try:
                done = _fill(listing, missing, stage, journal, seen)
            except (InputError, StorageError) as error:
                if isinstance(error, InputError) or not any((stage / "files").iterdir()):
                    shutil.rmtree(stage, ignore_errors=True)
                    for folder in made:
                        with contextlib.suppress(OSError):
                            folder.rmdir()
                raise
            if hasattr(os, "sync"):  # else a power cut could leave empty files under final names
                os.sync()
            _place(stage / "files", root)
        shutil.rmtree(stage)
    return Unpacked(len(missing), done, len(present))


def _fill(
    listing: Listing,
    missing: Mapping[int, str],
    stage: Path,
    journal: IO[bytes],
    seen: Progress,
) -> int:
    """Writes the missing members below the stage; returns how many were there already."""
    done = _resume(listing, missing, stage, journal)
    todo = {number: target for number, target in missing.items() if number not in done}
    sizes = {m.number: m.size for m in listing.members}
    for number in done:
        seen(sizes[number])
    needed = sum(sizes[number] + _OVERHEAD for number in todo)
    free = shutil.disk_usage(stage).free
    if needed > free:
        raise StorageError(
            f"root={stage.parent}: {listing.path.name} needs {needed:,} bytes more there, "
            f"{free:,} are free"
        )
    written = 0
    for member, content in read_contents(listing, todo.keys()):
        path = stage / "files" / todo[member.number]
        path.parent.mkdir(parents=True, exist_ok=True)
        crc = _copy(listing, member, content, path, seen)
        journal.write(json.dumps([member.number, member.size, crc]).encode() + b"\n")
        written += 1
    if written != len(todo):
        raise InputError(f"{listing.path}: it was changed while it was unpacked")
    return len(done)


def _copy(listing: Listing, member: Member, content: IO[bytes], path: Path, seen: Progress) -> int:
    """Writes a member and returns its CRC-32; counts what comes out, whatever the header says."""
    size = crc = 0
    with path.open("wb") as file:
        while True:
            with readable(listing.path):
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
            seen(len(block))


def _resume(
    listing: Listing, missing: Mapping[int, str], stage: Path, journal: IO[bytes]
) -> set[int]:
    """Returns the members that an earlier run has written, each read again and found whole."""
    status = listing.path.stat()
    identity = [listing.path.name, status.st_size, status.st_mtime_ns]
    journal.seek(0)
    entries = list(_entries(journal.read()))
    if entries[:1] != [identity]:
        shutil.rmtree(stage / "files", ignore_errors=True)
        journal.truncate(0)
        entries = []
        journal.write(json.dumps(identity).encode())
    # A last line that was cut short must not swallow the next one.
    journal.write(b"\n")
    sizes = {m.number: m.size for m in listing.members}
    done = set()
    for number, size, crc in entries[1:]:
        target = missing.get(number)
        if target and size == sizes[number] and _crc(stage / "files" / target) == (size, crc):
            done.add(number)
    (stage / "files").mkdir(exist_ok=True)
    return done


def _entries(text: bytes) -> Iterator[list[Any]]:
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, list) and len(entry) == 3:
                yield entry


def _crc(path: Path) -> tuple[int, int]:
    """Returns size and CRC-32 of a file; (-1, 0) if there is none."""
    size = crc = 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                size, crc = size + len(block), zlib.crc32(block, crc)
    except OSError:
        return -1, 0
    return size, crc


def _is_present(path: Path, size: int, listing: Listing) -> bool:
    """Tells whether a file is there already, with the size of its member."""
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


def _place(source: Path, target: Path) -> None:
    """Renames what lies in ``source`` into ``target``: whole folders where they are new there."""
    for path in sorted(source.iterdir()):
        goal = target / path.name
        if path.is_dir() and goal.is_dir():
            _place(path, goal)
        elif os.path.lexists(goal):
            raise StorageError(f"{goal}: is in the way of what was unpacked; move it away")
        else:
            path.rename(goal)


def _lock(journal: IO[bytes], stage: Path) -> None:
    is_free = False
    with contextlib.suppress(OSError):
        is_free = file_lock(journal, wait=False)
    if not is_free:
        raise InputError(f"{stage}: another process unpacks this archive just now")


@contextlib.contextmanager
def _storage(root: Path) -> Iterator[None]:
    try:
        yield
    except (InputError, StorageError):
        raise
    except OSError as error:
        raise StorageError(
            f"root={root}: {error.filename or 'writing'}: {error.strerror or error}; run the same "
            "command again when this is mended: it goes on where it stopped"
        ) from error
