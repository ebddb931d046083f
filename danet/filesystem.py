"""Atomic writes, file locks, folders of results, and errors of the file system."""

import csv
import errno
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from danet.errors import InputError, StorageError

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of a disk that is full or may not be written."""


@contextmanager
def atomic_write(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it on success, remove it on failure.

    Args:
        path: Replaced as a whole; a reader never finds half a file.
        durable: Whether file and folder are flushed to the disk, to survive a power cut, and other
            processes may write the file, too. The temporary name is then ``.NAME.PID.tmp``; else
            ``.NAME``, whose suffix libraries recognise and whose leftover, of a process that was
            killed, the next write replaces.
    """
    ending = f".{os.getpid()}.tmp" if durable else ""
    temporary = path.with_name(f".{path.name}{ending}")
    try:
        yield temporary
        if durable:
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable and os.name == "posix":  # elsewhere folders cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def file_lock(handle: int | IO[Any], *, exclusive: bool = True, wait: bool = True) -> bool:
    """Lock an open file until it is closed; return False if another process holds the lock.

    Forked processes share the lock of a file they inherit. A lock that is not ``exclusive`` keeps
    out exclusive ones alone; without ``wait`` the answer comes at once. A file system without locks
    raises OSError; on Windows nothing is locked and all succeed.
    """
    if os.name != "posix":
        return True
    import fcntl  # not on Windows

    operation = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        fcntl.flock(handle, operation | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def explain_storage(error: OSError) -> StorageError | None:
    """Return a one-line error for what the file system refused; None for any other error."""
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    if error.errno == errno.ENAMETOOLONG:
        longest = max((len(os.fsencode(part)) for part in name.split(os.sep)), default=0)
        reason = (
            f": a part of it has {longest} bytes and all of it {len(os.fsencode(name))}, and most "
            "file systems take 255 and 4096; give a shorter one"
        )
    elif error.errno in (errno.EINVAL, errno.EILSEQ) and name:
        reason = "; use letters, digits, dots, dashes and underscores"
    else:
        reason = f"{name or 'writing'}: {error.strerror}"
        return StorageError(reason) if error.errno in _REFUSED else None
    shown = name if len(name) <= 60 else f"{name[:60]}..."
    return StorageError(f"{shown}: the file system refuses this name ({error.strerror}){reason}")


@contextmanager
def storage_errors(path: Path, key: str = "") -> Iterator[None]:
    """Raise StorageError with the path, and the setting that named it, if it cannot be written."""
    try:
        yield
    except OSError as error:
        reason = explain_storage(error) or f"{path}: cannot be written ({error.strerror})"
        raise StorageError(f"{key}{reason}") from error


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file of results and the folders above it; raise StorageError."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_table(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write rows as CSV; a text that a spreadsheet would take for a formula gets a quote before."""
    table = io.StringIO()
    for row in rows:
        cells = (f"'{x}" if isinstance(x, str) and x[:1] in tuple("=+-@") else x for x in row)
        csv.writer(table, lineterminator="\n").writerow(cells)
    write_file(path, table.getvalue())


def folder_of(wanted: Path, file: str, facts: Mapping[str, Any]) -> Path:
    """Return the first of ``wanted``, ``wanted-2``, ... that holds no results of other inputs.

    A JSON ``file`` in it has facts of its results, such as their checkpoint; ``facts`` are those
    of the new ones. Missing facts match, and so does a file that cannot be read.
    """
    plain = json.loads(json.dumps(facts))
    folder, number = wanted, 1
    while True:
        try:
            found = json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none is there, or half a file
            return folder
        if isinstance(found, dict) and all(found.get(k) in (None, plain[k]) for k in plain):
            return folder
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")


def require_writable(folder: Path, key: str = "output") -> None:
    """Refuse a folder, of the setting ``key``, before hours of work rather than after them.

    The folder and a file in it are created and removed again; raises StorageError.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    probe = folder / f".probe-{os.getpid()}"
    try:
        with storage_errors(folder, f"{key}="):
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(bytes(4096))
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
        for path in made:
            with suppress(OSError):
                path.rmdir()


def refuse_name(key: str, value: str) -> None:
    """Raise StorageError for a name that the file system refuses, InputError for no such user."""
    try:
        path = os.path.expanduser(value.strip("'\""))
        if path.startswith("~"):
            raise InputError(
                f"{key}={value}: there is no such user; write ./~ for a name that begins with ~"
            )
        os.lstat(path)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ):
            raise StorageError(f"{key}={explain_storage(error)}") from error
