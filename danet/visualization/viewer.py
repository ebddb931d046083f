"""Pictures for the attention viewer of the report.

The page computes the rows of the position attention itself, of queries and keys; see
``templates/viewer.js``.
"""

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from torch import nn

from danet.evaluation.base import Inference
from danet.visualization.attention import Point, choose_points, queries_and_keys
from danet.visualization.overlay import Palette, SegmentedImage, as_tensor, predict, shrink

MAX_POSITIONS = 8192
"""Of a picture in the viewer; queries and keys of so many take some 5 MB of the page."""


class AttentionView(NamedTuple):
    """A picture of the attention viewer."""

    picture: SegmentedImage
    queries: np.ndarray
    """float32 (D, h, w)."""
    keys: np.ndarray
    """float32 (D, h, w)."""


def compute_view(model: nn.Module, name: str, image: np.ndarray, infer: Inference) -> AttentionView:
    """Run a network with position attention over a picture, for the viewer.

    The prediction is that of ``infer`` for the picture as it is. Attention is that of one pass over
    all of it, made smaller if it has more than 8192 positions.
    """
    picture = SegmentedImage(name, image, predict(model, image, infer))
    # The stride of the network is not known here, so the size is found by trying.
    while True:
        queries, keys = queries_and_keys(model, as_tensor(picture.image, model))
        positions = queries[0].numel()
        if positions <= MAX_POSITIONS:
            break
        picture = shrink(picture, (MAX_POSITIONS / positions) ** 0.5 * 0.98)
    return AttentionView(picture, queries.cpu().numpy(), keys.cpu().numpy())


def viewer_data(
    views: Sequence[AttentionView], classes: Sequence[str], palette: Palette
) -> dict[str, Any]:
    """Return what the script of the page reads, for JSON."""
    pictures = []
    for (name, image, prediction, _), queries, keys in views:
        depth, rows, columns = queries.shape
        (start,) = choose_points(prediction, count=1) or [Point(0, 0)]
        # The class in the middle of each cell.
        cells = cv2.resize(prediction, (columns, rows), interpolation=cv2.INTER_NEAREST_EXACT)
        pictures.append(
            {
                "name": name,
                "width": image.shape[1],
                "height": image.shape[0],
                "rows": rows,
                "columns": columns,
                "depth": depth,
                "image": data_uri(image),
                "start": start,
                # Little-endian, as Float32Array reads it on all common machines.
                "queries": _base64(queries.astype("<f4")),
                "keys": _base64(keys.astype("<f4")),
                "cells": _base64(cells),
            }
        )
    return {"classes": classes, "palette": palette, "pictures": pictures}


def data_uri(image: np.ndarray) -> str:
    """Return a picture as a data URI: PNG, or JPEG where a PNG has more than 200 kB."""
    ordered = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    data, kind = cv2.imencode(".png", ordered)[1], "png"
    if len(data) > 200_000:
        data, kind = cv2.imencode(".jpg", ordered, [cv2.IMWRITE_JPEG_QUALITY, 90])[1], "jpeg"
    return f"data:image/{kind};base64,{_base64(data)}"


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
