"""The page about a run: curves, scores, confusion, pictures, and an attention viewer.

The viewer computes the rows of the position attention itself, of queries and keys; see
``templates/viewer.js``.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from torch import nn

from danet.evaluation.metrics import ConfusionMatrix
from danet.visualization.attention import Point, choose_points, queries_and_keys
from danet.visualization.overlay import Legend, SegmentedImage, sheet, shrink
from danet.visualization.pages import chart, named_curves, render

_MAX_WIDTH = 800
"""Of a picture on the page, in pixels."""
MAX_POSITIONS = 8192
"""Of a picture in the viewer; queries and keys of so many take some 5 MB of the page."""


class Report(NamedTuple):
    """The content of the page."""

    title: str
    facts: Sequence[str]
    """Sentences below the title."""
    legend: Legend
    confusion: ConfusionMatrix
    lines: Sequence[Mapping[str, Any]]
    """Of metrics.jsonl; empty where there is none."""
    examples: Mapping[str, Sequence[tuple[SegmentedImage, float]]]
    """Heading -> pictures, each with the mean IoU over the classes that occur in it."""
    views: Sequence[Mapping[str, Any]]
    """Of ``view``, for the attention viewer."""


def page(report: Report) -> str:
    """Return the whole page as text."""
    matrix, lines, legend = report.confusion.matrix.numpy(), report.lines, report.legend
    totals = matrix.sum(axis=1)  # (K,)
    scores = named_curves(lines, "val", "miou") | named_curves(lines, "val", "pixel_accuracy")
    return render(
        "report.html",
        title=report.title,
        report=report,
        legend=legend,
        scores=report.confusion.scores(),
        charts=[
            chart("loss", named_curves(lines, "train", "loss")),
            chart("validation, mean IoU and pixel accuracy", scores),
            chart("learning rate", named_curves(lines, "train", "lr")),
            chart("images per second", named_curves(lines, "train", "images_per_second")),
        ],
        pixels=totals / max(1, totals.sum()),
        # Zeros for classes without a true pixel.
        confusion=(matrix / np.maximum(totals, 1)[:, None]).tolist(),
        drawn=lambda picture: data_uri(
            sheet(legend, shrink(picture, _MAX_WIDTH / picture.image.shape[1]))
        ),
    )


def view(model: nn.Module, picture: SegmentedImage) -> dict[str, Any]:
    """Run a network with position attention over a picture; return what the viewer reads.

    Attention is that of one pass over all of it, made smaller if it has more than 8192 positions.
    """
    # The stride of the network is not known here, so the size is found by trying.
    while True:
        queries, keys = queries_and_keys(model, picture.image)
        depth, rows, columns = queries.shape
        if rows * columns <= MAX_POSITIONS:
            break
        picture = shrink(picture, (MAX_POSITIONS / (rows * columns)) ** 0.5 * 0.98)
    name, image, prediction, _ = picture
    # The class in the middle of each cell.
    cells = cv2.resize(prediction, (columns, rows), interpolation=cv2.INTER_NEAREST_EXACT)
    return {
        **{"name": name, "image": data_uri(image), "width": image.shape[1]},
        **{"height": image.shape[0], "rows": rows, "columns": columns, "depth": depth},
        "start": (choose_points(prediction, count=1) or [Point(0, 0)])[0],
        # Little-endian, as Float32Array reads it on all common machines.
        "queries": _base64(queries.cpu().numpy().astype("<f4")),
        "keys": _base64(keys.cpu().numpy().astype("<f4")),
        "cells": _base64(cells),
    }


def data_uri(image: np.ndarray) -> str:
    """Return a picture as a data URI."""
    ordered = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".webp", ordered, [cv2.IMWRITE_WEBP_QUALITY, 90])
    return f"data:image/webp;base64,{_base64(data)}"


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()
