"""HTML pages from the folder ``templates``, line charts for them, and the page about a run.

A page has everything inside: it needs no network and can be sent by mail. All text that is put
into a template is escaped, so that no name of a file or a class becomes a part of the page. That
of a run has an attention viewer, which computes rows of the position attention of queries and keys.
"""

import base64
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from torch import nn

from danet.datasets.labels import is_background
from danet.evaluation.corruptions import GROUPS
from danet.evaluation.metrics import ConfusionMatrix
from danet.visualization.attention import (
    choose_points,
    explain,
    features_of,
    for_one_pass,
    queries_and_keys,
)
from danet.visualization.overlay import Legend, SegmentedImage, panels_of, resize

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.tests["nan"] = math.isnan
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 508, 34, 222
"""Edges of the area of the curves in a chart of 520 x 260, in pixels."""
Curve = Sequence[tuple[float, float]]  # points (x, y)


def render(template: str, **values: Any) -> Markup:
    """Return a page, or a part of one for another template."""
    return Markup(_TEMPLATES.get_template(template).render(values))


def named_curves(
    lines: Iterable[Mapping[str, Any]], kind: str, start: str
) -> dict[str, list[tuple[float, float]]]:
    """Return the curves of one kind of lines of metrics.jsonl whose names begin with ``start``."""
    curves = defaultdict(list)
    for line in lines:
        for name, value in line.items():
            if line.get("kind") == kind and name.startswith(start) and value is not None:
                curves[name].append((line["step"], value))
    return curves


def css_colors(legend: Legend) -> list[str]:
    """Return the colours of the swatches of classes as CSS writes them."""
    return [
        "transparent" if is_background(name) else f"rgb{tuple(color)}"
        for name, color in zip(legend.classes, legend.palette, strict=True)
    ]


def chart(title: str, curves: Mapping[str, Curve], *, along: str = "step") -> Markup:
    """Draw the finite values of curves over ``along``, as a ``<figure>`` with a key."""
    shown = {name: [(x, y) for x, y in curve if math.isfinite(y)] for name, curve in curves.items()}
    points = np.array([point for curve in shown.values() for point in curve])  # (P, 2)
    if not points.size:
        return Markup()
    low, high = points.min(axis=0), points.max(axis=0)
    corner = np.array((_LEFT, _BOTTOM))
    pixels = (_RIGHT, _TOP) - corner

    def place(point: tuple[float, float]) -> list[float]:
        shares = np.where(low < high, (point - low) / np.maximum(high - low, 1e-300), 0.5)
        return (corner + shares * pixels).round(1).tolist()

    return render(
        "chart.html",
        title=title,
        along=along,
        x_ticks=[(place((x, low[1]))[0], f"{x:g}") for x in _ticks(low[0], high[0])],
        y_ticks=[(place((low[0], y))[1], f"{y:g}") for y in _ticks(low[1], high[1])],
        curves={name: [place(point) for point in curve] for name, curve in shown.items()},
    )


def _ticks(low: float, high: float) -> list[float]:
    """Return up to six round numbers from low to high, or the only value."""
    if low == high:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


_MAX_WIDTH = 800  # of a picture on the page, in pixels
MAX_POSITIONS = 8192  # of a picture in the viewer; their queries and keys take 5 MB of the page

_FIGURES = {
    "size": "positions, or channels: the rows and columns of the attention map",
    "effective": "columns that a row attends to (exponential of its entropy)",
    "on_strongest": "share of all attention on the strongest column",
    "same_strongest": "share of the rows that have their largest weight in the same column",
    "row_cosine": "mean cosine of two rows",
    "energy_std": "standard deviation of the energies of a row",
    "reach": "mean distance of what is attended to, as a share of the diagonal",
    "on_registers": "share of all attention on registers",
    "scale": "learned scale of the similarities",
    "gamma": "gamma",
    "moved": "norm of gamma * context, as a share of that of the features",
    "varies": "share of the norm of the context that differs between rows",
}
"""Keys of ``diagnose``, in the order of the page, and what it says of them."""


class Report(NamedTuple):
    """The content of the page."""

    title: str
    facts: Sequence[str]  # sentences below the title
    legend: Legend
    confusion: ConfusionMatrix
    lines: Sequence[Mapping[str, Any]]  # of metrics.jsonl; empty where there is none
    examples: Mapping[str, Sequence[tuple[SegmentedImage, float]]]
    """Heading -> pictures, each with the mean IoU over the classes that occur in it."""
    views: Sequence[Mapping[str, Any]]  # of ``view``, for the attention viewer
    calibration: Sequence[Mapping[str, Any]]  # facts of Calibration at one or two temperatures
    corruptions: Mapping[str, Sequence[float]] = {}
    """Name -> mean IoU without the corruption, then at its strengths; empty where not scored."""
    attention: Mapping[str, Mapping[str, float]] = {}
    """Of ``diagnose_attention``, by branch; empty for a head without one."""
    deletions: Sequence[Mapping[str, Any]] = ()
    """Rows of ``deletions_by_class``."""


def page(report: Report) -> str:
    """Return the whole page as text."""
    matrix, lines, legend = report.confusion.matrix.numpy(), report.lines, report.legend
    totals = matrix.sum(axis=1)  # (K,)
    losses = named_curves(lines, "train", "loss")
    losses |= {f"validation {k}": curve for k, curve in named_curves(lines, "val", "loss").items()}

    def curves(table: str, x: str, y: str) -> dict[str, Curve]:
        facts = [(f["temperature"], f[table]) for f in report.calibration]
        return {f"T = {t:.4g}": [*zip(of[x], of[y], strict=True)] for t, of in facts}

    scores = named_curves(lines, "val", "miou") | named_curves(lines, "val", "pixel_accuracy")
    by_group = defaultdict(list)
    for name, row in report.corruptions.items():
        by_group[GROUPS[name]].append(row)
    attention = named_curves(lines, "attention", "")

    def of_branches(figure: str) -> dict[str, Curve]:
        found = {branch: attention.get(f"{branch}/{figure}") for branch in report.attention}
        return {branch: curve for branch, curve in found.items() if curve}

    means = {group: list(enumerate(np.mean(rows, axis=0))) for group, rows in by_group.items()}
    return render(
        "report.html",
        title=report.title,
        report=report,
        classes=legend.classes,
        colors=css_colors(legend),
        scores=report.confusion.scores(),
        charts=[
            chart("loss", losses),
            chart("validation, mean IoU and pixel accuracy", scores),
            chart("learning rate", named_curves(lines, "train", "lr")),
            chart("images per second", named_curves(lines, "train", "images_per_second")),
        ],
        reliability={**curves("bins", "confidence", "accuracy"), "ideal": [(0, 0), (1, 1)]},
        risk=curves("risk_coverage", "coverage", "risk"),
        chart=chart,
        groups=GROUPS,
        corruption_chart=chart("corruptions, mean IoU", means, along="strength"),
        figures={
            text: [found.get(key) for found in report.attention.values()]
            for key, text in _FIGURES.items()
            if any(key in found for found in report.attention.values())
        },
        explanations=[explain(name, found) for name, found in report.attention.items()],
        attention_charts=[
            chart("attention, gamma", of_branches("gamma")),
            chart("attention, mean cosine of two rows", of_branches("row_cosine")),
        ],
        pixels=totals / max(1, totals.sum()),
        # Zeros for classes without a true pixel.
        confusion=(matrix / np.maximum(totals, 1)[:, None]).tolist(),
        panels=lambda picture: panels_of(
            resize(picture, min(1, _MAX_WIDTH / picture.image.shape[1])), legend
        ),
        data_uri=data_uri,
    )


def fit(model: nn.Module, picture: SegmentedImage) -> SegmentedImage:
    """Make a picture smaller if the head has more than 8192 positions for it."""
    picture = for_one_pass(model, picture)
    # The stride of the network is not known here, so the size is found by trying.
    while (positions := features_of(model, picture.image)[0, 0].numel()) > MAX_POSITIONS:
        picture = resize(picture, (MAX_POSITIONS / positions) ** 0.5 * 0.98)
    return picture


def view(model: nn.Module, picture: SegmentedImage, wanted: Sequence[int] = ()) -> dict[str, Any]:
    """Run a network with position attention over a picture; return what the viewer reads.

    Attention is that of one pass over all of it, made smaller as ``fit`` does.
    The viewer starts at a cell of one of the classes ``wanted``, or else of a rare one.
    """
    picture = fit(model, picture)
    queries, keys = queries_and_keys(model, picture.image)
    depth, rows, columns = queries.shape
    name, image, prediction, _ = picture
    # The class in the middle of each cell.
    cells = cv2.resize(prediction, (columns, rows), interpolation=cv2.INTER_NEAREST_EXACT)
    found = choose_points(cells, wanted=wanted) if wanted else []
    x, y = [*found, *choose_points(cells, count=1), (0, 0)][0]
    height, width = prediction.shape
    bands = getattr(model, "bands", None)
    shown = bands.show(image) if bands else image
    return {
        **{"name": name, "image": data_uri(shown), "width": width, "height": height},
        **{"rows": rows, "columns": columns, "depth": depth},
        "wanted": bool(found) if wanted else None,
        "start": [(2 * x + 1) * width // (2 * columns), (2 * y + 1) * height // (2 * rows)],
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
