"""What messages add about a file: its colours, its EXIF turn."""

from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION = 0x0112
"""EXIF tag: 1 for a picture that lies as it is to be seen, 2 to 8 for one that is to be turned."""


def name_colors(pixels: np.ndarray) -> str:
    """Names the first colours of a label of several channels and what gives them a meaning."""
    if pixels.shape[2] < 3:
        return "grey and alpha: save it without alpha"
    codes = pixels[..., :3].astype(np.int64) @ (65536, 256, 1)
    found = np.unique(codes)
    shown = ", ".join(f"[{c >> 16},{c >> 8 & 255},{c & 255}]" for c in found[:10].tolist())
    return (
        f"with {len(found)} colours: {shown}{', ...' if len(found) > 10 else ''}; data=folder "
        "reads colours with data.colors=[[red,green,blue],...], one for each class in order"
    )


def turn_note(path: Path) -> str:
    """Tells of an EXIF turn of an image, which is not applied; empty where there is none."""
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
