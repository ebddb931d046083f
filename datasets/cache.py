"""Decoded pairs kept in .npy files that are mapped into memory, so that a crop reads only its rows.

One uncompressed file per pair, a record of the image (H, W, N), the mapped mask (H, W), and a
checksum, which all processes of a machine share: 8 MiB for 2048 x 1024 pixels with labels. The name
of a file is a digest of how labels are decoded and of paths, sizes and times of both sources, so
what is found is never stale. Pairs that do not fit are decoded every time.
"""

import hashlib
import mmap
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from danet.errors import InputError, StorageError
from danet.filesystem import atomic_write, file_lock

# Image (H, W, N) and mask (H, W); None where a split has no labels.
Pair = tuple[np.ndarray, np.ndarray | None]
_VERSION = b"2"  # raised when the files or the decoders give other bytes


class Cache:
    """Decoded pairs in a folder; if storing fails, pairs are still decoded.

    Args:
        folder: Shared by all data sets, as is ``limit``.
        root: Of this data set; names its folder within.
        kind: All that decides what a pair is decoded to, besides its files.
        limit: Bytes.
    """

    def __init__(self, folder: Path, *, root: Path, kind: bytes, limit: int) -> None:
        if os.name != "posix":
            raise InputError("data.cache: there is none on this system; use data.cache=none")
        if folder.resolve().is_relative_to(root.resolve()):
            raise InputError(f"data.cache_dir={folder}: it lies below data.root={root}")
        self.folder = folder
        self.home = folder / f"{root.name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}"
        self.limit = limit
        self._kind = hashlib.sha256(_VERSION + kind).digest()
        self._verified: set[str] = set()
        self._is_stopped = False
        # Memory that forked workers share: one warning for all of them.
        self._warned = np.frombuffer(mmap.mmap(-1, 1), np.uint8)
        try:
            self.home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"data.cache_dir={folder}: {error.strerror}") from error

    def read(self, image: str, mask: str | None, decode: Callable[[], Pair]) -> Pair:
        """Return a pair from the cache, or decode and store it.

        The arrays are views of a private mapping: writing to them changes neither the file nor
        what other processes see.
        """
        try:
            path = self._path([image] if mask is None else [image, mask])
        except OSError:
            return decode()  # which raises a better error
        pair = self._load(path)
        if pair is None:
            pair = decode()
            if not self._is_stopped:
                self._store(path, pair)
        return pair

    def _path(self, sources: list[str]) -> Path:
        """Return the file of a pair as its sources are now: ``<identity>-<state>.npy``."""
        states = [os.stat(source) for source in sources]
        # A copy over a file that keeps its size and the time of writing changes ctime.
        state = repr([(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states]).encode()
        identity = self._kind + b"\0".join(map(os.fsencode, sources))
        pair, now = (hashlib.sha256(data).hexdigest()[:32] for data in (identity, state))
        return self.home / pair[:2] / f"{pair}-{now}.npy"

    def _load(self, path: Path) -> Pair | None:
        """Map a file into memory; None if it is missing or damaged."""
        try:
            record = np.load(path, mmap_mode="c")
            # Once per process: it would take a quarter of the time of a crop. The image is left
            # out, since rows outside the crop would be read.
            if path.name not in self._verified and record["checksum"] != _checksum(record):
                return None
        except Exception:  # there is none, or numpy has many errors for a damaged header
            return None
        self._verified.add(path.name)
        mask = np.asarray(record["mask"]) if "mask" in record.dtype.names else None
        return np.asarray(record["image"]), mask

    def _store(self, path: Path, pair: Pair) -> None:
        """Write a pair, unless the cache is full."""
        record = _record(*pair)  # after a header of 256 bytes at most
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._reserve(path, record.nbytes + 256):
                self._stop(
                    f"the cache in {self.folder} is full ({self.limit / 2**30:g} GiB, or what is "
                    "free there); further images are decoded every time; see data.cache_gib"
                )
                return
            # Durable, since a power cut must not leave zeros under a good header.
            with atomic_write(path, durable=True) as draft, open(draft, "wb") as file:
                np.save(file, record)
        except OSError as error:
            reason = error.strerror or error  # numpy knows the bytes written, but not why no more
            self._stop(f"{self.folder}: {reason}; images are decoded every time from here on")

    def _reserve(self, path: Path, size: int) -> bool:
        """Count a file before it is written, under a lock; return whether there is room.

        After a crash the count may be too high, never too low; when the cache seems full, its files
        are counted again.
        """
        counter = self.folder / "used"
        # Reopened each time: forked processes share the lock of a file they inherit.
        with open(counter, "a") as lock:
            file_lock(lock)
            # Of sources that have changed, damaged, or stored by another process meanwhile.
            others = list(path.parent.glob(f"{path.name.split('-')[0]}-*"))
            freed = sum(other.stat().st_size for other in others)
            for other in others:
                other.unlink()
            text = counter.read_bytes()
            used = int(text) - freed if text.isdigit() else _count(self.folder)
            if used + size > self.limit:
                used = _count(self.folder)
            has_room = used + size <= self.limit and size <= _room(self.folder)
            counter.write_text(str(used + size * has_room))
        return has_room

    def _stop(self, reason: str) -> None:
        """Store no more pairs in this process; warn once per run."""
        self._is_stopped = True
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return
        with ExitStack() as stack:
            with suppress(OSError):  # a network drive may have no such locks: two may warn
                folder = os.open(self.folder, os.O_RDONLY)  # also where nothing can be written
                stack.callback(os.close, folder)
                file_lock(folder)
            if not self._warned[0]:
                self._warned[0] = 1
                print(f"warning: {reason}", file=sys.stderr, flush=True)


def _count(folder: Path) -> int:
    """Return the bytes of all files in the folder; remove what killed processes left unfinished."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        if path.suffix == ".tmp" and time.time() - path.stat().st_mtime > 3600:
            path.unlink()
    return sum(path.stat().st_size for path in files if path.exists() and path.name != "used")


def _record(image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Return a pair and its checksum as one record, of shape ()."""
    fields = {"image": image} if mask is None else {"image": image, "mask": mask}
    types = [(name, array.dtype, array.shape) for name, array in fields.items()]
    record = np.empty((), [("checksum", np.uint32), *types])
    for name, array in fields.items():
        record[name] = array
    record["checksum"] = _checksum(record)
    return record


def _checksum(record: np.ndarray) -> int:
    """Return the CRC-32 of the names, types and shapes of all fields, and of the mask."""
    header = zlib.crc32(repr(record.dtype.descr).encode())
    has_mask = "mask" in (record.dtype.names or ())
    return zlib.crc32(record["mask"].data, header) if has_mask else header


def _room(folder: Path) -> int:
    """Return how many bytes may still be written; a full disk would stop a run's checkpoints."""
    return shutil.disk_usage(folder).free - 2**30


def cache_folder(name: str | None) -> Path:
    """Return the absolute path of a cache folder; None is the user's own."""
    if name is not None:
        return Path(name).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "danet"
