"""Decoded pairs kept in files that are mapped into memory, so that a crop reads only its own rows.

One file per pair: a header of 64 bytes, the image (H, W, 3) and the mapped mask (H, W), both
uncompressed uint8, so all processes of a machine share the pages. 2048 x 1024 with labels take
8 MiB.

Never stale: the name of a file is a digest of the paths and of how labels are decoded, and its
header holds a digest of size, mtime and ctime of both sources, which are checked at every read. A
pair whose files changed is decoded and stored again.

Safe with many writers: a file is written under a temporary name, flushed to the disk, and renamed,
so readers never see a part of it; two processes that decode the same pair write the same bytes, and
the last one wins. Bounded: bytes are counted, under a lock, before they are written, so a crash may
leave the count too high but never too low; it is recounted when the cache seems full. Pairs that
do not fit are decoded every time.
"""

import errno
import hashlib
import mmap
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from danet.datasets.cache_folder import free
from danet.errors import InputError, StorageError
from danet.filesystem import file_lock

# Image (H, W, 3) and mask (H, W), both uint8; None where a split has no labels.
Pair = tuple[np.ndarray, np.ndarray | None]

# Magic, height, width, whether there is a mask, digest of the sources, CRC-32 of all before.
_HEADER = struct.Struct("<8sIIB32s7xI")
_START = 64  # offset of the image
# Version of this format and of the decoders: raised when either gives other bytes.
_MAGIC = b"DANETpx1"
_SPARE = 2**30  # always left free: a full disk would stop the run at its next checkpoint
_ABANDONED = 3600.0  # seconds after which a temporary file belongs to a process that died


class Cache:
    """Decoded pairs in a folder; if storing fails, pairs are still decoded.

    Args:
        folder: Shared by all data sets, as is ``limit``.
        root: Of this data set; names its folder within.
        kind: A digest of all that decides what a pair is decoded to, besides its files.
        limit: Bytes.
    """

    def __init__(self, folder: Path, *, root: Path, kind: bytes, limit: int) -> None:
        if os.name != "posix":
            raise InputError("data.cache: there is none on this system; use data.cache=none")
        self.folder = folder
        digest = hashlib.sha256(os.fsencode(root)).hexdigest()
        self.home = folder / f"{root.name}-{digest[:8]}"
        if folder.resolve().is_relative_to(root.resolve()):
            raise InputError(f"data.cache_dir={folder}: it lies below data.root={root}")
        self.limit = limit
        self._kind = hashlib.sha256(_MAGIC + kind).digest()
        self._is_full = False
        self._warned = mmap.mmap(-1, 1)  # shared with the workers: one warning for all of them
        try:
            self.home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"data.cache_dir={folder}: {error.strerror}") from error

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in vars(self).items() if key != "_warned"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._warned = mmap.mmap(-1, 1)

    def read(self, image: str, mask: str | None, decode: Callable[[], Pair]) -> Pair:
        """Return a pair from the cache, or decode and store it.

        The arrays are views of a private mapping: writing to them changes neither the file nor
        what other processes see.
        """
        sources = [image] if mask is None else [image, mask]
        try:
            stamp = _stamp(sources)
        except OSError:
            return decode()  # which raises a better error
        path = self._path(sources)
        found = _load(path, stamp)
        if found is not None:
            return found
        pair = decode()
        if not self._is_full:
            self._store(path, stamp, pair)
        return pair

    def _path(self, sources: list[str]) -> Path:
        name = hashlib.sha256(self._kind + b"\0".join(map(os.fsencode, sources))).hexdigest()[:32]
        return self.home / name[:2] / name

    def _store(self, path: Path, stamp: bytes, pair: Pair) -> None:
        image, mask = pair
        height, width = image.shape[:2]
        size = _START + image.nbytes + (0 if mask is None else mask.nbytes)
        fields = (_MAGIC, height, width, mask is not None, stamp)
        header = _HEADER.pack(*fields, zlib.crc32(_HEADER.pack(*fields, 0)[:-4]))
        draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            if not self._reserve(draft, size):
                self._disable(
                    f"the cache in {self.folder} is full ({self.limit / 2**30:g} GiB, or what is "
                    "free there); further images are decoded every time; see data.cache_gib"
                )
                return
            try:
                with open(draft, "r+b", buffering=0) as file:
                    for part in (header.ljust(_START, b"\0"), image, mask):
                        if part is not None:
                            _write(file.fileno(), np.ascontiguousarray(part).data)
                    os.fsync(file.fileno())  # a power cut must not leave zeros under a good header
                self._publish(draft, path)
            except BaseException:
                self._discard(draft, size)
                raise
        except OSError as error:
            self._disable(
                f"{self.folder}: {os.strerror(error.errno or errno.EIO)}; images are decoded every "
                "time from here on"
            )

    def _disable(self, reason: str) -> None:
        """Store no more pairs in this process; warn once per run."""
        self._is_full = True
        if not self._warned[0] and os.environ.get("LOCAL_RANK", "0") == "0":
            self._warned[0] = 1
            print(f"warning: {reason}", file=sys.stderr, flush=True)

    @contextmanager
    def _counter(self) -> Iterator[int]:
        """Hold the lock of the folder; yield the file with the number of bytes."""
        # Opened anew each time: forked processes share the lock of a file they inherit.
        file = os.open(self.folder / "used", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            file_lock(file)
            yield file
        finally:
            os.close(file)

    def _reserve(self, draft: Path, size: int) -> bool:
        """Count ``size`` bytes and create the draft; return whether there is room."""
        draft.parent.mkdir(parents=True, exist_ok=True)
        with self._counter() as file:
            used = _read_count(file)
            if used is None or used + size > self.limit:
                used = _recount(self.folder)
            room = free(self.folder) - _SPARE
            if used + size > self.limit or size > room:
                _write_count(file, used)
                return False
            _write_count(file, used + size)
            with open(draft, "wb") as made:
                made.truncate(size)  # a recount by another process must find all of it
        return True

    def _publish(self, draft: Path, path: Path) -> None:
        """Rename a draft, and stop counting the file that it replaces."""
        with self._counter() as file:
            try:
                before = path.stat().st_size
            except FileNotFoundError:
                before = 0
            os.replace(draft, path)
            _write_count(file, max(0, (_read_count(file) or 0) - before))

    def _discard(self, draft: Path, size: int) -> None:
        with suppress(OSError), self._counter() as file:
            if draft.exists():
                draft.unlink()
                _write_count(file, max(0, (_read_count(file) or 0) - size))


def digest_of(value: object) -> bytes:
    """Return a digest of settings, the same in every process; of objects, that of their state."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).digest()
    if value is None or isinstance(value, (str, int, float, Path)):
        return hashlib.sha256(f"{type(value).__name__} {value}".encode()).digest()
    if isinstance(value, type):
        return digest_of(f"{value.__module__}.{value.__qualname__}")
    if isinstance(value, np.ndarray):
        parts: list[object] = ["array", value.dtype.str, value.shape, value.tobytes()]
    elif isinstance(value, Mapping):
        parts = ["mapping", *value.items()]
    elif isinstance(value, (tuple, list)):
        parts = ["sequence", *value]
    elif isinstance(value, (set, frozenset)):
        parts = ["set", b"".join(sorted(map(digest_of, value)))]
    else:
        parts = ["object", type(value), _state(value)]
    return hashlib.sha256(b"".join(map(digest_of, parts))).digest()


def _state(value: object) -> object:
    """Return the state of an object, as its class pickles it where that is defined."""
    own = getattr(type(value), "__getstate__", None)
    if own is not None and own is not getattr(object, "__getstate__", None):
        return own(value)
    state = getattr(value, "__dict__", None)
    # An address in memory within repr() makes a cache of its own, never a wrong one.
    return repr(value) if state is None else state


def _stamp(sources: list[str]) -> bytes:
    """Return a digest of size, mtime and ctime; a copy over the files changes it."""
    states = [os.stat(path) for path in sources]
    return hashlib.sha256(
        repr([(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states]).encode()
    ).digest()


def _load(path: Path, stamp: bytes) -> Pair | None:
    """Map a file into memory; None if it is missing, damaged, or of other sources."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        head = os.pread(file, _HEADER.size, 0)
        if len(head) < _HEADER.size:
            return None
        magic, height, width, has_mask, stored, checksum = _HEADER.unpack(head)
        size = _START + height * width * (4 if has_mask else 3)
        is_whole = checksum == zlib.crc32(head[:-4]) and os.fstat(file).st_size == size
        if magic != _MAGIC or stored != stamp or not is_whole:
            return None
        pages = mmap.mmap(file, size, access=mmap.ACCESS_COPY)
    except OSError:
        return None
    finally:
        os.close(file)
    area = height * width
    # The arrays keep the mapping open; ACCESS_COPY makes it writable without touching the file.
    image = np.frombuffer(pages, np.uint8, 3 * area, _START).reshape(height, width, 3)
    if not has_mask:
        return image, None
    return image, np.frombuffer(pages, np.uint8, area, _START + 3 * area).reshape(height, width)


def _write(file: int, part: memoryview | bytes) -> None:
    view = memoryview(part).cast("B")
    while view:
        view = view[os.write(file, view) :]


def _read_count(file: int) -> int | None:
    text = os.pread(file, 32, 0)
    return int(text) if text.strip().isdigit() else None


def _write_count(file: int, count: int) -> None:
    os.pwrite(file, b"%032d" % count, 0)


def _recount(folder: Path) -> int:
    """Return the bytes of all files in the folder; remove abandoned drafts."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            with suppress(OSError):
                state = os.stat(path)
                if name.endswith(".tmp") and time.time() - state.st_mtime > _ABANDONED:
                    os.unlink(path)
                elif name != "used":
                    total += state.st_size
    return total
