"""Reading archives: what a zip, tar or tgz holds, and its members one after another."""

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

from danet.archives.rules import DEFAULT_LIMITS, Limits, Member, Rules
from danet.errors import InputError

Kind = Literal["zip", "tar", "tgz"]

_MAX_READ = 16 * 2**20
"""Bytes of one header: names in a tar can claim any length and are read into memory."""
_MAX_TRAILER = 64 * 2**20
"""Bytes after the end of a tar; packers fill up a block of some kilobytes."""
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error),
    *(EOFError, ValueError, LookupError, ArithmeticError, RuntimeError, MemoryError),
)
"""What the readers raise on a file that is damaged or made up."""


class Listing(NamedTuple):
    """An archive whose members may all be unpacked."""

    path: Path
    kind: Kind
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """Bytes of all members."""
        return sum(member.size for member in self.members)


def check_digest(path: Path, algorithm: str, expected: str, *, seen: Callable[[int], Any]) -> None:
    """Compares the checksum of a file; ``seen`` is told the bytes as they are read.

    Raises:
        InputError: It differs; with both.
    """
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with readable(path), path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            seen(len(block))
    if digest.hexdigest() != expected:
        raise InputError(
            f"{path}: {algorithm} is {digest.hexdigest()}, expected {expected}: the download was "
            "cut off or changed; fetch it again (an archive you packed yourself needs another name)"
        )


def read_listing(path: Path, limits: Limits = DEFAULT_LIMITS) -> Listing:
    """Reads the table of contents and judges every member.

    A tar that is packed with gzip is read to its end, which also proves its checksum.

    Raises:
        InputError: Not an archive, damaged, cut off, or a member that must not be unpacked.
    """
    kind = _kind(path)
    rules = Rules(path, limits)
    with readable(path):
        if kind == "zip":
            _judge_zip(path, rules)
        else:
            _judge_tar(path, kind, rules)
    return Listing(path, kind, tuple(rules.members))


def read_contents(listing: Listing, wanted: Collection[int]) -> Iterator[tuple[Member, IO[bytes]]]:
    """Yields the wanted members, by number, in the order of the archive, each open for reading.

    Raises:
        InputError: Damaged; or not the file any more that was listed.
    """
    members = {member.number: member for member in listing.members if member.number in wanted}
    with readable(listing.path):
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
def readable(path: Path) -> Iterator[None]:
    """Turns what readers raise into one line."""
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


def _judge_zip(path: Path, rules: Rules) -> None:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        end = 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            if info.header_offset < end:  # many members of one packed stretch
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
            rules.take(name, info.file_size, is_folder=name.endswith("/"), other=other)


_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class _Blocks(io.RawIOBase):
    """A stream that gives no more than a header's length at once and remembers its last block."""

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
    """Yields the members; the list that tarfile keeps is emptied, so that memory stays small."""
    while (info := tar.next()) is not None:
        yield info
        tar.members = []  # type: ignore[attr-defined]


def _judge_tar(path: Path, kind: Kind, rules: Rules) -> None:
    with _open_tar(path, kind) as (tar, blocks):
        for info in _infos(tar):
            other = ""
            if info.issym() or info.islnk():
                other = f"a {'symbolic' if info.issym() else 'hard'} link to {info.linkname!r}"
            elif info.isdev():
                other = "a pipe" if info.isfifo() else "a device"
            elif info.issparse() or not (info.isreg() or info.isdir()):
                other = f"of the special type {info.type!r}"
            rules.take(info.name, info.size, is_folder=info.isdir(), other=other)
        # tarfile takes a header it cannot read, or a file that ends, for the end of the archive.
        if blocks.last != bytes(512):
            raise InputError(f"{path}: damaged or cut off at byte {tar.offset:,}; fetch it again")
        trailer = 0
        while kind == "tgz" and (block := blocks.read(2**20)):
            trailer += len(block)
            if trailer > _MAX_TRAILER:
                raise InputError(f"{path}: more than {_MAX_TRAILER:,} bytes follow its end")
