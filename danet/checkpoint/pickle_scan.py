"""Validation of a file of torch.save before it is loaded: what it names, and how large it is.

With ``weights_only`` torch.load runs no code of a file, but it trusts the sizes in it: compressed
storages unpack to a thousand times the file, a storage may be declared larger than its bytes, and
one number can be expanded to a tensor of any size. So the table of the archive and its pickle are
checked first. The pickle is read with inert objects in place of those it names, by the unpickler
in Python: the one in C allocates memory for whatever a file declares.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from danet.plain import printable

_STORAGES = {"Double": torch.float64, "Float": torch.float32, "Half": torch.float16}
_STORAGES |= {"BFloat16": torch.bfloat16, "Bool": torch.bool, "Byte": torch.uint8}
_STORAGES |= {"Char": torch.int8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64}
DTYPES = tuple(_STORAGES.values())
"""Types of the tensors that are read; not complex, quantised and 8-bit floating-point numbers."""
_COPIES = ("builtins.set", "collections.Counter", "torch.Size", "torch.device", "_codecs.encode")
"""What is on torch's list of safe names and copies what it is given."""
_MOST_PICKLED = 1 << 24  # bytes of a pickle; those of checkpoints have some 100 kB
_MOST_SHARED = 2  # times the bytes of the file that its tensors may have, as tied weights do
_MOST_MADE = 1 << 26  # bytes of what a pickle calls for, roughly; those of checkpoints have some MB


class Refused(Exception):
    """Why a file must not be loaded, as a part of a message."""


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**63  # as torch counts


class Inert:
    """Placeholder of whatever a file names: takes any arguments, state and items, does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    # Opcodes that fill objects, lists and dictionaries call these on whatever is on the stack.
    __setstate__ = append = extend = __setitem__ = __init__


class _Ordered(OrderedDict[Any, Any]):
    """An OrderedDict whose attributes a file may not replace; state dicts bring ``_metadata``."""

    def __setstate__(self, state: Any) -> None:
        # Without this the default BUILD would update __dict__ with any attribute of the file.
        if not (isinstance(state, dict) and set(state) <= {"_metadata"}):
            raise Refused("it replaces attributes of a dictionary")


class _Storage(NamedTuple):
    """Bytes of a number, and how many there are: none in the type of a storage."""

    size: int
    numel: int = 0


# The private class is the unpickler in Python; pickle.Unpickler is the one in C.
class _Reader(pickle._Unpickler):
    """Unpickler that calls nothing of a file, in which classes of some packages are allowed."""

    dispatch = dict(pickle._Unpickler.dispatch)
    for code in (pickle.BYTEARRAY8, pickle.PERSID):  # torch reads none
        del dispatch[code[0]]  # the first takes memory by a number in the file

    def __init__(self, file: BinaryIO, packages: Sequence[str]) -> None:
        super().__init__(file, encoding="latin1")  # decodes any byte, as of Python 2's strings
        self._packages = packages
        self._made = 0
        self.foreign: set[str] = set()  # names of classes of these packages
        self.storages: dict[str, int] = {}  # key of each that a tensor needs -> bytes, as declared
        self.nbytes = 0  # of all tensors together, as declared
        self._known: dict[str, Any] = {
            "collections.OrderedDict": lambda items=(): _Ordered(self._copy(items)),
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            # A parameter is counted as the tensor in it.
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            **dict.fromkeys(_COPIES, self._copy),
            **dict.fromkeys(map(str, DTYPES), Inert),
        }
        for name, dtype in _STORAGES.items():
            for place in ("torch", "torch.cuda"):
                self._known[f"{place}.{name}Storage"] = _Storage(dtype.itemsize)

    def find_class(self, module: str, name: str) -> Any:
        """Return what takes the place of a function or class."""
        module = module.replace("__builtin__", "builtins")  # as protocol 2 calls it
        full = f"{module}.{name}"
        if full in self._known:
            return self._known[full]
        if module.partition(".")[0] not in self._packages:
            raise Refused(
                f"not a checkpoint, and refused: it asks to call {printable(full[:200])}; only "
                "dense tensors of usual types and plain values are read, since other objects can "
                "run code; nothing of it was run"
            )
        self.foreign.add(full)
        return Inert

    def _copy(self, values: Any = (), *how: object) -> Any:
        """Count what a call would copy; return it in place of the copy."""
        # Pickle writes bytes as a call of encode; other codecs make them longer each time.
        if how and isinstance(how[0], str) and how[0] != "latin1":
            raise Refused(f"it encodes text as {how[0][:20]!r}")
        # Five bytes of a pickle repeat a call on one long list, and each call makes a copy.
        self._count(64 + (1 if isinstance(values, str) else 64) * len(values))
        return values

    def _count(self, nbytes: int) -> None:
        self._made += nbytes
        if self._made > _MOST_MADE:
            raise Refused(f"its pickle makes more than {_MOST_MADE >> 20} MiB beside the tensors")

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that a record of the pickle declares."""
        match pid:
            # A negative size would lower the sum that is held against the file.
            case ("storage", _Storage(size=size), str(key), _, numel, *_) if _is_size(numel):
                # Tied weights name a storage twice; a second size would go unchecked.
                if self.storages.setdefault(key, numel * size) == numel * size:
                    return _Storage(size, numel)
        raise Refused("a storage of it is of a kind that is not read, or declared with two sizes")

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> object:
        """Check the shape of a tensor against its storage."""
        # Before any product, which means nothing of negative sizes and takes long of many large
        # ones; torch has no tensors of more than 64 axes.
        is_right = isinstance(storage, _Storage) and len(size) == len(stride) <= 64
        if not is_right or not all(map(_is_size, (offset, *size, *stride))):
            raise Refused("a tensor of it has no shape")
        numel = prod(size)
        # Index of the last element in the storage, for any strides.
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        # Strides of 0 repeat elements: torch allocates nothing, but the first copy allocates all.
        if numel > storage.numel or (numel and last >= storage.numel):
            raise Refused(
                f"a tensor of shape {tuple(size)} is more than its storage of {storage.numel} "
                "number(s); save a clone of it"
            )
        self.nbytes += numel * storage.size
        self._count(512)  # the object itself
        return object()  # unlike Inert it has no state that a file could replace


def scan(path: Path, end: int, *, foreign: Sequence[str] = ()) -> set[str]:
    """Judge a file of torch.save by its table and its pickle, without reading its tensors.

    ``end`` bytes of it torch.save wrote; ``foreign`` packages may have objects beside the tensors,
    and the names of their classes are returned. Raises Refused if the file must not be loaded, and
    any other error if it is damaged.
    """
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"  # by which torch decides, too
        file.seek(0)
        reader = (_read_archive if is_archive else _read_old)(file, end, foreign)
    # A thousand views of one storage pass the checks above, and need its memory each if copied.
    if reader.nbytes > _MOST_SHARED * end + (1 << 20):
        raise Refused(
            f"its tensors have {reader.nbytes / 2**20:.0f} MiB and the file {end / 2**20:.0f}: "
            "they share their storages; save clones of them"
        )
    return reader.foreign


def _read_archive(file: BinaryIO, end: int, foreign: Sequence[str]) -> _Reader:
    """Read a zip archive, as torch.save writes it; refuse what it never writes."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        whole = sum(entry.file_size for entry in entries)
        # Python's zipfile unpacks deflated entries, and so does torch: a few kB become gigabytes.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise Refused(
                f"its entries are compressed and unpack from {end / 2**20:.1f} to "
                f"{whole / 2**20:.1f} MiB, which torch.save never writes"
            )
        # torch's zip reader compares names without case, so "A" and "a" are one entry to it; and a
        # flag that torch ignores says how names that are not ASCII are encoded.
        names = {entry.filename.lower() for entry in entries}
        tops = {entry.filename.partition("/")[0] for entry in entries}
        is_ascii = all(entry.filename.partition("/")[2].isascii() for entry in entries)
        if len(names) != len(entries) or len(tops) != 1 or whole > end or not is_ascii:
            raise Refused("its entries overlap or have names that torch.save never gives")
        # torch's reader and Python's may take different tables of one file, unless its end is the
        # three records that torch writes: one of zip64 and its place, and one of zip without a
        # comment, in which another could hide.
        file.seek(end - 98)
        ending = struct.unpack("<4s44xQ4s4xQ4x4s16xH", file.read(98))
        if ending != (b"PK\6\6", archive.start_dir, b"PK\6\7", end - 98, b"PK\5\6", 0):
            raise ValueError("its table of entries is not where torch.save writes it")
        (top,) = tops
        if archive.getinfo(f"{top}/data.pkl").file_size > _MOST_PICKLED:
            raise Refused(f"its pickle has more than {_MOST_PICKLED >> 20} MiB beside the tensors")
        # The table before the pickle: it bounds how much is read here.
        reader = _Reader(io.BytesIO(archive.read(f"{top}/data.pkl")), foreign)
        reader.load()
        for key, nbytes in reader.storages.items():
            if archive.getinfo(f"{top}/data/{key}").file_size < nbytes:
                raise Refused(f"storage {key!r} has fewer bytes than it declares")
    return reader


def _read_old(file: BinaryIO, end: int, foreign: Sequence[str]) -> _Reader:
    """Read a file from before zip archives (torch 1.6): five pickles, and the storages behind."""
    content = io.BytesIO(file.read(_MOST_PICKLED))
    readers = [_Reader(content, foreign) for _ in range(5)]
    *_, listed = [reader.load() for reader in readers]
    reader = readers[3]  # after a mark of the format, its version, and the system
    # Old files have no table of sizes, so only their list and the sum can be checked.
    if sorted(listed) != sorted(reader.storages) or sum(reader.storages.values()) > end:
        raise Refused("its storages are not those its tensors need, or have fewer bytes")
    return reader
