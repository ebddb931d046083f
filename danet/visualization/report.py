"""The page about a run: curves, scores, confusion, pictures, and an attention viewer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from danet.evaluation.metrics import ConfusionMatrix
from danet.visualization.overlay import Palette, SegmentedImage, arrange, panels_of, shrink
from danet.visualization.pages import chart, named_curves, render
from danet.visualization.viewer import AttentionView, data_uri, viewer_data

_MAX_WIDTH = 800
"""Of a picture on the page, in pixels."""


class Report(NamedTuple):
    """The content of the page."""

    title: str
    facts: Sequence[str]
    """Sentences below the title."""
    classes: Sequence[str]
    palette: Palette
    confusion: ConfusionMatrix
    lines: Sequence[Mapping[str, Any]]
    """Of metrics.jsonl; empty where there is none."""
    examples: Mapping[str, Sequence[tuple[SegmentedImage, float]]]
    """Heading -> pictures, each with the mean IoU over the classes that occur in it."""
    views: Sequence[AttentionView]


def page(report: Report) -> str:
    """Return the whole page as text."""
    matrix, lines = report.confusion.matrix.numpy(), report.lines
    totals = matrix.sum(axis=1)  # (K,)
    scores = named_curves(lines, "val", "miou") | named_curves(lines, "val", "pixel_accuracy")
    return render(
        "report.html",
        title=report.title,
        report=report,
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
        examples={
            heading: [(picture.name, score, _draw(picture, report)) for picture, score in scored]
            for heading, scored in report.examples.items()
        },
        viewer=viewer_data(report.views, report.classes, report.palette),
    )


def _draw(picture: SegmentedImage, report: Report) -> str:
    small = shrink(picture, _MAX_WIDTH / picture.image.shape[1])
    return data_uri(arrange(panels_of(small, report.palette)))
