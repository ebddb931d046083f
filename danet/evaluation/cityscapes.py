"""The metrics of Cityscapes' evaluation script: IoU and iIoU of classes and of categories.

Defined by Cordts et al., The Cityscapes Dataset, CVPR 2016, section 4, and by the script that the
benchmark's server runs, ``csEvalPixelLevelSemanticLabeling`` of cityscapesScripts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from danet.errors import InputError


class Label(NamedTuple):
    """A row of the label table."""

    id: int  # value in label files; labels below 0 occur in none and are left out
    name: str
    category: str
    is_ignored: bool  # as truth not evaluated; predicted elsewhere it is a false negative
    average_size: float | None  # mean pixels of an instance in the training set; None without any


class OfficialScores(NamedTuple):
    """Scores in 0..1 by name; NaN where neither truth nor prediction has the class."""

    iou_classes: dict[str, float]
    iiou_classes: dict[str, float]  # instance-weighted; of classes with instances
    iou_categories: dict[str, float]
    iiou_categories: dict[str, float]  # of categories all of whose labels have instances

    def averages(self) -> dict[str, float]:
        """Return the four numbers of the leaderboard, each a mean over what is not NaN."""
        return {name: _mean(scores) for name, scores in self._asdict().items()}


class OfficialScorer:
    """Counts label ids, pixels and instances, as the benchmark does.

    TP and FN of a class are pixels of its row of the confusion matrix, FP pixels of its column, in
    rows of evaluated labels only; IoU = TP / (TP + FP + FN). A category is one class made of its
    evaluated labels. For iIoU the pixels of TP and FN are weighted by average size of the class /
    size of their instance, so that small objects weigh as much as large ones; FP has no instance
    and weight 1.
    """

    def __init__(self, labels: Sequence[Label]) -> None:
        self.labels = tuple(label for label in labels if label.id >= 0)
        self.size = max(label.id for label in self.labels) + 1
        self.matrix = np.zeros((self.size, self.size), np.int64)
        """Pixels; the row is the true id, the column the predicted one."""
        self.weighted = np.zeros((3, self.size))
        """Weighted pixels of instances by true id: all, TP of the class, TP of its category."""
        self._by_id = {label.id: label for label in self.labels}
        self._categories: dict[str, list[Label]] = {}
        for label in self.labels:
            self._categories.setdefault(label.category, []).append(label)

    def update(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Count the pixels of two maps of label ids, (H, W); raise InputError for other values."""
        self._check_ids(prediction, "prediction")
        self._check_ids(truth, "truth")
        key = truth.astype(np.int64) * self.size + prediction  # (H, W); too large for uint8
        self.matrix += np.bincount(key.ravel(), minlength=self.size**2).reshape(self.matrix.shape)

    def update_instances(self, prediction: np.ndarray, instances: np.ndarray) -> None:
        """Count the instances of an image, from label ids, (H, W), and instance ids of that size.

        Pixels of an instance have label id * 1000 + number. Values up to 1000 are no instances:
        groups of objects have the bare label id. Raises InputError for a value that is no label id.
        """
        self._check_ids(prediction, "prediction")
        if prediction.shape != instances.shape:
            raise InputError(f"prediction {prediction.shape}, instances {instances.shape}")
        is_instance = instances > 1000
        numbers, row = np.unique(instances[is_instance], return_inverse=True)  # (instances,)
        key = row * self.size + prediction[is_instance]
        counts = np.bincount(key, minlength=len(numbers) * self.size).reshape(-1, self.size)
        for number, predicted in zip(numbers.tolist(), counts, strict=True):
            label = self._by_id.get(number // 1000)
            if label is not None and label.is_ignored:
                continue
            if label is None or label.average_size is None:
                raise InputError(f"instance {number}: label id {number // 1000} has no instances")
            pixels = predicted.sum()
            hits = predicted[label.id]
            # As in the script, ignored labels of the category are TP here, though FN in its IoU.
            in_category = predicted[[other.id for other in self._categories[label.category]]].sum()
            weight = label.average_size / float(pixels)
            self.weighted[:, label.id] += weight * np.array([pixels, hits, in_category], np.float64)

    def scores(self, *, with_instances: bool = True) -> OfficialScores:
        """Compute the scores; iIoU is left empty where no instances were counted."""

        def of(groups: Mapping[str, Sequence[Label]], row: int = 0) -> dict[str, float]:
            return {
                name: self._score(labels, row)
                for name, labels in groups.items()
                if not all(label.is_ignored for label in labels)
                and (not row or (with_instances and all(label.average_size for label in labels)))
            }

        classes, categories = {label.name: [label] for label in self.labels}, self._categories
        return OfficialScores(of(classes), of(classes, 1), of(categories), of(categories, 2))

    def _score(self, labels: Sequence[Label], row: int) -> float:
        """Return TP / (TP + FN + FP) of labels taken as one class.

        Within a category one label predicted as another is a hit. A row above 0 is that of the TP
        in ``weighted``: then TP and FN are of instances, and hits may predict ignored labels.
        """
        ids = [label.id for label in labels if not label.is_ignored]
        predicted = [label.id for label in labels] if row else ids
        truth, hit = float(self.matrix[ids].sum()), float(self.matrix[np.ix_(ids, ids)].sum())
        if row:
            truth, hit = (float(self.weighted[i, ids].sum()) for i in (0, row))
        others = [x.id for x in self.labels if not x.is_ignored and x.id not in ids]
        false = int(self.matrix[np.ix_(others, predicted)].sum())
        return hit / (truth + false) if truth + false else math.nan

    def _check_ids(self, values: np.ndarray, what: str) -> None:
        highest = int(values.max(initial=0))
        if highest >= self.size:
            raise InputError(
                f"{what}: value {highest} on {int((values == highest).sum())} pixels is no label "
                f"id; they are 0..{self.size - 1}"
            )


def _mean(scores: Mapping[str, float]) -> float:
    valid = [score for score in scores.values() if not math.isnan(score)]
    return sum(valid) / len(valid) if valid else math.nan
