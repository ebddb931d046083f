"""Files of tensors: read without running what lies in them, held against their checksum."""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import safe_globals

from danet.checkpoint.pickle_scan import DTYPES, Inert, Refused, scan
from danet.errors import InputError
from danet.plain import printable

MARK = b"danetsum"  # stands behind the archive, before its SHA-256; see danet.checkpoint.format
TAIL = len(MARK) + hashlib.sha256().digest_size
SUFFIXES = (".pt", ".pth")


def read(path: Path, key: str, *, foreign: Sequence[str] = ()) -> tuple[Any, bool]:
    """Read a file of torch.save to the CPU; return its content, and whether it has a checksum.

    A missing, damaged or foreign file, or one that would run code, raises InputError with the
    setting ``key`` that named it. Objects of the packages ``foreign`` may lie beside its tensors:
    nothing of these is imported or called, and an empty object takes the place of each.
    """
    if not path.is_file():
        raise InputError(f"{key}={path}: {_absence(path)}")
    try:
        # torch.load does not verify the checksums of the archive: it accepts a flipped bit in a
        # weight, a changed key and an appended tail in silence.
        if (is_sealed := has_checksum(path)) is False:
            whole = another_whole(path)
            raise Refused(f"damaged: its content does not have the checksum at its end{whole}")
        end = path.stat().st_size - (TAIL if is_sealed else 0)
        # weights_only below keeps code from running, but trusts the sizes in the file.
        names = scan(path, end, foreign=foreign)
        # safe_globals takes pairs of a class and the name in the pickle that it replaces.
        stand_ins: list[Any] = [(type(n.rpartition(".")[2], (Inert,), {}), n) for n in names]
        with warnings.catch_warnings(), safe_globals(stand_ins):
            warnings.simplefilter("ignore")  # torch warns of foreign pickles that it then refuses
            # To the CPU first: the device of the file may not exist here.
            return torch.load(path, map_location="cpu", weights_only=True), is_sealed is True
    except Refused as error:
        raise InputError(f"{key}={path}: {error}") from error
    except PermissionError as error:
        raise InputError(f"{key}={path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # torch raises half a dozen types for a file that is not its own
        # Their texts are left out: torch's advises to load with ``weights_only=False``.
        raise InputError(f"{key}={path}: {_damage(path)}") from error


def read_safetensors(path: Path, key: str) -> dict[str, Tensor]:
    """Read a file of safetensors to the CPU; raise InputError as ``read`` does."""
    if not path.is_file():
        raise InputError(f"{key}={path}: {_absence(path)}")
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        reason = printable(str(error)[:200])
        raise InputError(f"{key}={path}: no whole file of safetensors ({reason})") from error


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


def another_whole(path: Path) -> str:
    """Return the newest intact file beside a damaged one as a part of a message; "" if none is."""
    for other in _files_in(path.parent):
        is_newer = path.name.startswith("step_") and other.name > path.name
        if other != path and not is_newer and has_checksum(other):  # reads the whole file
            return f"; {other} is whole"
    return ""


def require_tensors(content: Any, source: str) -> None:
    """Raise InputError, which begins with ``source``, unless all are named and finite tensors."""
    found = f"{source}: expected a dictionary of tensors of a model"
    if not isinstance(content, dict) or not content:
        raise InputError(f"{found}, found {type(content).__name__}")
    for name, value in content.items():
        is_name = isinstance(name, str) and printable(name) == name
        if not is_name or not isinstance(value, Tensor):
            raise InputError(f"{found}, but {shown(name)!r} is not one")
        if value.dtype not in DTYPES:  # isfinite is not implemented for every type
            types = ", ".join(map(str, DTYPES))
            raise InputError(f"{source}: {name} is of type {value.dtype}; expected {types}")
    # A network of NaN predicts class 0 everywhere through argmax: its score looks merely bad.
    counts = {name: int((~value.isfinite()).sum()) for name, value in content.items()}
    if bad := [name for name in counts if counts[name]]:
        raise InputError(
            f"{source}: {counts[bad[0]]} of {content[bad[0]].numel()} values of {bad[0]} are NaN "
            f"or infinite, and {len(bad)} of {len(counts)} tensors have such; take weights from "
            "before the run diverged"
        )


def shown(value: Any) -> str:
    """Return the beginning of a name of a foreign file, printable."""
    # The text of nested lists that hold one another twice is of any length.
    return printable(str(value)[:99]) if isinstance(value, (str, int)) else type(value).__name__


def _files_in(folder: Path) -> list[Path]:
    """Return the files of tensors in a folder by descending name: the latest steps first."""
    found = (p for ending in SUFFIXES for p in folder.glob(f"[!.]*{ending}") if p.is_file())
    return sorted(found, key=lambda path: path.name, reverse=True)


def _absence(path: Path) -> str:
    """Return why a path is no file, with the files that are there, as a part of a message."""
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return f"there is no such file, and no folder {folder.absolute()}"
    problem = "a folder without a checkpoint of a run" if path.is_dir() else "there is no such file"
    found, kind = _files_in(folder)[::-1], ""  # ascending, as ls prints them
    if path.is_dir() and not found:  # runs/<name> for runs/<name>/<time>
        found, kind = sorted(p.parent for p in path.glob("*/last.pt"))[::-1], "the runs "
    more = f" and {len(found) - 8} more" * (len(found) > 8)
    shown = f"; there are {kind}{', '.join(map(str, found[:8]))}{more}"
    return problem + shown * bool(found)


def _damage(path: Path) -> str:
    """Return why a file is none of torch.save."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(24)
    if head[:2] in (b"PK", b""):  # a zip archive, as torch writes them
        return f"damaged or incomplete ({size} bytes)" + another_whole(path)
    return f"not a checkpoint: {size} bytes that begin with {head!r}"
