"""Scores that a benchmark's own script gives beside those of the confusion matrix."""

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor


class OfficialScores(NamedTuple):
    """Scores in 0..1 by name; NaN where neither truth nor prediction has the class."""

    iou_classes: dict[str, float]
    iiou_classes: dict[str, float]
    """Instance-weighted; of classes with instances."""
    iou_categories: dict[str, float]
    iiou_categories: dict[str, float]
    """Of categories all of whose labels have instances."""

    def averages(self) -> dict[str, float]:
        """Returns the four numbers of the leaderboard: each a mean over what is not NaN."""
        return {name: _mean(scores) for name, scores in self._asdict().items()}


class OfficialCounter(Protocol):
    """Counts over the images of a split what a benchmark's script counts."""

    note: str
    """What is left out and why; empty where nothing is."""

    def update(self, prediction: np.ndarray, name: str) -> None:
        """Counts an image: class indices, uint8 (H, W), and the name of the image."""

    @property
    def counts(self) -> Tensor:
        """What was counted, float64, a view: sums over processes are meaningful."""

    def scores(self, matrix: np.ndarray) -> OfficialScores:
        """Computes the scores, given the confusion matrix (K, K) of the classes, too."""


@runtime_checkable
class ScoredOfficially(Protocol):
    """A data set whose benchmark has such scores."""

    def official_counter(self) -> OfficialCounter:
        """Returns a counter for this split."""


def _mean(scores: Mapping[str, float]) -> float:
    valid = [score for score in scores.values() if not math.isnan(score)]
    return sum(valid) / len(valid) if valid else math.nan
