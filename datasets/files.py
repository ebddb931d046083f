"""Decoding: a picture or label file on disk to an array, or one line that says why not."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from danet.errors import InputError


def read_image(path: Path) -> np.ndarray:
    """Reads a picture as uint8 (H, W, 3), RGB; grey, palette, CMYK and alpha are converted.

    Pillow decodes, since OpenCV returns half of a truncated JPEG without an error. An EXIF turn is
    not applied, so the picture lies as its label does.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode in ("I;16", "I;16B", "I"):  # convert() would clip, not scale
                wide = np.asarray(picture).astype(np.int64)
                grey = np.clip(wide // 257, 0, 255).astype(np.uint8)
                return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
            return np.array(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image ({_reason(error, path)})") from error


def read_labels(path: Path) -> np.ndarray:
    """Reads a label picture as (H, W) indices, uint8 or uint16; a palette is not looked up."""
    try:
        with Image.open(path) as picture:
            mode, kind = picture.mode, picture.format
            labels = np.array(picture)  # (H, W), bool for one bit a pixel
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable label ({_reason(error, path)})") from error
    if kind == "JPEG":
        raise InputError(f"{path}: JPEG is lossy and would change class values; use PNG")
    if labels.ndim != 2:
        raise InputError(
            f"{path}: a label must have one channel of class indices, this has {labels.shape[2]} "
            f"(mode {mode}); colour labels must be turned into class indices first"
        )
    if labels.dtype == np.bool_:
        labels = labels.astype(np.uint8)
    if labels.dtype == np.int32 and labels.size and labels.min() >= 0 and labels.max() < 65536:
        labels = labels.astype(np.uint16)
    if labels.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{path}: labels must be whole numbers 0..65535, found {labels.dtype}")
    return labels


def _reason(error: Exception, path: Path) -> str:
    """Says why a file could not be decoded; looks at its first bytes."""
    if not path.exists():
        return "the file does not exist"
    head = path.read_bytes()[:16]
    if not head:
        return "the file is empty"
    text = str(error).replace(str(path), "").strip(" :'")
    return f"{text}; it begins with {head!r}" if "identify" in text else text
