"""Labels in MATLAB files: one variable of a .mat file as class numbers."""

import io
import math
from pathlib import Path

import scipy.io
from numpy import ndarray

from danet.datasets.image_io import MAX_PIXELS, whole_labels
from danet.errors import InputError, first_line


def read_mat_labels(
    path: Path, variable: str, *, max_pixels: int = MAX_PIXELS
) -> tuple[ndarray, dict[str, int]]:
    """Return a variable, or struct.field, of a .mat file as (H, W), uint8 or uint16.

    MATLAB writes whole numbers in the smallest type that holds them, so the same variable comes as
    uint8 in one file, as uint16 or float64 in another. Returned with it is the number of elements
    of each variable in the file. Raises InputError if the file is damaged or of version 7.3, or the
    variable is missing, larger than ``max_pixels``, or not of whole numbers 0..65535 in two axes.
    """
    name, _, field = variable.partition(".")
    content = b""
    try:
        content = path.read_bytes()
        sizes = {n: math.prod(shape) for n, shape, _ in scipy.io.whosmat(io.BytesIO(content))}
        if sizes.get(name, 0) > max_pixels:  # some kilobytes can unpack to gigabytes
            found = f"{name} has {sizes[name]} pixels"
            raise InputError(f"{path}: {found}, more than data.max_pixels={max_pixels}")
        values = scipy.io.loadmat(io.BytesIO(content), variable_names=[name])[name]
        values = values[0, 0][field] if field else values
        return whole_labels(values, f"{path}, {variable}", kinds="buif"), sizes
    except InputError:
        raise
    except NotImplementedError as error:
        advice = "save it as version 7, save(..., '-v7')"
        raise InputError(f"{path}: a .mat file of version 7.3; {advice}") from error
    except Exception as error:  # scipy raises anything on a damaged file
        raise InputError(
            f"{path}: {variable} cannot be read ({type(error).__name__}: {first_line(error)}); the "
            f"file begins with {content[:16]!r}"
        ) from error
