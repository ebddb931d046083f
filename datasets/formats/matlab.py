"""Labels in MATLAB files: one variable of a .mat file as class numbers."""

import io
import math
from pathlib import Path
from typing import NamedTuple

import scipy.io
from numpy import ndarray

from danet.datasets.image_io import MAX_PIXELS, whole_labels
from danet.errors import InputError


class MatFile(NamedTuple):
    """A .mat file in memory, of which only the table of contents is decoded."""

    path: Path
    content: bytes
    shapes: dict[str, tuple[int, ...]]  # variable -> its shape


def open_mat(path: Path) -> MatFile:
    """Read a .mat file of version 4 to 7 and list its variables.

    Raises:
        InputError: It cannot be read, is damaged, or is of version 7.3.
    """
    content = b""
    try:
        content = path.read_bytes()
        variables = scipy.io.whosmat(io.BytesIO(content))
    except NotImplementedError as error:
        raise InputError(
            f"{path}: a .mat file of version 7.3; save it as version 7, save(..., '-v7')"
        ) from error
    except Exception as error:  # scipy raises anything on a damaged file
        raise InputError(f"{path}: not a readable .mat file ({_reason(error, content)})") from error
    return MatFile(path, content, {name: tuple(shape) for name, shape, _ in variables})


def read_mat_labels(mat: MatFile, variable: str, *, max_pixels: int = MAX_PIXELS) -> ndarray:
    """Return a variable, or struct.field, as (H, W), uint8 or uint16.

    MATLAB writes whole numbers in the smallest type that holds them, so the same variable comes as
    uint8 in one file, as uint16 or float64 in another.

    Raises:
        InputError: No such variable, or it does not hold whole numbers 0..65535 in two dimensions.
    """
    name, _, field = variable.partition(".")
    if name not in mat.shapes:
        found = ", ".join(sorted(mat.shapes)) or "nothing"
        raise InputError(f"{mat.path}: there is no variable {name} in it; it holds {found}")
    if math.prod(mat.shapes[name]) > max_pixels:  # some kilobytes can unpack to gigabytes
        raise InputError(
            f"{mat.path}: {name} has {math.prod(mat.shapes[name]):,} pixels, more than "
            f"data.max_pixels={max_pixels}"
        )
    try:
        values = scipy.io.loadmat(io.BytesIO(mat.content), variable_names=[name])[name]
        values = values[0, 0][field] if field else values
        return whole_labels(values, f"{mat.path}, {variable}", kinds="buif")
    except InputError:
        raise
    except Exception as error:  # as above
        reason = _reason(error, mat.content)
        raise InputError(f"{mat.path}: {variable} cannot be read ({reason})") from error


def _reason(error: Exception, content: bytes) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if not content:
        return "the file is empty"
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{text}; it begins with {content[:16]!r}"
