"""Unpacking of untrusted archives: zip, tar and tgz.

The whole table of contents is checked before anything is written: a single member that is a link,
a device, or lies outside of the target refuses the archive. Only names and contents are used,
never modes, owners or times. Files are written to a hidden folder, ``.<archive>.partial``, and
renamed when all are complete, so that a file with its final name is never half of one.
"""

import contextlib
import gzip
import io
import os
import platform
import re
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from danet.errors import InputError, StorageError, UserError, first_line
from danet.filesystem import file_lock

_SMALL = 2**20  # bytes; an archive that unpacks to no more is no bomb, whatever its ratio
_MAX_HEADER = 2**20  # bytes of a tar read for one header, in which a name may claim any length
_ODD_NAME = re.compile(r"[\\\x00-\x1f\x7f]|^[A-Za-z]:|[^/]{256}")
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error),
    *(EOFError, ValueError, LookupError, ArithmeticError, RuntimeError, MemoryError),
)
"""Exceptions of the standard library on files that are damaged or forged."""
_Entry = tuple[tarfile.TarInfo, Callable[[], Any]]
"""Name, size and type of a member, and what opens it."""


class Limits(NamedTuple):
    """The most that an archive may hold."""

    ratio: float = 200.0  # unpacked bytes as a multiple of the size of the archive
    total: int = 200 * 2**30  # unpacked bytes
    members: int = 500_000  # the largest official archive has 123,287


DEFAULT_LIMITS = Limits()


def read_table(path: Path, limits: Limits = DEFAULT_LIMITS) -> dict[str, int]:
    """Check every member; return path -> unpacked bytes of all files.

    A tgz is decompressed to its end, which also verifies its checksum.

    Raises:
        InputError: Not an archive, damaged, too large, or with a member that is not allowed; or
            this Python is too old for the filters of tarfile.
    """
    if not hasattr(tarfile, "data_filter"):
        raise InputError(
            f"Python {platform.python_version()} cannot unpack archives safely (PEP 706); take "
            "3.10.12, 3.11.4, 3.12 or later"
        )
    sizes: dict[str, int] = {}
    spellings: dict[str, str] = {}
    with _explain(path):
        packed, total = path.stat().st_size, 0
        for count, (info, _) in enumerate(_entries(path), start=1):
            name = _check(info, spellings)
            if info.isreg():
                if name in sizes:
                    raise tarfile.FilterError(f"the member {info.name!r} is there twice")
                sizes[name] = info.size
                total += info.size
            allowed = min(limits.total, max(_SMALL, limits.ratio * packed))
            if total > allowed or count > limits.members:
                raise InputError(
                    f"{path}: has {packed:,} bytes and {count:,} or more members, and unpacks to "
                    f"{total:,} or more; at most {limits.ratio:g} times its size, "
                    f"{limits.members:,} members and {limits.total:,} bytes are unpacked"
                )
    return sizes


def unpack(
    path: Path,
    sizes: Mapping[str, int],
    targets: Mapping[str, str],
    root: Path,
    progress: Callable[[int], Any],
) -> int:
    """Unpack members below ``root``; return how many files were not there before.

    Args:
        path: The archive.
        sizes: Its checked table of contents.
        targets: Path of a member -> path below root, with forward slashes; others are left out.
        root: Created if it does not exist.
        progress: Called with the size of every file that is written.

    Raises:
        InputError: The archive is damaged, or a different file is in the place of a member. What
            was unpacked is removed.
        StorageError: No space or no permission. What was unpacked is removed.
    """
    missing = {m: to for m, to in targets.items() if not _is_present(root / to, sizes[m], path)}
    if not missing:
        return 0
    with _explain(path), _partial_folder(root, path.name) as folder:
        needed, free = sum(sizes[m] for m in missing), shutil.disk_usage(folder).free
        if needed > free:
            raise StorageError(
                f"root={root}: {path.name} needs {needed:,} bytes more there, {free:,} are free"
            )
        for info, open_member in _entries(path):
            name = str(PurePosixPath(info.name))
            if name in missing and info.isreg():
                file = folder / missing[name]
                file.parent.mkdir(parents=True, exist_ok=True)
                with open_member() as content, file.open("wb") as output:
                    shutil.copyfileobj(content, output)
                    if output.tell() != sizes[name]:  # the table of a zip may be wrong
                        raise EOFError(f"{name!r} has no {sizes[name]:,} bytes")
                progress(sizes[name])
        if hasattr(os, "sync"):  # else a power cut could leave empty files under final names
            os.sync()
        for name, target in missing.items():
            if not _is_present(root / target, sizes[name], path):  # it may have come meanwhile
                (root / target).parent.mkdir(parents=True, exist_ok=True)
                (folder / target).rename(root / target)
    return len(missing)


def _check(info: tarfile.TarInfo, spellings: dict[str, str]) -> str:
    """Return the path of a member; raise FilterError if it is not allowed.

    ``spellings`` has the earlier members and their folders: names that differ only in case or
    Unicode normalisation are one on many file systems.
    """
    member, start = PurePosixPath(info.name), f"the member {info.name!r}"
    is_odd = member.is_absolute() or ".." in member.parts or _ODD_NAME.search(info.name)
    if is_odd or not (member.parts or info.isdir()):
        what = "is absolute, empty, too long, or has .., a backslash or a control character"
        raise tarfile.FilterError(f"{start} {what}")
    if info.issym() or info.islnk() or info.issparse() or info.size < 0:
        raise tarfile.FilterError(f"{start} is a link or special; only files and folders are taken")
    tarfile.data_filter(info, os.devnull)  # nothing is below it, so no link is followed
    places = [f"{folder}/" for folder in member.parents]
    for place in (*places, f"{member}/" if info.isdir() else str(member)):
        folded = unicodedata.normalize("NFC", place).casefold().rstrip("/")
        if (known := spellings.setdefault(folded, place)) != place:
            raise tarfile.FilterError(f"{start} and {known!r} are one name in two ways")
    return str(member)


def _entries(path: Path) -> Iterator[_Entry]:
    """Yield the members in the order of the archive."""
    with path.open("rb") as file:
        head = file.read(2)
        file.seek(0)
        if head == b"PK":
            yield from _zip_entries(file)
        else:
            yield from _tar_entries(gzip.GzipFile(fileobj=file) if head == b"\x1f\x8b" else file)


def _zip_entries(file: IO[bytes]) -> Iterator[_Entry]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            info = tarfile.TarInfo(member.orig_filename)
            info.size = member.file_size
            info.type = tarfile.DIRTYPE if member.is_dir() else tarfile.REGTYPE
            is_plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
            is_readable = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if not is_plain or not is_readable or member.flag_bits & 1:  # 1: encrypted
                info.type = tarfile.SYMTYPE
            yield info, partial(archive.open, member)


def _tar_entries(file: IO[bytes] | gzip.GzipFile) -> Iterator[_Entry]:
    blocks = _Blocks(file)  # type: ignore[arg-type]
    with tarfile.open(fileobj=blocks, mode="r:") as tar:
        while (info := tar.next()) is not None:
            blocks.left = info.size
            yield info, partial(tar.extractfile, info)
            blocks.left = _MAX_HEADER
            tar.members = []  # type: ignore[attr-defined]  # to bound memory
    # tarfile takes an unreadable header and a truncated file for the end of the archive.
    if blocks.last != bytes(512):
        raise tarfile.ReadError(f"no end at byte {tar.offset:,}")
    while blocks.read(2**14):  # the checksum of a tgz follows
        pass


class _Blocks(io.BufferedReader):
    """A tar that keeps the last block, and of which no more than ``left`` bytes are read."""

    left = _MAX_HEADER
    last = b""

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= size or 0
        if size is None or size < 0 or self.left < 0:
            raise tarfile.ReadError(f"a header or an end of more than {_MAX_HEADER:,} bytes")
        self.last = super().read(size)
        return self.last


@contextlib.contextmanager
def _partial_folder(root: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder below ``root``; remove it at the end, and empty folders around it."""
    made = [path for path in (root, *root.parents) if not path.exists()]
    folder = root / f".{name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("ab") as lock:
        if not file_lock(lock, wait=False):
            raise InputError(f"{folder}: another process unpacks this archive just now")
        try:
            shutil.rmtree(folder / "files", ignore_errors=True)  # of a process that was killed
            (folder / "files").mkdir()
            yield folder / "files"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()


def _is_present(path: Path, size: int, archive: Path) -> bool:
    """Return whether the file exists with the size of its member; raise InputError if another."""
    if not os.path.lexists(path):
        return False
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        what = "and is no file" if found is None else f"with {found:,} bytes"
        raise InputError(
            f"{path}: is there {what}, in {archive.name} it has {size:,}; move it away or choose "
            "another root"
        )
    return True


@contextlib.contextmanager
def _explain(path: Path) -> Iterator[None]:
    """Report in one line what is wrong with an archive, or with the disk it is unpacked to."""
    try:
        yield
    except UserError:
        raise
    except tarfile.FilterError as error:
        hint = "nothing was unpacked; official archives hold nothing like this"
        raise InputError(f"{path}: {error}; {hint}") from error
    except _DAMAGE as error:
        with path.open("rb") as file:
            head = file.read(24)
        raise InputError(
            f"{path}: damaged, cut off, or no zip, tar or tgz ({first_line(error)}); it has "
            f"{path.stat().st_size:,} bytes and begins with {head!r}, as a web page does that is "
            "saved without logging in; fetch it again"
        ) from error
    except OSError as error:
        raise StorageError(
            f"{error.filename or path}: {error.strerror or error}; run the same command again "
            f"when this is repaired: {path.name} is unpacked from the start"
        ) from error
