"""One HTML page about a run: curves, scores, confusion, pictures, and an attention viewer.

Everything is inside the page: it needs no network and can be sent by mail.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from danet.evaluation.metrics import Scores
from danet.visualization.curves import chart
from danet.visualization.overlay import Palette, SegmentedImage, arrange, panels_of
from danet.visualization.viewer import AttentionView, data_uri, viewer_section

_HERE = Path(__file__).parent


class ScoredImage(NamedTuple):
    """An example of good or bad results."""

    picture: SegmentedImage
    score: float
    """Mean IoU over the classes that occur in it."""


class Report(NamedTuple):
    """The content of the page."""

    title: str
    facts: Sequence[str]
    """Sentences below the title."""
    classes: Sequence[str]
    palette: Palette
    matrix: np.ndarray
    """int64 (K, K): rows are truth, columns prediction, in pixels."""
    scores: Scores
    lines: Sequence[Mapping[str, Any]]
    """Of metrics.jsonl; empty where there is none."""
    best: Sequence[ScoredImage]
    worst: Sequence[ScoredImage]
    views: Sequence[AttentionView]


def page(report: Report) -> str:
    """Return the whole page as text."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{escape(report.title)}</title><style>{_read('report.css')}</style></head><body>",
        f"<h1>{escape(report.title)}</h1>",
        *(f"<p class='note'>{escape(fact)}</p>" for fact in report.facts),
        _totals(report.scores),
        "<h2>Curves</h2>",
        _curves(report.lines),
        "<h2>Classes</h2>",
        _class_table(report),
        "<h2>Confusion</h2>",
        "<p class='note'>Rows are truth and add up to 100 %; columns are predictions.</p>",
        _confusion(report),
        "<h2>Best pictures</h2>",
        _pictures(report.best, report.palette),
        "<h2>Worst pictures</h2>",
        _pictures(report.worst, report.palette),
        "<h2>What a pixel attends to</h2>",
        viewer_section(report.views, report.classes, report.palette),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part)


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _totals(scores: Scores) -> str:
    named = {
        f"mean IoU of {scores.classes_averaged} classes": scores.miou,
        "pixel accuracy": scores.pixel_accuracy,
        "mean accuracy": scores.mean_accuracy,
        "frequency-weighted IoU": scores.frequency_weighted_iou,
    }
    cells = (f"<div><b>{_percent(v)}</b><span>{name}</span></div>" for name, v in named.items())
    return f"<div class='scores'>{''.join(cells)}</div>"


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    if not lines:
        return "<p class='note'>There is no metrics.jsonl beside the checkpoint.</p>"
    charts = [
        chart("loss", named_curves(lines, "train", "loss")),
        chart("validation, mean IoU and pixel accuracy", val_curves(lines)),
        chart("learning rate", named_curves(lines, "train", "lr")),
        chart("images per second", named_curves(lines, "train", "images_per_second")),
    ]
    return f"<div class='charts'>{''.join(charts)}</div>"


def named_curves(
    lines: Sequence[Mapping[str, Any]], kind: str, start: str
) -> dict[str, list[tuple[float, float]]]:
    """Return the curves of one kind of lines of metrics.jsonl whose names begin with ``start``."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if line.get("kind") == kind and name.startswith(start) and value is not None:
                curves.setdefault(name, []).append((line["step"], value))
    return curves


def val_curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return the curves of the main validation scores."""
    return named_curves(lines, "val", "miou") | named_curves(lines, "val", "pixel_accuracy")


def _class_table(report: Report) -> str:
    share = report.matrix.sum(axis=1) / max(1, report.matrix.sum())
    rows = [
        "<tr><th>class</th><th class='number'>IoU</th><th></th><th class='number'>accuracy</th>"
        "<th class='number'>of the pixels</th></tr>"
    ]
    for i, name in enumerate(report.classes):
        iou = report.scores.iou[i]
        width = 0 if math.isnan(iou) else round(160 * iou)
        rows.append(
            f"<tr><td>{_swatch(report.palette[i])}{escape(name)}</td>"
            f"<td class='number'>{_percent(iou)}</td>"
            f"<td><span class='bar' style='width:{width}px'></span></td>"
            f"<td class='number'>{_percent(report.scores.accuracy[i])}</td>"
            f"<td class='number'>{_percent(float(share[i]))}</td></tr>"
        )
    return f"<table id='classes'>{''.join(rows)}</table>"


def _confusion(report: Report) -> str:
    totals = report.matrix.sum(axis=1, keepdims=True)
    shares = report.matrix / np.maximum(totals, 1)  # zeros for classes without a true pixel
    head = "".join(f"<th class='column'>{escape(name)}</th>" for name in report.classes)
    rows = [f"<tr><th></th>{head}</tr>"]
    for i, name in enumerate(report.classes):
        cells = []
        for j, share in enumerate(shares[i]):
            color = "46,157,99" if i == j else "200,60,40"
            ink = "#fff" if share > 0.55 else "#222"
            text = f"{100 * share:.0f}" if share >= 0.005 else ""
            what = f"{report.classes[j]} where {name} is true: {100 * share:.2f} %"
            cells.append(
                f"<td title='{escape(what, quote=True)}' "
                f"style='background:rgba({color},{share:.3f});color:{ink}'>{text}</td>"
            )
        rows.append(f"<tr><th>{_swatch(report.palette[i])}{escape(name)}</th>{''.join(cells)}</tr>")
    return f"<div class='scroll'><table class='confusion'>{''.join(rows)}</table></div>"


def _pictures(scored: Sequence[ScoredImage], palette: Palette) -> str:
    return f"<div class='pictures'>{''.join(_picture(one, palette) for one in scored)}</div>"


def _picture(scored: ScoredImage, palette: Palette) -> str:
    name = scored.picture.name
    drawn = _limit_width(arrange(panels_of(scored.picture, palette)), 1600)
    return (
        f"<figure><img alt='{escape(name, quote=True)}' src='{data_uri(drawn)}'>"
        f"<figcaption>{escape(name)}: mean IoU {_percent(scored.score)}</figcaption>"
        "</figure>"
    )


def _limit_width(image: np.ndarray, width: int) -> np.ndarray:
    if image.shape[1] <= width:
        return image
    size = width, round(image.shape[0] * width / image.shape[1])
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _swatch(color: tuple[int, int, int]) -> str:
    return f"<span class='swatch' style='background:rgb{tuple(color)}'></span>"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"
