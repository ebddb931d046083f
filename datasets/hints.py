"""What messages add about a file: its colours, its EXIF orientation."""

from pathlib import Path

import numpy as np
from PIL import Image

# EXIF tag: 1 for a picture stored upright, 2 to 8 for one that viewers turn or mirror.
ORIENTATION = 0x0112


def is_coloured(path: Path) -> bool:
    """Return whether a file is a readable picture with colours, and no palette."""
    try:
        with Image.open(path) as picture:
            return picture.mode in ("RGB", "RGBA", "CMYK", "YCbCr")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def describe_colors(pixels: np.ndarray) -> str:
    """Name the first colours of a label (H, W, C) and the setting that gives them a meaning."""
    if pixels.shape[2] < 3:
        return "grey and alpha: save it without alpha"
    codes = pixels[..., :3].astype(np.int64) @ (65536, 256, 1)
    found = np.unique(codes)
    shown = ", ".join(f"[{c >> 16},{c >> 8 & 255},{c & 255}]" for c in found[:10].tolist())
    return (
        f"with {len(found)} colours: {shown}{', ...' if len(found) > 10 else ''}; data=folder "
        "reads colours with data.colors=[[red,green,blue],...], one for each class in order"
    )


def orientation_note(path: Path) -> str:
    """Report an EXIF orientation of an image, which is not applied; empty where there is none."""
    with Image.open(path) as picture:
        width, height = picture.size
        turn = picture.getexif().get(ORIENTATION, 1)
    if turn not in range(2, 9):
        return ""
    shown = f"{height} x {width}" if turn > 4 else f"{width} x {height}"
    return (
        f"; its EXIF tag {turn} makes viewers turn the image to {shown}, which is not done here: "
        "images are read as their pixels lie, so turn the image file or its label"
    )
