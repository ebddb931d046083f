"""Reading the members of zip, tar and tgz archives."""

import contextlib
import gzip
import hashlib
import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from danet.archives.rules import DEFAULT_LIMITS, Limits, Member, Validator
from danet.errors import InputError

Kind = Literal["zip", "tar", "tgz"]

_MAX_READ = 16 * 2**20
"""Bytes of one header, which is read into memory: a name in a tar may claim any length."""
_MAX_TRAILER = 64 * 2**20
"""Bytes after the end marker of a tar; writers pad the last block to some kilobytes."""
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error),
    *(EOFError, ValueError, LookupError, ArithmeticError, RuntimeError, MemoryError),
)
"""Exceptions of the standard library on files that are damaged or forged."""


class Listing(NamedTuple):
    """An archive and its members, all validated."""

    path: Path
    kind: Kind
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """Unpacked bytes of all members."""
        return sum(member.size for member in self.members)


def check_digest(
    path: Path, algorithm: str, expected: str, *, progress: Callable[[int], Any]
) -> None:
    """Verify the checksum of a file; ``progress`` is called with numbers of bytes as they are read.

    Raises:
        InputError: It differs, with both values.
    """
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with explain_damage(path), path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            progress(len(block))
    if digest.hexdigest() != expected:
        raise InputError(
            f"{path}: {algorithm} is {digest.hexdigest()}, expected {expected}: the download was "
            "cut off or changed; fetch it again (an archive you packed yourself needs another name)"
        )


def read_listing(path: Path, limits: Limits = DEFAULT_LIMITS) -> Listing:
    """Read the table of contents and validate every member.

    A tgz is decompressed to its end, which also verifies its checksum.

    Raises:
        InputError: Not an archive, damaged, truncated, or with a member that is not allowed.
    """
    kind = _kind(path)
    validator = Validator(path, limits)
    with explain_damage(path):
        if kind == "zip":
            _validate_zip(path, validator)
        else:
            _validate_tar(path, kind, validator)
    return Listing(path, kind, tuple(validator.members))


def read_contents(listing: Listing, wanted: Collection[int]) -> Iterator[tuple[Member, IO[bytes]]]:
    """Yield the members with the wanted numbers, in the order of the archive, open for reading.

    Raises:
        InputError: The archive is damaged or cannot be read.
    """
    members = {member.number: member for member in listing.members if member.number in wanted}
    with explain_damage(listing.path):
        if listing.kind == "zip":
            with zipfile.ZipFile(listing.path) as archive:
                for number, info in enumerate(archive.infolist()):
                    if number in members:
                        with archive.open(info) as content:
                            yield members[number], content
            return
        with _open_tar(listing.path, listing.kind) as (tar, _):
            for number, entry in enumerate(_infos(tar)):
                file = tar.extractfile(entry) if number in members else None
                if file is not None:
                    yield members[number], file


@contextlib.contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Turn exceptions of reading an archive into an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: damaged or cut off ({reason}); it has {path.stat().st_size:,} bytes; fetch "
            "it again"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def _kind(path: Path) -> Kind:
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"archive={path}: cannot be read ({error.strerror})") from error
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        return "zip"
    if head[:2] == b"\x1f\x8b":
        return "tgz"
    if head[257:262] == b"ustar" or _is_old_tar(head):
        return "tar"
    found = f"it begins with {head[:24]!r}" if head else "it is empty"
    raise InputError(
        f"archive={path}: not a zip, tar or tgz ({found}); a page of the publisher is saved in the "
        "place of an archive when one is not logged in"
    )


def _is_old_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _validate_zip(path: Path, validator: Validator) -> None:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        end = 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            if info.header_offset < end:  # a bomb: many members share compressed data
                raise InputError(f"{path}: the member {info.filename!r} overlaps another one")
            end = info.header_offset + 30 + info.compress_size
        for info in infos:
            mode = stat.S_IFMT(info.external_attr >> 16)
            other = "" if mode in (0, stat.S_IFREG, stat.S_IFDIR) else _KINDS.get(mode, "special")
            if info.flag_bits & 1:
                other = "encrypted"
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                other = f"packed in a way (number {info.compress_type}) that is not read here"
            name = info.orig_filename
            validator.add(name, info.file_size, is_folder=name.endswith("/"), other=other)


_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class _Blocks(io.RawIOBase):
    """A stream that limits the length of a read and keeps the last block."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile) -> None:
        self.stream = stream
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ:
            raise ValueError(f"a header of {size:,} bytes")
        self.last = self.stream.read(size)
        return self.last

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.stream.seek(offset, whence)

    def tell(self) -> int:
        return self.stream.tell()


@contextlib.contextmanager
def _open_tar(path: Path, kind: Kind) -> Iterator[tuple[tarfile.TarFile, _Blocks]]:
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        blocks = _Blocks(gzip.GzipFile(fileobj=file) if kind == "tgz" else file)
        yield stack.enter_context(tarfile.open(fileobj=blocks, mode="r:")), blocks


def _infos(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members and empty the list that tarfile keeps of them, to bound memory."""
    while (info := tar.next()) is not None:
        yield info
        tar.members = []  # type: ignore[attr-defined]


def _validate_tar(path: Path, kind: Kind, validator: Validator) -> None:
    with _open_tar(path, kind) as (tar, blocks):
        for info in _infos(tar):
            other = ""
            if info.issym() or info.islnk():
                other = f"a {'symbolic' if info.issym() else 'hard'} link to {info.linkname!r}"
            elif info.isdev():
                other = "a pipe" if info.isfifo() else "a device"
            elif info.issparse() or not (info.isreg() or info.isdir()):
                other = f"of the special type {info.type!r}"
            validator.add(info.name, info.size, is_folder=info.isdir(), other=other)
        # tarfile treats an unreadable header and a truncated file as the end of the archive.
        if blocks.last != bytes(512):
            raise InputError(f"{path}: damaged or cut off at byte {tar.offset:,}; fetch it again")
        trailer = 0
        while kind == "tgz" and (block := blocks.read(2**20)):
            trailer += len(block)
            if trailer > _MAX_TRAILER:
                raise InputError(f"{path}: more than {_MAX_TRAILER:,} bytes follow its end")
