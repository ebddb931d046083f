"""The attention viewer of the report: what a pixel attends to, computed in the browser."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from danet.evaluation.inference import Inference
from danet.visualization.attention import Point, branch, choose_points, queries_and_keys
from danet.visualization.overlay import Palette, predict

_MOST_POSITIONS = 8192
"""Of a picture in the viewer; queries and keys of so many take some 5 MB of the page."""
_PROGRAM = Path(__file__).with_name("report.js")


class Viewed(NamedTuple):
    """A picture of the attention viewer."""

    name: str
    image: np.ndarray
    """uint8 (H, W, 3)."""
    prediction: np.ndarray
    queries: np.ndarray
    """float32 (D, h, w)."""
    keys: np.ndarray


def look_at(
    model: nn.Module,
    name: str,
    image: np.ndarray,
    device: torch.device,
    infer: Inference | None = None,
) -> Viewed:
    """Runs a network with position attention over a picture, for the viewer.

    The prediction is that of ``infer`` for the picture as it is. Attention is that of one pass over
    all of it, which is made smaller if it has more than 8192 positions.
    """
    prediction = predict(model, image, device, infer)
    while True:
        tensor = torch.from_numpy(image).permute(2, 0, 1)[None].to(device)
        queries, keys = queries_and_keys(model, tensor)
        if queries[0].numel() <= _MOST_POSITIONS:
            break
        factor = (_MOST_POSITIONS / queries[0].numel()) ** 0.5 * 0.98
        size = int(image.shape[1] * factor), int(image.shape[0] * factor)
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    size = image.shape[1], image.shape[0]
    prediction = cv2.resize(prediction, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return Viewed(name, image, prediction, queries.cpu().numpy(), keys.cpu().numpy())


def section(viewed: Sequence[Viewed], classes: Sequence[str], palette: Palette) -> str:
    """Returns the part of the page that shows the pictures, its data and its program."""
    if not viewed:
        return "<p class='note'>This network has no position attention.</p>"
    pictures = []
    for seen in viewed:
        depth, rows, columns = seen.queries.shape
        (start,) = choose_points(seen.prediction, count=1) or [Point(0, 0)]
        cells = _cells(seen.prediction, (rows, columns))
        pictures.append(
            {
                "name": seen.name,
                "width": seen.image.shape[1],
                "height": seen.image.shape[0],
                "rows": rows,
                "columns": columns,
                "depth": depth,
                "image": data_uri(seen.image),
                "start": list(start),
                "queries": _base64(seen.queries.astype("<f4")),
                "keys": _base64(seen.keys.astype("<f4")),
                "cells": _base64(cells),
            }
        )
    data = {
        "classes": list(classes),
        "palette": [list(color) for color in palette],
        "pictures": pictures,
    }
    program = _PROGRAM.read_text(encoding="utf-8")
    plain = json.dumps(data).replace("<", "\\u003c")
    return (
        "<p class='note'>Point at a pixel, or choose the picture and use the arrow keys: the "
        "stronger the red, the more of what the pixel gathers comes from there. Exact weights of "
        "the position attention, one cell for each position of the head.</p>"
        "<div id='choices'></div><div id='viewer'>"
        "<canvas id='attention' tabindex='0' aria-label='Attention viewer'></canvas>"
        "<div class='told' id='told' aria-live='polite'></div></div>"
        f"<script type='application/json' id='viewer-data'>{plain}</script>"
        f"<script>{program}</script>"
    )


def _cells(prediction: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the class in the middle of each cell, uint8 (h, w)."""
    tensor = torch.from_numpy(prediction)[None, None].float()
    return F.interpolate(tensor, size=size, mode="nearest-exact")[0, 0].to(torch.uint8).numpy()


def has_positions(model: nn.Module) -> bool:
    """Tells whether the viewer can show anything of a network."""
    return branch(model, "position") is not None


def data_uri(image: np.ndarray) -> str:
    """Returns a picture as text: PNG, or JPEG where that is much smaller."""
    ordered = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    data, kind = cv2.imencode(".png", ordered)[1], "png"
    if len(data) > 200_000:
        data, kind = cv2.imencode(".jpg", ordered, [cv2.IMWRITE_JPEG_QUALITY, 90])[1], "jpeg"
    return f"data:image/{kind};base64,{_base64(data)}"


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
