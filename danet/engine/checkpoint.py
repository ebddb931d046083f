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

import danet
from danet.engine import distributed
from danet.errors import InputError, StorageError
from danet.models import files
from danet.models.weights import without_prefix

FORMAT = 2
READABLE = (1, FORMAT)
Checkpoint = dict[str, Any]


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
            file.write(files.MARK + hashing.digest.digest())
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
        InputError: The file is missing, damaged, foreign, of another format, or has weights that
            are no numbers.
    """
    path = Path(path).expanduser()
    checkpoint, is_sealed = files.read(path, key)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise InputError(
            f"{key}={path}: not a checkpoint of this project (no 'format' in it): it has no "
            "config and no state of an optimizer; plain weights go to init_from"
        )
    version = checkpoint["format"]
    if version not in READABLE:
        raise InputError(
            f"{key}={path}: format {version}, this version reads "
            f"{' and '.join(map(str, READABLE))}; it was written by danet "
            f"{checkpoint.get('version')}, and this is {danet.__version__}"
        )
    if version > 1 and not is_sealed:
        raise InputError(
            f"{key}={path}: damaged or incomplete: the checksum at its end is missing"
            + files.another_whole(path)
        )
    checkpoint["model"], notes = without_prefix(checkpoint.get("model", {}), f"{key}={path}")
    if distributed.is_first():
        print("".join(f"{note}\n" for note in notes), end="", flush=True)
    for part in ("model", "ema"):
        problem = files.unsound(checkpoint.get(part) or {})
        if problem:
            raise InputError(
                f"{key}={path}: {problem}; take a checkpoint from before the run diverged"
            )
    return checkpoint
