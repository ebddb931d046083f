"""Checkpoint files: what is in one, how it is written, how it is read.

A checkpoint is one dictionary of tensors, numbers, strings, lists and dictionaries, so that it can
be read without running anything that lies in it::

    format      2
    version     of this package
    config      the run's whole config, resolved
    classes     names            palette   RGB colours
    model       state dict       ema       state dict of averaged weights, or None
    optimizer   state dict       scaler    state dict of the loss scaler
    processes   how many trained
    step        updates done     best_miou so far, or None
    scores      of the last evaluation, or None

The file is torch's zip archive with 40 bytes behind it: eight that say so and the SHA-256 of all
before, so that a flipped bit is noticed. Format 1, of versions before 0.2, had no checksum.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from danet.errors import InputError, StorageError

FORMAT = 2
READABLE = (1, FORMAT)
Checkpoint = dict[str, Any]

_MARK = b"danetsum"
_TAIL = len(_MARK) + hashlib.sha256().digest_size


class _Hashing:
    """A file that knows the SHA-256 of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a file that is there whole or not at all, even when the machine stops meanwhile.

    Raises:
        StorageError: The disk is full, or the folder may not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            hashing = _Hashing(file)
            torch.save(checkpoint, hashing)  # type: ignore[arg-type]
            file.write(_MARK + hashing.digest.digest())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):
            temporary.unlink()
        raise StorageError(f"{path}: the checkpoint could not be written ({error})") from error


def sync_folder(folder: Path) -> None:
    """Makes the renaming itself durable, where the system lets folders be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load(path: str | Path, *, key: str = "checkpoint") -> Checkpoint:
    """Reads a checkpoint to the CPU without running code from it.

    Args:
        path: Of the file.
        key: The setting that named it, for messages.

    Raises:
        InputError: The file is missing, damaged, foreign, or of another format.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        found = sorted(str(p) for p in path.parent.glob("*.pt")) if path.parent.is_dir() else []
        there = f"; there are {', '.join(found)}" if found else ""
        raise InputError(f"{key}={path}: there is no such file{there}")
    is_whole = _verify(path, key)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a file that is not its own
        raise InputError(f"{key}={path}: {_what_is_wrong(path, error)}") from error
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise InputError(
            f"{key}={path}: not a checkpoint of this project (no 'format' in it); plain "
            "weights go to init_from"
        )
    if checkpoint["format"] not in READABLE:
        raise InputError(
            f"{key}={path}: format {checkpoint['format']}, this version reads "
            f"{' and '.join(map(str, READABLE))}"
        )
    if checkpoint["format"] > 1 and not is_whole:
        raise InputError(f"{key}={path}: damaged or incomplete: the checksum at its end is missing")
    return checkpoint


def _verify(path: Path, key: str) -> bool:
    """Holds a file against the checksum at its end; tells whether there is one.

    Raises:
        InputError: They differ.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        rest = max(path.stat().st_size - _TAIL, 0)
        file.seek(rest)
        tail = file.read()
        if not tail.startswith(_MARK) or len(tail) != _TAIL:
            return False
        file.seek(0)
        while rest:
            block = file.read(min(rest, 1 << 22))
            digest.update(block)
            rest -= len(block)
    if digest.digest() != tail[len(_MARK) :]:
        raise InputError(
            f"{key}={path}: damaged: its content does not have the checksum at its end"
        )
    return True


def _what_is_wrong(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    head = path.read_bytes()[:16]
    if head[:4] != b"PK\x03\x04":  # a zip archive, as torch writes them
        return f"not a checkpoint: {size} bytes that begin with {head!r}"
    if "weights_only" in str(error) or "Unsupported" in str(error):
        return "refused, since it holds Python objects, and those can run code"
    return f"damaged or incomplete ({size} bytes)"
