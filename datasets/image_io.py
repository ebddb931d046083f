"""Decoding of image and label files by Pillow, with errors of one line.

Pillow refuses a JPEG that was cut off anywhere, but a PNG only where pixels are missing, and
without looking at checksums: these are verified first.
"""

import io
import logging
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from danet.errors import InputError

# Pillow's own limit: a 12000 x 9000 picture passes, a small file that unpacks to more does not.
MAX_PIXELS = 178_956_970
_OPENCV_SIDE = 2**20  # the longest that OpenCV decodes: it raises beyond
_PNG_END = b"\0\0\0\0IEND\xaeB\x60\x82"
_BITS, _BANDS = 258, 277  # tags of a TIFF: bits of each band, number of bands
_FAILURES = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
_pillow_limit = threading.Lock()
# It logs why it cannot open a TIFF; our error message has that already.
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)


@contextmanager
def open_picture(
    path: Path, *, max_pixels: int = MAX_PIXELS, is_label: bool = False, is_lossy: bool = False
) -> Iterator[Image.Image]:
    """Open a file whose pixels are decoded inside the block; errors become those of one line.

    It is refused if it is damaged, cut off, no picture, or has too many pixels; as a label also if
    it is a JPEG, unless ``is_lossy``, or has several pages.
    """
    try:
        data = path.read_bytes()
        with _open_unlimited(io.BytesIO(data)) as picture:
            width, height = picture.size
            refuse_size(path, width, height, max_pixels=max_pixels)
            if is_label and not is_lossy and picture.format in ("JPEG", "MPO"):
                raise InputError(
                    f"{path}: JPEG is lossy and changes class values; use PNG, or take each value "
                    "of own pictures for the nearest that is known: data.nearest=true with "
                    "'data.values={0:0,255:1}', value -> class, or with data.colors"
                )
            if is_label and (pages := getattr(picture, "n_frames", 1)) > 1:
                raise InputError(f"{path}: a label must be one picture, and this file has {pages}")
            if picture.format == "PNG":
                if _PNG_END not in data:
                    raise ValueError("the file is cut off")
                with _open_unlimited(io.BytesIO(data)) as other:  # verify() leaves it unusable
                    other.verify()
            yield picture
    except InputError:
        raise
    except _FAILURES as error:
        kind = "label" if is_label else "image"
        raise InputError(f"{path}: not a readable {kind} ({reason(error, path)})") from error


def refuse_size(path: Path, width: int, height: int, *, max_pixels: int) -> None:
    """Raise InputError for a picture of more pixels than ``data.max_pixels``."""
    if width * height > max_pixels:
        raise InputError(
            f"{path}: {width} x {height} are {width * height} pixels, more than "
            f"data.max_pixels={max_pixels}; raise data.max_pixels if it is meant to be read"
        )


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a picture as uint8 (H, W, 3), RGB; grey, palette, CMYK and alpha are converted.

    An EXIF orientation is not applied: labels are stored as the pixels are.
    """
    with open_picture(path, max_pixels=max_pixels) as picture:
        is_plain = picture.format == "PNG" and picture.mode == "RGB"
        if not is_plain or picture.info.get("transparency") or max(picture.size) > _OPENCV_SIDE:
            return to_rgb(picture, str(path))
        # A quarter faster than Pillow, and the checksums are right.
        data = np.frombuffer(picture.fp.getbuffer(), np.uint8)  # type: ignore[attr-defined]
        image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise ValueError("pixels are missing")
        return image


def to_rgb(picture: Image.Image, name: str) -> np.ndarray:
    """Return a picture of Pillow as uint8 (H, W, 3), RGB; ``name`` is for messages.

    Grey of 16 bits is divided by 257, where Pillow's ``convert`` would clip; white is the largest
    number of so many bits. Grey of 32 bits, whose range is unknown, raises InputError.
    """
    if picture.mode.startswith("I;16"):
        white = 2 ** bit_depth(picture) - 1
        grey = (np.asarray(picture).astype(np.int64) * 255 // white).astype(np.uint8)  # (H, W)
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    if picture.mode in ("I", "F"):
        kind = "whole numbers" if picture.mode == "I" else "floating-point numbers"
        raise InputError(
            f"{name}: grey of 32 bits ({kind}), of which it is not known what is black and what "
            "white; train with data.channels=1 data.range=auto, or save it with 8 or 16 bits"
        )
    if "transparency" in picture.info:  # Pillow warns of it unless it becomes a channel first
        picture = picture.convert("RGBA")
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def read_labels(path: Path, *, max_pixels: int = MAX_PIXELS, is_lossy: bool = False) -> np.ndarray:
    """Read a label picture as indices (H, W), uint8 or uint16; a palette is not applied.

    With ``is_lossy`` it may be a JPEG, and grey of three channels; other colours raise InputError.
    """
    with open_picture(path, max_pixels=max_pixels, is_label=True, is_lossy=is_lossy) as picture:
        labels = np.array(picture)  # (H, W), bool for one bit per pixel
        if is_lossy and labels.ndim == 3 and (labels[..., :1] == labels[..., :3]).all():
            labels = labels[..., 0]
        if labels.ndim != 2:
            raise InputError(
                f"{path}: a label must have one channel of class indices, this has "
                f"{labels.shape[2]} (mode {picture.mode}), {_describe_colors(picture)}"
            )
    return whole_labels(labels, str(path))


def _describe_colors(picture: Image.Image) -> str:
    """Name the first colours of a label and the setting that gives them a meaning."""
    if len(picture.getbands()) < 3:
        return "grey and alpha: save it without alpha"
    counts: Any = picture.convert("RGB").getcolors(2**24) or ()
    frequent = [color for count, color in counts if 50 * count > picture.width * picture.height]
    # Many rare ones are shades of smoothed edges.
    is_soft = len(counts) > 10 and 2 * len(frequent) < len(counts)
    found = sorted(frequent if is_soft else (color for _, color in counts))
    shown = ", ".join(f"[{str(color)[1:-1]}]".replace(" ", "") for color in found[:10])
    listed = shown.replace(" ", "") if len(found) <= 10 else "[red,green,blue],..."
    return (
        f"with {len(counts)} colours{', mostly' * is_soft}: {shown}{', ...' * (len(found) > 10)}; "
        f"data=folder reads colours with 'data.colors=[{listed}]', one for each class in order, "
        "also those of other files"
        f"{', and with data.nearest=true shades as of smoothed edges, too' * is_soft}"
    )


def whole_labels(labels: np.ndarray, where: str, *, kinds: str = "bui") -> np.ndarray:
    """Return labels (H, W) of a type in ``kinds``, such as "f" for floats, as uint8 or uint16.

    Anything but whole numbers 0..65535 in two axes raises InputError, which begins with ``where``.
    """
    if labels.ndim == 2 and labels.dtype in (np.uint8, np.uint16):
        return labels
    is_number = labels.dtype.kind in "buif" and labels.size > 0
    low, high = (labels.min(), labels.max()) if is_number else (0, 0)
    if is_number and labels.dtype.kind in kinds and labels.ndim == 2 and 0 <= low <= high < 65536:
        whole = labels.astype(np.uint8 if labels.dtype.itemsize == 1 else np.uint16)
        if np.array_equal(whole, labels):
            return whole
    raise InputError(
        f"{where}: a label must be an array of whole numbers 0..65535 (height, width), this is "
        f"{labels.dtype} {labels.shape}" + f" with {low}..{high}" * is_number
    )


class Levels(NamedTuple):
    """Number of distinct values of a picture of more than 8 bits, on disk and as it is read."""

    before: int
    after: int
    low: int
    high: int  # the range of the values on disk
    bands: int  # without alpha


def inspect_dropped(
    path: Path, *, max_pixels: int = MAX_PIXELS
) -> tuple[tuple[str, ...], Levels | None]:
    """Return what reading a picture drops, and its levels if it has more than 8 bits.

    Dropped are bits above 8, bands beyond three, and later pages.
    """
    with open_picture(path, max_pixels=max_pixels) as picture:
        bits, bands, mode = bit_depth(picture), len(picture.getbands()), picture.mode
        if picture.format == "TIFF":
            bands = int(picture.tag_v2.get(_BANDS, bands))  # type: ignore[attr-defined]
        # The further pages of a JPEG, as telephones write them, are previews of the first.
        pages = 1 if picture.format in ("JPEG", "MPO") else getattr(picture, "n_frames", 1)
    found, levels, is_alpha = [], None, mode in ("RGBA", "LA") and bands == len(mode)
    if bits > 8:
        found.append(f"{bits} bits become 8")
        after = np.unique(read_image(path, max_pixels=max_pixels)).size
        before = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)  # of colours Pillow has 8 bits only
        if before is not None:
            values = np.unique(np.atleast_3d(before)[..., :3])
            levels = Levels(values.size, after, int(values[0]), int(values[-1]), bands - is_alpha)
    kept = 1 if bands == 2 else 3
    if bands > kept and mode != "CMYK":
        extra = f"band {bands} is" if bands == kept + 1 else f"bands {kept + 1} to {bands} are"
        found.append(f"{extra} dropped" + " (alpha)" * is_alpha)
    if pages > 1:
        found.append("page 2 is dropped" if pages == 2 else f"pages 2 to {pages} are dropped")
    return tuple(found), levels


def bit_depth(picture: Image.Image) -> int:
    """Return the bits per channel of a picture that is not yet decoded."""
    if picture.format == "TIFF":
        return max(picture.tag_v2.get(_BITS, (8,)))  # type: ignore[attr-defined]
    # Pillow opens a PNG of RGB with 16 bits in the mode of 8; its decoder's mode is RGB;16B.
    modes = [picture.mode, *(str(tile[3]) for tile in getattr(picture, "tile", ()))]
    return 16 if any(";16" in mode for mode in modes) else 8


def _open_unlimited(file: IO[bytes]) -> Image.Image:
    """Open a picture of any size: ``max_pixels`` replaces Pillow's limit, which only warns."""
    with _pillow_limit:  # the limit is global, and data may be read in several threads
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def reason(error: Exception, path: Path) -> str:
    """Return why a file could not be decoded, from the error and its first bytes."""
    if isinstance(error, OSError) and error.errno is not None:
        is_missing = isinstance(error, FileNotFoundError)
        return "the file does not exist" if is_missing else str(error.strerror)
    if not (head := path.read_bytes()[:16]):
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError) and head[:4] in (b"II*\0", b"MM\0*"):
        return (
            "a TIFF that is not read as RGB, such as one of many bands, or several with 16 bits; "
            "train with data.channels=3 data.range=auto, which reads the first three, or save the "
            "three bands that matter as RGB with 8 bits"
        )
    if isinstance(error, UnidentifiedImageError):
        return f"not a picture of a known kind; it begins with {head!r}"
    if "truncated" in str(error).lower():
        return "the file is cut off"
    return str(error).replace(str(path), "").strip(" :'")
