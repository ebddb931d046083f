"""HTML pages from the folder ``templates``, and line charts for them.

A page has everything inside: it needs no network and can be sent by mail. All text that is put
into a template is escaped, so that no name of a file or a class becomes a part of the page.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.tests["nan"] = math.isnan

_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 508, 28, 226
"""Edges of the area of the curves in a chart of 520 x 260, in pixels."""
_NAMES_PER_LINE = 4
"""Of the key of a chart."""

Curve = Sequence[tuple[float, float]]
"""Points (x, y)."""


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


def chart(title: str, curves: Mapping[str, Curve]) -> Markup:
    """Draw curves over the step as an ``<svg>``; values that are not finite are left out."""
    shown = {name: [(x, y) for x, y in curve if math.isfinite(y)] for name, curve in curves.items()}
    points = np.array([point for curve in shown.values() for point in curve])  # (P, 2)
    if not points.size:
        return Markup()
    low, high = points.min(axis=0), points.max(axis=0)
    lines = math.ceil(len(shown) / _NAMES_PER_LINE) if len(shown) > 1 else 0
    corner = np.array((_LEFT, _BOTTOM))
    pixels = (_RIGHT, _TOP + 16 * lines) - corner

    def place(point: tuple[float, float]) -> list[float]:
        shares = np.where(low < high, (point - low) / np.maximum(high - low, 1e-300), 0.5)
        return (corner + shares * pixels).round(1).tolist()

    return render(
        "chart.svg",
        title=title,
        names_per_line=_NAMES_PER_LINE,
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
