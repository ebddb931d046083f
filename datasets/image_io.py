"""Decoding of image and label files to arrays, with errors of one line.

OpenCV decodes the common kinds, 8-bit PNG without a palette and 8-bit JPEG: it takes 15 to 25 %
less time than Pillow and gives the same values. It returns half of a truncated JPEG without an
error, so it gets only files that were verified: every chunk of a PNG has its checksum and the last
is there; in a JPEG the marker of the end follows the scans. Pillow decodes all other kinds.
torchvision's decoders are no faster than OpenCV's and deprecated.
"""

import io
import logging
import re
import struct
import threading
import zlib
from pathlib import Path
from typing import IO, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from danet.datasets.hints import describe_colors
from danet.errors import InputError

# Pillow's own limit: a 12000 x 9000 picture passes, a small file that unpacks to more does not.
MAX_PIXELS = 178_956_970

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_BITS, _BANDS = 258, 277  # tags of a TIFF: bits of each band, number of bands
_GREY, _RGB = 0, 2  # color types of a PNG
# A JPEG marker that is not a stuffed byte, a restart or padding: never inside a scan.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # markers that hold the size
_FAILURES = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
_pillow_limit = threading.Lock()
# It logs why it cannot open a TIFF; our error message has that already.
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)


class _Header(NamedTuple):
    """The header of a PNG or JPEG; sizes in pixels."""

    width: int
    height: int
    channels: int
    is_common: bool  # whether OpenCV gives the same values as Pillow


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a picture as uint8 (H, W, 3), RGB; grey, palette, CMYK and alpha are converted.

    An EXIF orientation is not applied: labels are stored as the pixels are.

    Raises:
        InputError: The file is missing, damaged, cut off, no picture, or has too many pixels.
    """
    try:
        data = path.read_bytes()
        header = _verify(data, path, max_pixels)
        if header and header.is_common:
            flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            image = _decode_opencv(data, flags)
            if image is not None and image.shape == (header.height, header.width, 3):
                return image
        with _open_pillow(data, path, max_pixels) as picture:
            return to_rgb(picture, str(path))
    except InputError:
        raise
    except _FAILURES as error:
        raise InputError(f"{path}: not a readable image ({_reason(error, path)})") from error


def to_rgb(picture: Image.Image, name: str) -> np.ndarray:
    """Return a picture of Pillow as uint8 (H, W, 3), RGB; ``name`` is for messages.

    Grey of 16 bits is divided by 257, where Pillow's ``convert`` would clip; white is the largest
    number of so many bits.

    Raises:
        InputError: It is grey of 32 bits, whose range is unknown.
    """
    is_png = picture.format == "PNG"  # 16 bits at most, though old releases of Pillow open it as I
    if picture.mode.startswith("I;16") or (picture.mode == "I" and is_png):
        white = 2 ** _bit_depth(picture) - 1 if picture.format == "TIFF" else 65535
        grey = (np.asarray(picture).astype(np.int64) * 255 // white).astype(np.uint8)  # (H, W)
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    if picture.mode in ("I", "F"):
        kind = "whole numbers" if picture.mode == "I" else "floating-point numbers"
        raise InputError(
            f"{name}: grey of 32 bits ({kind}), of which it is not known what is black and what "
            "white; save it with 8 or 16 bits"
        )
    # Pillow warns of transparency given as bytes unless it becomes a channel first.
    has_alpha = "transparency" in picture.info
    return np.array((picture.convert("RGBA") if has_alpha else picture).convert("RGB"))


def _dropped_content(picture: Image.Image, head: bytes) -> tuple[str, ...]:
    """Return what reading a picture drops: bits above 8, bands beyond three, later pages."""
    found = []
    bits, bands = _bit_depth(picture, head), len(picture.getbands())
    if picture.format == "TIFF":
        bands = int(picture.tag_v2.get(_BANDS, bands))  # type: ignore[attr-defined]
    if bits > 8:
        found.append(f"{bits} bits become 8")
    kept = 1 if bands == 2 else 3
    if bands > kept and picture.mode != "CMYK":
        extra = f"band {bands} is" if bands == kept + 1 else f"bands {kept + 1} to {bands} are"
        is_alpha = picture.mode in ("RGBA", "LA") and bands == kept + 1
        found.append(f"{extra} dropped" + " (alpha)" * is_alpha)
    # The further pages of a JPEG, as telephones write them, are previews of the first.
    pages = getattr(picture, "n_frames", 1) if picture.format not in ("JPEG", "MPO") else 1
    if pages > 1:
        found.append("page 2 is dropped" if pages == 2 else f"pages 2 to {pages} are dropped")
    return tuple(found)


def _bit_depth(picture: Image.Image, head: bytes = b"") -> int:
    """Return the bits per channel, of a PNG from ``head``, the first 26 bytes of the file."""
    if picture.format == "PNG" and len(head) > 24:
        return head[24]  # in IHDR; Pillow opens RGB of 16 bits with the mode of 8
    if picture.format == "TIFF":
        return max(picture.tag_v2.get(_BITS, (8,)))  # type: ignore[attr-defined]
    return 16 if picture.mode.startswith("I;16") else 8


def inspect_dropped(
    path: Path, *, max_pixels: int = MAX_PIXELS
) -> "tuple[tuple[str, ...], Levels | None]":
    """Return what reading a picture drops, and its levels if it has more than 8 bits.

    Of other pictures only the header is read.

    Raises:
        InputError: As read_image.
    """
    try:
        with path.open("rb") as file:
            head = file.read(26)
            with _open_unlimited(file) as picture:
                dropped, bits = _dropped_content(picture, head), _bit_depth(picture, head)
    except _FAILURES as error:
        raise InputError(f"{path}: not a readable image ({_reason(error, path)})") from error
    return dropped, _count_levels(path, max_pixels=max_pixels) if bits > 8 else None


class Levels(NamedTuple):
    """Number of distinct values of a picture of more than 8 bits, on disk and as it is read."""

    before: int
    after: int
    low: int
    high: int  # the range of the values on disk


def _count_levels(path: Path, *, max_pixels: int) -> Levels | None:
    """Count the values of a picture; return None where only Pillow can decode it."""
    after, data = read_image(path, max_pixels=max_pixels), path.read_bytes()
    with _open_pillow(data, path, max_pixels) as picture:
        is_grey = picture.mode.startswith("I")
        found = np.asarray(picture) if is_grey else _decode_opencv(data, cv2.IMREAD_UNCHANGED)
    if found is None:
        return None
    before = found[..., :3] if found.ndim == 3 else found
    return Levels(
        np.unique(before).size, np.unique(after).size, int(before.min()), int(before.max())
    )


def read_labels(path: Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a label picture as indices (H, W), uint8 or uint16; a palette is not applied.

    Raises:
        InputError: As read_image; or the file is a JPEG, has colours, or no whole numbers.
    """
    try:
        data = path.read_bytes()
        header = _verify(data, path, max_pixels)
        if header and header.is_common and header.channels == 1 and data.startswith(_PNG):
            labels = _decode_opencv(data, cv2.IMREAD_UNCHANGED)
            if labels is not None and labels.shape == (header.height, header.width):
                return labels
        with _open_pillow(data, path, max_pixels) as picture:
            mode, kind = picture.mode, picture.format
            if kind in ("JPEG", "MPO"):
                raise InputError(f"{path}: JPEG is lossy and would change class values; use PNG")
            if (pages := getattr(picture, "n_frames", 1)) > 1:
                raise InputError(f"{path}: a label must be one picture, and this file has {pages}")
            labels = np.array(picture)  # (H, W), bool for one bit per pixel
    except InputError:
        raise
    except _FAILURES as error:
        raise InputError(f"{path}: not a readable label ({_reason(error, path)})") from error
    if labels.ndim != 2:
        raise InputError(
            f"{path}: a label must have one channel of class indices, this has {labels.shape[2]} "
            f"(mode {mode}), {describe_colors(labels)}"
        )
    if labels.dtype == np.bool_:
        labels = labels.astype(np.uint8)
    if labels.dtype == np.int32 and labels.size and labels.min() >= 0 and labels.max() < 65536:
        labels = labels.astype(np.uint16)
    if labels.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{path}: labels must be whole numbers 0..65535, found {labels.dtype}")
    return labels


def verify_complete(path: Path, *, max_pixels: int = MAX_PIXELS) -> bool:
    """Verify without decoding that a picture is complete; False if its kind does not allow that.

    Raises:
        InputError: As read_image, for PNG and JPEG.
    """
    try:
        return _verify(path.read_bytes(), path, max_pixels) is not None
    except InputError:
        raise
    except _FAILURES as error:
        raise InputError(f"{path}: not a readable image ({_reason(error, path)})") from error


def _verify(data: bytes, path: Path, max_pixels: int) -> _Header | None:
    """Return the header of a complete PNG or JPEG; None for other kinds.

    Raises:
        ValueError: It is cut off, or a checksum is wrong.
        InputError: It has too many pixels.
    """
    if data.startswith(_PNG):
        if len(data) < 33:
            raise ValueError("the file is cut off: its first chunk is not whole")
        width, height = struct.unpack_from(">II", data, 16)
        _check_pixels(width, height, path, max_pixels)
        return _verify_png(data)
    if data.startswith(_JPEG):
        header = _verify_jpeg(data)
        if header:
            _check_pixels(header.width, header.height, path, max_pixels)
        return header
    return None


def _verify_png(data: bytes) -> _Header:
    """Check all chunks: length, type, content, CRC-32 of type and content."""
    view, position, kinds = memoryview(data), len(_PNG), set()
    while b"IEND" not in kinds:
        if position + 12 > len(data):
            raise ValueError("the file is cut off: its last chunk is missing")
        end = position + 12 + int.from_bytes(view[position : position + 4], "big")
        if end > len(data):
            raise ValueError("the file is cut off inside a chunk")
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise ValueError(f"the file is damaged: a wrong checksum at byte {position}")
        kinds.add(data[position + 4 : position + 8])
        position = end
    width, height, depth, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    is_common = depth == 8 and color in (_GREY, _RGB) and not interlaced and b"tRNS" not in kinds
    return _Header(width, height, 3 if color == _RGB else 1, is_common)


def _verify_jpeg(data: bytes) -> _Header | None:
    """Follow the markers to the end of the picture; return None without a frame of known size.

    In a scan 0xFF is followed by 0x00 or the number of a restart, so what looks like a marker there
    is one, and a file that was cut anywhere has no end.
    """
    position, header = 2, None
    while True:
        found = _MARKER.search(data, position)
        if found is None or (found.end() + 2 > len(data) and data[found.end() - 1] != 0xD9):
            raise ValueError("the file is cut off: the end of the picture is missing")
        kind, start = data[found.end() - 1], found.end()
        if kind == 0xD9:
            return header
        if kind in _FRAMES and header is None and start + 8 <= len(data):
            depth, height, width, channels = struct.unpack_from(">BHHB", data, start + 2)
            is_common = kind <= 0xC2 and depth == 8 and channels in (1, 3) and height > 0
            header = _Header(width, height, channels, is_common)
        position = start + int.from_bytes(data[start : start + 2], "big")


def _check_pixels(width: int, height: int, path: Path, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise InputError(
            f"{path}: {width} x {height} are {width * height} pixels, more than "
            f"data.max_pixels={max_pixels}; raise data.max_pixels if it is meant to be read"
        )


def _decode_opencv(data: bytes, flags: int) -> np.ndarray | None:
    """Decode a verified file; None if OpenCV fails, since Pillow explains errors better."""
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None


def _open_pillow(data: bytes, path: Path, max_pixels: int) -> Image.Image:
    """Open a picture of any kind; its pixels are not decoded yet."""
    picture = _open_unlimited(io.BytesIO(data))
    _check_pixels(*picture.size, path, max_pixels)
    return picture


def _open_unlimited(file: IO[bytes]) -> Image.Image:
    """Open a picture of any size: ``max_pixels`` replaces Pillow's limit, which only warns."""
    with _pillow_limit:  # the limit is global, and data may be read in several threads
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _reason(error: Exception, path: Path) -> str:
    """Return why a file could not be decoded, from the error and its first bytes."""
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, OSError) and error.errno is not None:
        return str(error.strerror)
    head = path.read_bytes()[:16]
    if not head:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError) and head[:4] in (b"II*\0", b"MM\0*"):
        return (
            "a TIFF of a kind that is not read, such as one of many bands, or of several with 16 "
            "bits; save the three bands that matter as RGB with 8 bits"
        )
    if isinstance(error, UnidentifiedImageError):
        return f"not a picture of a known kind; it begins with {head!r}"
    return str(error).replace(str(path), "").strip(" :'")
