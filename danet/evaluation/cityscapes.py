"""The scores of Cityscapes' own script: IoU and iIoU of classes and of categories.

Defined by Cordts et al., The Cityscapes Dataset, CVPR 2016, section 4, and by the script that the
benchmark's server runs, ``csEvalPixelLevelSemanticLabeling`` of cityscapesScripts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from danet.errors import InputError


class Label(NamedTuple):
    """A row of the label table."""

    id: int
    """Value in label files; labels below 0 are drawn nowhere and left out."""
    name: str
    category: str
    is_ignored: bool
    """Pixels with this truth do not exist; predicting it elsewhere is a miss."""
    average_size: float | None
    """Pixels of an instance, on average over the training set; None without instances."""


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


class OfficialScorer:
    """Counts label ids, pixels and instances, as the benchmark does.

    Of a class, TP and FN are pixels of its row of the confusion matrix and FP pixels of its column,
    in rows of evaluated labels only; IoU = TP / (TP + FP + FN). A category is one class made of its
    evaluated labels. For iIoU the pixels of TP and FN count by average size of the class / size of
    their instance, so that small objects weigh as much as large ones; FP has no instance and counts
    as it is.

    Args:
        labels: The label table.
    """

    def __init__(self, labels: Sequence[Label]) -> None:
        self.labels = tuple(label for label in labels if label.id >= 0)
        self.size = max(label.id for label in self.labels) + 1
        self.matrix = np.zeros((self.size, self.size), np.int64)
        """Pixels; the row is the true id, the column the predicted one."""
        self.weighted = np.zeros((3, self.size))
        """Weighted pixels of instances by true id: all, hits of the class, hits of its category."""
        self._by_id = {label.id: label for label in self.labels}
        self._categories: dict[str, list[Label]] = {}
        for label in self.labels:
            self._categories.setdefault(label.category, []).append(label)

    def update(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Counts the pixels of two maps of label ids, (H, W), of one size.

        Raises:
            InputError: A value is no label id.
        """
        self._demand_ids(prediction, "prediction")
        self._demand_ids(truth, "truth")
        key = truth.astype(np.int64) * self.size + prediction
        self.matrix += np.bincount(key.ravel(), minlength=self.size**2).reshape(self.matrix.shape)

    def update_classes(self, matrix: np.ndarray, ids: Sequence[int]) -> None:
        """Counts a confusion matrix (K, K) of classes, of which class i has the label ``ids[i]``.

        Pixels whose truth is ignored are not in it; no score looks at them.
        """
        self.matrix[np.ix_(ids, ids)] += matrix

    def update_instances(self, prediction: np.ndarray, instances: np.ndarray) -> None:
        """Counts the instances of an image.

        Args:
            prediction: Label ids, (H, W).
            instances: (H, W); label id * 1000 + number for pixels of an instance. What is not above
                1000 is none: things in groups have the bare label id.

        Raises:
            InputError: A value is no label id, or the sizes differ.
        """
        self._demand_ids(prediction, "prediction")
        if prediction.shape != instances.shape:
            raise InputError(f"prediction {prediction.shape}, instances {instances.shape}")
        present = np.bincount(instances.ravel())
        numbers = np.flatnonzero(present[1001:]) + 1001  # a sort of all pixels takes far longer
        place = np.zeros(len(present), np.int64)
        place[numbers] = np.arange(len(numbers))
        single = instances > 1000
        key = place[instances[single]] * self.size + prediction[single]
        shape = (len(numbers), self.size)
        counts = np.bincount(key, minlength=math.prod(shape)).reshape(shape)
        for number, predicted in zip(numbers.tolist(), counts, strict=True):
            label = self._by_id.get(number // 1000)
            if label is not None and label.is_ignored:
                continue
            if label is None or label.average_size is None:
                raise InputError(f"instance {number}: label id {number // 1000} has no instances")
            pixels = predicted.sum()
            hits = predicted[label.id]
            # Ignored labels of the category are hits here, though misses in its IoU.
            akin = predicted[[other.id for other in self._categories[label.category]]].sum()
            weight = label.average_size / float(pixels)
            self.weighted[:, label.id] += weight * np.array([pixels, hits, akin], np.float64)

    def scores(self, *, with_instances: bool = True) -> OfficialScores:
        """Computes the scores; iIoU is left empty where no instances were counted."""
        evaluated = [label for label in self.labels if not label.is_ignored]
        groups = {
            name: [label for label in labels if not label.is_ignored]
            for name, labels in self._categories.items()
        }
        groups = {name: labels for name, labels in groups.items() if labels}
        iiou_classes, iiou_categories = {}, {}
        if with_instances:
            iiou_classes = {
                label.name: self._iiou([label], [label], hits=1)
                for label in evaluated
                if label.average_size is not None
            }
            iiou_categories = {
                name: self._iiou(labels, self._categories[name], hits=2)
                for name, labels in groups.items()
                if all(label.average_size is not None for label in self._categories[name])
            }
        return OfficialScores(
            iou_classes={label.name: self._iou([label]) for label in evaluated},
            iiou_classes=iiou_classes,
            iou_categories={name: self._iou(labels) for name, labels in groups.items()},
            iiou_categories=iiou_categories,
        )

    def _iou(self, labels: Sequence[Label]) -> float:
        """Returns the IoU of evaluated labels taken as one class."""
        ids = [label.id for label in labels]
        hit = int(self.matrix[np.ix_(ids, ids)].sum())
        missed = int(self.matrix[ids].sum()) - hit
        return _ratio(hit, hit + missed + self._false_positives(labels, labels))

    def _iiou(self, labels: Sequence[Label], predicted: Sequence[Label], *, hits: int) -> float:
        """Returns the iIoU of labels as one class.

        Args:
            labels: The evaluated ones.
            predicted: The labels whose prediction is a hit, ignored ones among them.
            hits: The row of ``weighted`` that has the hits.
        """
        ids = [label.id for label in labels]
        truth = float(self.weighted[0, ids].sum())
        hit = float(self.weighted[hits, ids].sum())
        return _ratio(hit, truth + self._false_positives(labels, predicted))

    def _false_positives(self, labels: Sequence[Label], predicted: Sequence[Label]) -> int:
        """Counts pixels predicted as ``predicted`` whose truth is evaluated and not in labels."""
        inside = {label.id for label in labels}
        others = [x.id for x in self.labels if not x.is_ignored and x.id not in inside]
        return int(self.matrix[np.ix_(others, [label.id for label in predicted])].sum())

    def _demand_ids(self, values: np.ndarray, what: str) -> None:
        highest = int(values.max(initial=0))
        if highest >= self.size:
            raise InputError(
                f"{what}: value {highest} on {int((values == highest).sum())} pixels is no label "
                f"id; they are 0..{self.size - 1}"
            )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _mean(scores: Mapping[str, float]) -> float:
    valid = [score for score in scores.values() if not math.isnan(score)]
    return sum(valid) / len(valid) if valid else math.nan
