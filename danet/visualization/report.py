"""One HTML page about a run: curves, scores, confusion, pictures, and an attention viewer.

Everything is inside the page: it needs no network and can be sent by mail.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from danet.evaluation.metrics import Scores
from danet.visualization.curves import chart
from danet.visualization.overlay import Palette, arrange, errors, overlay, titled
from danet.visualization.viewer import Viewed, data_uri, section

_HERE = Path(__file__).parent


class Scored(NamedTuple):
    """A picture that stands for good or bad results."""

    name: str
    score: float
    """Mean IoU over the classes that occur in it."""
    image: np.ndarray
    prediction: np.ndarray
    truth: np.ndarray


class Findings(NamedTuple):
    """What the page is about."""

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
    best: Sequence[Scored]
    worst: Sequence[Scored]
    viewed: Sequence[Viewed]


def page(found: Findings) -> str:
    """Returns the whole page as text."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{escape(found.title)}</title><style>{_read('report.css')}</style></head><body>",
        f"<h1>{escape(found.title)}</h1>",
        *(f"<p class='note'>{escape(fact)}</p>" for fact in found.facts),
        _totals(found.scores),
        "<h2>Curves</h2>",
        _curves(found.lines),
        "<h2>Classes</h2>",
        _class_table(found),
        "<h2>Confusion</h2>",
        "<p class='note'>Rows are truth and add up to 100 %; columns are predictions.</p>",
        _confusion(found),
        "<h2>Best pictures</h2>",
        _pictures(found.best, found.palette),
        "<h2>Worst pictures</h2>",
        _pictures(found.worst, found.palette),
        "<h2>What a pixel attends to</h2>",
        section(found.viewed, found.classes, found.palette),
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
    """Returns the curves of metrics.jsonl of one kind whose names begin so, by name."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if line.get("kind") == kind and name.startswith(start) and value is not None:
                curves.setdefault(name, []).append((line["step"], value))
    return curves


def val_curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Returns the curves of the validation's main scores."""
    return named_curves(lines, "val", "miou") | named_curves(lines, "val", "pixel_accuracy")


def _class_table(found: Findings) -> str:
    share = found.matrix.sum(axis=1) / max(1, found.matrix.sum())
    rows = [
        "<tr><th>class</th><th class='number'>IoU</th><th></th><th class='number'>accuracy</th>"
        "<th class='number'>of the pixels</th></tr>"
    ]
    for i, name in enumerate(found.classes):
        iou = found.scores.iou[i]
        width = 0 if iou != iou else round(160 * iou)
        rows.append(
            f"<tr><td>{_swatch(found.palette[i])}{escape(name)}</td>"
            f"<td class='number'>{_percent(iou)}</td>"
            f"<td><span class='bar' style='width:{width}px'></span></td>"
            f"<td class='number'>{_percent(found.scores.accuracy[i])}</td>"
            f"<td class='number'>{_percent(float(share[i]))}</td></tr>"
        )
    return f"<table id='classes'>{''.join(rows)}</table>"


def _confusion(found: Findings) -> str:
    totals = found.matrix.sum(axis=1, keepdims=True)
    shares = found.matrix / np.maximum(totals, 1)
    head = "".join(f"<th class='column'>{escape(name)}</th>" for name in found.classes)
    rows = [f"<tr><th></th>{head}</tr>"]
    for i, name in enumerate(found.classes):
        cells = []
        for j, share in enumerate(shares[i]):
            color = "46,157,99" if i == j else "200,60,40"
            ink = "#fff" if share > 0.55 else "#222"
            text = f"{100 * share:.0f}" if share >= 0.005 else ""
            what = f"{found.classes[j]} where {name} is true: {100 * share:.2f} %"
            cells.append(
                f"<td title='{escape(what, quote=True)}' "
                f"style='background:rgba({color},{share:.3f});color:{ink}'>{text}</td>"
            )
        rows.append(f"<tr><th>{_swatch(found.palette[i])}{escape(name)}</th>{''.join(cells)}</tr>")
    return f"<div class='scroll'><table class='confusion'>{''.join(rows)}</table></div>"


def _pictures(scored: Sequence[Scored], palette: Palette) -> str:
    return f"<div class='pictures'>{''.join(_picture(one, palette) for one in scored)}</div>"


def _picture(scored: Scored, palette: Palette) -> str:
    panels = [
        titled(scored.image, "image"),
        titled(overlay(scored.image, scored.prediction, palette), "prediction"),
        titled(overlay(scored.image, scored.truth, palette), "truth"),
        titled(errors(scored.image, scored.prediction, scored.truth), "errors (red)"),
    ]
    drawn = _smaller(arrange(panels), 1600)
    return (
        f"<figure><img alt='{escape(scored.name, quote=True)}' src='{data_uri(drawn)}'>"
        f"<figcaption>{escape(scored.name)}: mean IoU {_percent(scored.score)}</figcaption>"
        "</figure>"
    )


def _smaller(image: np.ndarray, width: int) -> np.ndarray:
    if image.shape[1] <= width:
        return image
    size = width, round(image.shape[0] * width / image.shape[1])
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _swatch(color: tuple[int, int, int]) -> str:
    return f"<span class='swatch' style='background:rgb{tuple(color)}'></span>"


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.2f}"
