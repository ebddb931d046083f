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
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

_SIZES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2}
_SIZES |= {"Char": 1, "Byte": 1, "Bool": 1}
_STORAGES = {
    f"torch.{place}{name}Storage": size for name, size in _SIZES.items() for place in ("", "cuda.")
}
"""Names of storages -> bytes of a number; complex, quantised and 8-bit floats are not read."""
_COPIES = ("builtins.set", "collections.Counter", "torch.Size", "torch.device")
"""Classes on torch's list of safe names that copy what they are given."""
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
_INERT = frozenset(f"torch.{name}" for name in (*_DTYPES, "bool"))

_MOST_PICKLED = 1 << 24
"""Bytes of a pickle; those of checkpoints have some 100 kB."""
_MOST_SHARED = 2
"""How many times the bytes of the file its tensors may have together, as tied weights do."""
_MOST_MADE = 1 << 26
"""Bytes of the objects that a pickle calls for, roughly; those of checkpoints have some MB."""
_MOST_AXES = 64  # torch has no tensors of more
_MAGIC = 0x1950A86A20F9469CFC6C
"""First pickle of a file that torch.save wrote before it wrote zip archives (torch 1.6)."""
_SHOWN = 3


class Scan(NamedTuple):
    """What was found in a file."""

    forbidden: list[str]
    """Functions and classes that the file names and no file of tensors needs, the first few."""
    foreign: list[str]
    """Classes of the packages that were allowed beside the tensors."""
    problem: str
    """Why the file must not be loaded, as a part of a message; empty if nothing is wrong."""


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**63  # as torch counts


class Inert:
    """Placeholder of whatever a file names: takes any arguments and state, does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    # Opcodes that fill lists and dictionaries call these on whatever is on the stack.
    append = extend = __setstate__

    def __setitem__(self, key: object, value: object) -> None:
        pass


class _Problem(Exception):
    """Reason why the file must not be loaded."""


class _Ordered(OrderedDict[Any, Any]):
    """An OrderedDict whose attributes a file may not replace; state dicts bring ``_metadata``."""

    def __setstate__(self, state: Any) -> None:
        # Without this the default BUILD would update __dict__ with any attribute of the file.
        if not (isinstance(state, dict) and set(state) <= {"_metadata"}):
            raise _Problem("it replaces attributes of a dictionary")


class _Storage(NamedTuple):
    """Bytes of a number, and how many there are: none in the type of a storage."""

    size: int
    numel: int = 0


# The private class is the unpickler in Python; pickle.Unpickler is the one in C.
class _Reader(pickle._Unpickler):
    """Unpickler that calls nothing of the file and records what it declares.

    Args:
        file: At the start of a pickle.
        packages: Those whose classes are allowed.
        names: Receives what the file names beside tensors, and whether it is allowed.

    Attributes:
        storages: Key of each storage that a tensor needs -> its bytes, as declared.
        nbytes: Of all tensors together, as declared.
    """

    # torch reads none of these; some take memory by a number in the file.
    dispatch = {
        code: read
        for code, read in pickle._Unpickler.dispatch.items()
        if bytes([code]) not in (b"P", b"\x82", b"\x83", b"\x84", b"\x96", b"\x97", b"\x98")
    }

    def __init__(self, file: BinaryIO, packages: Sequence[str], names: dict[str, bool]) -> None:
        super().__init__(file, encoding="latin1")  # decodes any byte, as of Python 2's strings
        self._packages = packages
        self._names = names
        self._made = 0
        self.storages: dict[str, int] = {}
        self.nbytes = 0
        self._known = {
            "collections.OrderedDict": lambda items=(): _Ordered(self._copy(items)),
            "_codecs.encode": self._encode,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            # A parameter is counted as the tensor in it.
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            **dict.fromkeys(_COPIES, self._copy),
        }

    def find_class(self, module: str, name: str) -> Any:
        """Return what takes the place of a function or class."""
        module = module.replace("__builtin__", "builtins")  # as protocol 2 calls it
        full = f"{module}.{name}"
        if full in self._known:
            return self._known[full]
        if full in _STORAGES:
            return _Storage(_STORAGES[full])
        if full not in _INERT:
            # Recorded, not raised: the message lists all names, even if the rest is damaged.
            self._names[full] = module.partition(".")[0] in self._packages
        return Inert

    def _count(self, nbytes: int) -> None:
        # Five bytes of a pickle repeat a call on one long list, and each call makes a copy.
        self._made += nbytes
        if self._made > _MOST_MADE:
            raise _Problem(f"its pickle makes more than {_MOST_MADE >> 20} MiB beside the tensors")

    def _copy(self, values: Any = (), *_: object) -> Any:
        """Count what a class would copy; return it in place of the copy."""
        self._count(64 + (1 if isinstance(values, str) else 64) * len(values))
        return values

    def _encode(self, text: str, encoding: str) -> Any:
        """Return the text in place of its bytes; pickle writes bytes as a call of this."""
        if encoding != "latin1":  # others make it longer, each time they are called
            raise _Problem(f"it encodes text as {str(encoding)[:20]!r}")
        return self._copy(text)

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that a record of the pickle declares."""
        try:
            kind, type_, key, _, numel = pid[:5]
            is_right = kind == "storage" and isinstance(type_, _Storage)
            # A negative size would lower the sum that is held against the file.
            is_right = is_right and isinstance(key, str) and _is_size(numel)
        except (TypeError, ValueError):
            is_right = False
        if not is_right:
            raise _Problem("a storage of it is of a kind that is not read")
        # Tied weights name a storage twice; a second size would go unchecked.
        if self.storages.setdefault(key, numel * type_.size) != numel * type_.size:
            raise _Problem(f"it declares two sizes of storage {key!r}")
        return _Storage(type_.size, numel)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Inert:
        """Check the shape of a tensor against its storage."""
        # Before any product: prod() of huge or of negative sizes means nothing.
        numbers = [offset, *size, *stride]
        is_right = isinstance(storage, _Storage) and len(size) == len(stride) <= _MOST_AXES
        if not is_right or not all(map(_is_size, numbers)):
            raise _Problem("a tensor of it has no shape")
        numel, shape = prod(size), tuple(size)
        # Index of the last element in the storage, for any strides.
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if numel and last >= storage.numel:
            raise _Problem(
                f"a tensor of shape {shape} reaches beyond its storage of {storage.numel} numbers"
            )
        # Strides of 0 repeat elements: torch allocates nothing, but the first copy allocates all.
        if numel > storage.numel:
            raise _Problem(
                f"a tensor of shape {shape} is expanded from {storage.numel} number(s); save a "
                "clone of it"
            )
        self.nbytes += numel * storage.size
        self._count(512)  # the object itself
        return Inert()


def scan(path: Path, end: int, *, foreign: Sequence[str] = ()) -> Scan:
    """Judge a file of torch.save by its table and its pickle, without reading its tensors.

    Args:
        path: Of the file.
        end: Bytes of it that torch.save wrote; a checksum of this project may follow.
        foreign: Packages whose objects the file may hold beside its tensors.

    Raises:
        OSError: It cannot be read.
    """
    names: dict[str, bool] = {}
    problem = ""
    try:
        with open(path, "rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"  # by which torch decides, too
            file.seek(0)
            read = partial(_Reader, packages=foreign, names=names)
            reader = _read_archive(file, end, read) if is_archive else _read_old(file, end, read)
        # A thousand views of one storage pass the checks above, and need its memory each if copied.
        if reader.nbytes > _MOST_SHARED * end + (1 << 20):
            raise _Problem(
                f"its tensors have {reader.nbytes / 2**20:.0f} MiB and the file {end / 2**20:.0f}: "
                "they share their storages; save clones of them"
            )
    except _Problem as error:
        problem = str(error)
    except OSError:  # of the disk, not of the content
        raise
    except Exception:  # of bytes that are not a pickle, or a partial one: any error may occur
        problem = "damaged"
    forbidden = [name for name, is_allowed in names.items() if not is_allowed]
    return Scan(forbidden[:_SHOWN], [name for name in names if names[name]], problem)


def _read_archive(file: BinaryIO, end: int, read: Callable[[BinaryIO], _Reader]) -> _Reader:
    """Read a zip archive, as torch.save writes it."""
    with zipfile.ZipFile(file) as archive:
        top = _judge_table(archive, file, end)
        # The table before the pickle: it bounds how much is read here.
        reader = read(io.BytesIO(archive.read(f"{top}/data.pkl")))
        reader.load()
        for key, nbytes in reader.storages.items():
            if archive.getinfo(f"{top}/data/{key}").file_size < nbytes:
                raise _Problem(f"storage {key!r} has fewer bytes than it declares")
    return reader


def _judge_table(archive: zipfile.ZipFile, file: BinaryIO, end: int) -> str:
    """Refuse what torch.save never writes; return the folder that all entries of a file are in."""
    entries = archive.infolist()
    whole = sum(entry.file_size for entry in entries)
    # Python's zipfile unpacks deflated entries, and so does torch: a few kB become gigabytes.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise _Problem(
            f"its entries are compressed and unpack from {end / 2**20:.1f} to "
            f"{whole / 2**20:.1f} MiB, which torch.save never writes"
        )
    # torch's zip reader compares names without case, so "A" and "a" are one entry to it; and a
    # flag that torch ignores says how names that are not ASCII are encoded.
    names = {entry.filename.lower() for entry in entries}
    tops = {entry.filename.partition("/")[0] for entry in entries}
    is_ascii = all(entry.filename.partition("/")[2].isascii() for entry in entries)
    if len(names) != len(entries) or len(tops) != 1 or whole > end or not is_ascii:
        raise _Problem("its entries overlap or have names that torch.save never gives")
    # torch finds the table by other rules than Python where a file is made for that.
    if _start_of_table(file, end) != archive.start_dir:
        raise ValueError("its table of entries is not where torch.save writes it")
    (top,) = tops
    if archive.getinfo(f"{top}/data.pkl").file_size > _MOST_PICKLED:
        raise _Problem(f"its pickle has more than {_MOST_PICKLED >> 20} MiB beside the tensors")
    return top


def _start_of_table(file: BinaryIO, end: int) -> int:
    """Return where a zip archive that ends at byte ``end`` declares its table to start; else -1."""
    file.seek(max(end - 98, 0))  # the end records of zip64 and zip, and a link between them
    tail = file.read(end - file.tell())
    kind, start, comment = struct.unpack("<4s12xIH", tail[-22:])
    # The end record must be last, without a comment: in one a second end record could hide.
    if kind != b"PK\x05\x06" or comment:
        return -1
    if tail[-42:-38] == b"PK\x06\x07":  # zip64, which torch writes for any size
        (place,) = struct.unpack("<Q", tail[-34:-26])
        kind, start = struct.unpack("<4s44xQ", tail[-98:-42])
        if kind != b"PK\x06\x06" or place != end - 98:
            return -1
    return int(start)


def _read_old(file: BinaryIO, end: int, read: Callable[[BinaryIO], _Reader]) -> _Reader:
    """Read a file from before zip archives: five pickles, and the storages behind them."""
    content = io.BytesIO(file.read(_MOST_PICKLED))
    if read(content).load() != _MAGIC:
        raise ValueError("not a file of torch.save")
    for _ in range(2):  # protocol and system
        read(content).load()
    reader = read(content)
    reader.load()
    if sorted(read(content).load()) != sorted(reader.storages):
        raise _Problem("it lists other storages than its tensors need")
    # Old files have no table of sizes, so only the sum can be checked.
    if sum(reader.storages.values()) > end:
        raise _Problem("its storages have fewer bytes than it declares")
    return reader
