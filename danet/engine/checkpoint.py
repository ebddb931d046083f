"""Checkpoint files: what is in one, how it is written, how it is read.

A checkpoint is one dictionary of tensors, numbers, strings, lists and dictionaries, so that it can
be read without running anything that lies in it::

    format      1
    version     of this package
    config      the run's whole config, resolved
    classes     names            palette   RGB colours
    model       state dict       ema       state dict of averaged weights, or None
    optimizer   state dict       scaler    state dict of the loss scaler
    processes   how many trained
    step        updates done     best_miou so far, or None
    scores      of the last evaluation, or None
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from danet.errors import InputError, StorageError

FORMAT = 1
Checkpoint = dict[str, Any]


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a file that is there whole or not at all, even when the machine stops meanwhile.

    Raises:
        StorageError: The disk is full, or the folder may not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):
            temporary.unlink()
        raise StorageError(f"{path}: the checkpoint could not be written ({error})") from error


def _sync_folder(folder: Path) -> None:
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
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a file that is not its own
        raise InputError(f"{key}={path}: {_what_is_wrong(path, error)}") from error
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise InputError(
            f"{key}={path}: not a checkpoint of this project (no 'format' in it); plain "
            "weights go to init_from"
        )
    if checkpoint["format"] != FORMAT:
        raise InputError(
            f"{key}={path}: format {checkpoint['format']}, this version reads {FORMAT}"
        )
    return checkpoint


def _what_is_wrong(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    head = path.read_bytes()[:16]
    if head[:4] != b"PK\x03\x04":  # a zip archive, as torch writes them
        return f"not a checkpoint: {size} bytes that begin with {head!r}"
    if "weights_only" in str(error) or "Unsupported" in str(error):
        return "refused, since it holds Python objects, and those can run code"
    return f"damaged or incomplete ({size} bytes)"
