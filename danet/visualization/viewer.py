"""The attention viewer of the report: rows of the position attention, computed in the browser."""

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
from danet.visualization.attention import Point, attention_branch, choose_points, queries_and_keys
from danet.visualization.overlay import Palette, as_tensor, predict

MAX_POSITIONS = 8192
"""Of a picture in the viewer; queries and keys of so many take some 5 MB of the page."""
_SCRIPT = Path(__file__).with_name("report.js")


class AttentionView(NamedTuple):
    """A picture of the attention viewer."""

    name: str
    image: np.ndarray
    """uint8 (H, W, 3)."""
    prediction: np.ndarray
    """uint8 (H, W)."""
    queries: np.ndarray
    """float32 (D, h, w)."""
    keys: np.ndarray
    """float32 (D, h, w)."""


def compute_view(
    model: nn.Module,
    name: str,
    image: np.ndarray,
    device: torch.device,
    infer: Inference | None = None,
) -> AttentionView:
    """Run a network with position attention over a picture, for the viewer.

    The prediction is that of ``infer`` for the picture as it is. Attention is that of one pass over
    all of it, made smaller if it has more than 8192 positions.
    """
    prediction = predict(model, image, device, infer)
    # The stride of the network is not known here, so the size is found by trying.
    while True:
        queries, keys = queries_and_keys(model, as_tensor(image, device))
        if queries[0].numel() <= MAX_POSITIONS:
            break
        factor = (MAX_POSITIONS / queries[0].numel()) ** 0.5 * 0.98
        size = int(image.shape[1] * factor), int(image.shape[0] * factor)
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    size = image.shape[1], image.shape[0]
    prediction = cv2.resize(prediction, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return AttentionView(name, image, prediction, queries.cpu().numpy(), keys.cpu().numpy())


def viewer_section(views: Sequence[AttentionView], classes: Sequence[str], palette: Palette) -> str:
    """Return the part of the page with the pictures, their data and the script."""
    if not views:
        return "<p class='note'>This network has no position attention.</p>"
    pictures = []
    for view in views:
        depth, rows, columns = view.queries.shape
        (start,) = choose_points(view.prediction, count=1) or [Point(0, 0)]
        cells = _cells(view.prediction, (rows, columns))
        pictures.append(
            {
                "name": view.name,
                "width": view.image.shape[1],
                "height": view.image.shape[0],
                "rows": rows,
                "columns": columns,
                "depth": depth,
                "image": data_uri(view.image),
                "start": list(start),
                # Little-endian, as Float32Array reads it on all common machines.
                "queries": _base64(view.queries.astype("<f4")),
                "keys": _base64(view.keys.astype("<f4")),
                "cells": _base64(cells),
            }
        )
    data = {
        "classes": list(classes),
        "palette": [list(color) for color in palette],
        "pictures": pictures,
    }
    script = _SCRIPT.read_text(encoding="utf-8")
    # A "</script>" in a name must not end the element.
    plain = json.dumps(data).replace("<", "\\u003c")
    return (
        "<p class='note'>Point at a pixel, or choose the picture and use the arrow keys: the "
        "stronger the red, the more of what the pixel gathers comes from there. Exact weights of "
        "the position attention, one cell for each position of the head.</p>"
        "<div id='choices'></div><div id='viewer'>"
        "<canvas id='attention' tabindex='0' aria-label='Attention viewer'></canvas>"
        "<div class='readout' id='readout' aria-live='polite'></div></div>"
        f"<script type='application/json' id='viewer-data'>{plain}</script>"
        f"<script>{script}</script>"
    )


def _cells(prediction: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the class in the middle of each cell, uint8 (h, w)."""
    tensor = torch.from_numpy(prediction)[None, None].float()
    return F.interpolate(tensor, size=size, mode="nearest-exact")[0, 0].to(torch.uint8).numpy()


def has_position_attention(model: nn.Module) -> bool:
    """Return whether the viewer has anything to show of a network."""
    return attention_branch(model, "position") is not None


def data_uri(image: np.ndarray) -> str:
    """Return a picture as a data URI: PNG, or JPEG where a PNG has more than 200 kB."""
    ordered = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    data, kind = cv2.imencode(".png", ordered)[1], "png"
    if len(data) > 200_000:
        data, kind = cv2.imencode(".jpg", ordered, [cv2.IMWRITE_JPEG_QUALITY, 90])[1], "jpeg"
    return f"data:image/{kind};base64,{_base64(data)}"


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
