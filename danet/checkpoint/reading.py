"""Files of tensors: read without running what lies in them, held against their checksum.

torch.save writes a zip archive. This project's own files have 40 bytes behind it: eight that say so
and the SHA-256 of all before, so that a flipped bit is noticed.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.serialization import safe_globals

from danet.checkpoint.pickle_scan import Inert, Scan, scan
from danet.errors import InputError
from danet.plain import printable

MARK = b"danetsum"
TAIL = len(MARK) + hashlib.sha256().digest_size
SUFFIXES = (".pt", ".pth")

_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)


class Content(NamedTuple):
    """What was in a file."""

    value: Any
    is_sealed: bool
    """Whether a checksum stood at its end; it was right then."""


def read(path: Path, key: str, *, foreign: Sequence[str] = ()) -> Content:
    """Read a file of torch.save to the CPU.

    Args:
        path: Of the file.
        key: The setting that named it, for messages.
        foreign: Packages whose objects a file may hold beside its tensors. Nothing of these
            packages is imported or called: an empty object takes the place of each.

    Raises:
        InputError: The file is missing, damaged, no such file, or would run code.
    """
    if not path.is_file():
        raise InputError(f"{key}={path}: there is no such file{_instead(path)}")
    # torch.load does not verify the checksums of the archive: it accepts a flipped bit in a weight,
    # a changed key and an appended tail in silence.
    try:
        is_sealed = has_checksum(path)
    except OSError as error:
        raise InputError(f"{key}={path}: cannot be read ({error.strerror or error})") from error
    if is_sealed is False:
        raise InputError(
            f"{key}={path}: damaged: its content does not have the checksum at its end"
            + another_whole(path)
        )
    end = path.stat().st_size - (TAIL if is_sealed else 0)
    # weights_only below keeps code from running, but trusts the sizes in the file, of which a small
    # one can ask for any amount of memory.
    found = scan(path, end, foreign=foreign)
    if found.forbidden or found.problem:
        raise InputError(f"{key}={path}: {_what_is_wrong(path, found)}")
    # safe_globals takes pairs of a class and the name in the pickle that it replaces.
    stand_ins: list[Any] = [(type(n.rpartition(".")[2], (Inert,), {}), n) for n in found.foreign]
    try:
        with warnings.catch_warnings(), safe_globals(stand_ins):
            warnings.simplefilter("ignore")  # torch warns of foreign pickles that it then refuses
            # To the CPU first: the device of the file may not exist here.
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a file that is not its own
        raise InputError(f"{key}={path}: {_what_is_wrong(path, found)}") from error
    return Content(value, is_sealed is True)


def has_checksum(path: Path) -> bool | None:
    """Return whether the checksum at the end of a file is right; None if there is none."""
    with open(path, "rb") as file:
        end = max(path.stat().st_size - TAIL, 0)
        file.seek(end)
        tail = file.read()
        if not tail.startswith(MARK) or len(tail) != TAIL:
            return None
        return digest_of(file, end) == tail[len(MARK) :]


def digest_of(file: BinaryIO, end: int) -> bytes:
    """Return the SHA-256 of the first ``end`` bytes of a file, which is left at that place."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(min(end, 1 << 22)):  # files have hundreds of megabytes
        digest.update(block)
        end -= len(block)
    return digest.digest()


def files_in(folder: Path) -> list[Path]:
    """Return the files of tensors in a folder by descending name: the latest steps first."""
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if p.suffix in SUFFIXES and not p.name.startswith("."))
    return sorted(found, key=lambda path: path.name, reverse=True)


def another_whole(path: Path) -> str:
    """Return the newest intact file beside a damaged one as a part of a message; "" if none is.

    Beside a numbered step, later steps do not count.
    """
    for other in files_in(path.parent):
        is_newer = path.name.startswith("step_") and other.name > path.name
        if other == path or is_newer or not other.is_file():
            continue
        if has_checksum(other):  # the first: each costs the reading of a whole file
            return f"; {other} is whole"
    return ""


def unsound(tensors: Mapping[str, Tensor]) -> str:
    """Return what is wrong with the first tensor that cannot be used; empty if all can.

    Its type is not that of weights, or some of its values are not finite, which are counted.
    """
    # Before the values, since isfinite is not implemented for every type.
    for name, value in tensors.items():
        if value.dtype not in _DTYPES:
            return f"{name} is of type {value.dtype}; expected {', '.join(map(str, _DTYPES))}"
    counts = {name: int((~value.isfinite()).sum()) for name, value in tensors.items()}
    bad = [name for name in counts if counts[name]]
    if not bad:
        return ""
    name = bad[0]
    more = f"; {len(bad)} tensors of {len(counts)} have such" if len(bad) > 1 else ""
    return f"{counts[name]} of {tensors[name].numel()} values of {name} are NaN or infinite{more}"


def _instead(path: Path) -> str:
    """Return the files that do exist where one was expected, as a part of a message."""
    folder = path if path.is_dir() else path.parent
    found = files_in(folder)[::-1]  # ascending, as ls prints them
    if not found:
        return "" if folder.is_dir() else f", and no folder {folder.absolute()}"
    shown = ", ".join(map(str, found[:8]))
    return f"; there are {shown}{f' and {len(found) - 8} more' if len(found) > 8 else ''}"


def _what_is_wrong(path: Path, found: Scan) -> str:
    """Return why a file is refused.

    The text of torch's own error is left out: it advises to load with ``weights_only=False``.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(24)
    if size == 0:
        return "not a checkpoint: 0 bytes, so damaged or incomplete" + another_whole(path)
    if found.forbidden:  # first: such a file may be damaged, too
        names = printable(", ".join(name[:200] for name in found.forbidden))
        if all(name.startswith("torch.") for name in found.forbidden):
            return f"refused: it names {names}; only dense tensors of usual types are read"
        return (
            "not a checkpoint, and refused, since it holds Python objects, and those can run code: "
            f"it asks to call {names}; nothing of it was run"
        )
    if found.problem not in ("", "damaged"):
        return f"refused: {found.problem}"
    if head[:2] == b"PK":  # a zip archive, as torch writes them
        return f"damaged or incomplete ({size} bytes)" + another_whole(path)
    return f"not a checkpoint: {size} bytes that begin with {head!r}"
