"""Labels in MATLAB files: one variable of a .mat file as class numbers."""

import io
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io

from danet.datasets.image_io import MAX_PIXELS
from danet.errors import InputError


class MatFile(NamedTuple):
    """A .mat file in memory, of which only the table of contents is decoded."""

    path: Path
    content: bytes
    shapes: dict[str, tuple[int, ...]]  # variable -> its shape


def open_mat(path: Path) -> MatFile:
    """Read a .mat file of version 4 to 7 and lists its variables.

    Raises:
        InputError: It cannot be read, is damaged, or is of version 7.3.
    """
    try:
        content = path.read_bytes()
        variables = scipy.io.whosmat(io.BytesIO(content))
    except OSError as error:
        raise InputError(f"{path}: not a readable label ({error.strerror or error})") from error
    except NotImplementedError as error:
        raise InputError(
            f"{path}: a .mat file of version 7.3; save it as version 7, save(..., '-v7')"
        ) from error
    except Exception as error:  # scipy raises anything on a damaged file
        raise InputError(f"{path}: not a readable .mat file ({_reason(error, content)})") from error
    return MatFile(path, content, {name: tuple(shape) for name, shape, _ in variables})


def read_mat_labels(mat: MatFile, variable: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return a variable as (H, W), uint8 or uint16.

    MATLAB writes whole numbers in the smallest type that holds them, so the same variable comes as
    uint8 in one file, as uint16 or float64 in another.

    Raises:
        InputError: No such variable, or it does not hold whole numbers 0..65535 in two dimensions.
    """
    if variable not in mat.shapes:
        found = ", ".join(sorted(mat.shapes)) or "nothing"
        raise InputError(f"{mat.path}: there is no variable {variable} in it; it holds {found}")
    if math.prod(mat.shapes[variable]) > max_pixels:  # some kilobytes can unpack to gigabytes
        raise InputError(
            f"{mat.path}: {variable} has {math.prod(mat.shapes[variable]):,} pixels, more than "
            f"data.max_pixels={max_pixels}"
        )
    try:
        values = scipy.io.loadmat(io.BytesIO(mat.content), variable_names=[variable])[variable]
    except Exception as error:  # as above
        reason = _reason(error, mat.content)
        raise InputError(f"{mat.path}: {variable} cannot be read ({reason})") from error
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "buif":
        raise InputError(f"{mat.path}: {variable} is not an array of numbers (H, W)")
    if values.dtype in (np.uint8, np.uint16):
        return values
    whole = values.astype(np.uint16) if _fits(values) else None
    if whole is None or not np.array_equal(whole, values):
        raise InputError(
            f"{mat.path}: {variable} must hold whole numbers 0..65535, found {values.dtype} with "
            f"{values.flat[0] if values.size else 'nothing'}"
        )
    return whole


def _fits(values: np.ndarray) -> bool:
    return bool(values.size and values.min() >= 0 and values.max() < 65536)  # False for NaN


def _reason(error: Exception, content: bytes) -> str:
    if not content:
        return "the file is empty"
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{text}; it begins with {content[:16]!r}"
