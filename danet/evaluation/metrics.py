"""One confusion matrix for the whole set, and every score that follows from it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from danet.errors import InputError
from danet.types import IGNORE


class Scores(NamedTuple):
    """Scores in 0..1; classes that occur in neither truth nor prediction are NaN and left out."""

    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    frequency_weighted_iou: float
    classes_averaged: int
    """Classes that the mean IoU is a mean of."""
    iou: tuple[float, ...]
    accuracy: tuple[float, ...]


_VALUES = 257
"""Those of a byte, and one for all that are not."""


def _bytes_and_others(values: Tensor) -> Tensor:
    """Returns class indices as int32 in 0..256, where 256 is what fits no byte."""
    if values.dtype != torch.uint8:
        values = torch.where((values < 0) | (values > 255), 256, values)
    return values.to(torch.int32)


def warn_of_single_class(matrix: Tensor, classes: Sequence[str]) -> str:
    """Returns a warning where every pixel was predicted as one class and others occur, or nothing.

    Args:
        matrix: (K, K), rows truth.
        classes: Their names.
    """
    predicted, true = matrix.sum(dim=0).nonzero(), matrix.sum(dim=1).nonzero()
    if len(predicted) != 1 or len(true) < 2:
        return ""
    found = int(predicted[0])
    return (
        f"every pixel was predicted as class {found} ({classes[found]}), though others occur: the "
        "network tells nothing apart, and its scores are those of that class's share"
    )


class ConfusionMatrix:
    """Counts pixels by true class (row) and predicted class (column) in int64.

    Args:
        num_classes: K.
        device: Where it counts.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        # The last two entries count ignored pixels and values that are no class.
        self._counts = torch.zeros(num_classes**2 + 2, dtype=torch.int64, device=device)

    @property
    def matrix(self) -> Tensor:
        """int64 (K, K), a view."""
        return self._counts[:-2].view(self.num_classes, self.num_classes)

    @property
    def counts(self) -> Tensor:
        """All that was counted, int64 and flat: sums of it over processes are meaningful."""
        return self._counts

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        """Counts the pixels of a prediction and a mask of one shape, both class indices.

        Quickest where both are uint8: no pixel is looked at more than once.
        """
        if prediction.shape != mask.shape:
            raise ValueError(f"prediction {tuple(prediction.shape)}, mask {tuple(mask.shape)}")
        # Every value of a byte has a row and a column, so none has to be masked out before.
        key = _bytes_and_others(mask).flatten() * _VALUES
        key += _bytes_and_others(prediction).flatten()
        table = torch.bincount(key, minlength=_VALUES**2).view(_VALUES, _VALUES)
        k = self.num_classes
        valid, ignored = table[:k, :k], table[IGNORE].sum()
        self._counts[:-2] += valid.flatten()
        self._counts[-2] += ignored
        self._counts[-1] += key.numel() - valid.sum() - ignored

    def scores(self) -> Scores:
        """Computes the scores in float64.

        Raises:
            InputError: Nothing was counted, or values occurred that are no class.
        """
        *_, ignored, invalid = self._counts.tolist()
        if invalid:
            raise InputError(
                f"{invalid} pixels are neither one of {self.num_classes} classes nor 255"
            )
        matrix = self.matrix.double().cpu()
        total = matrix.sum()
        if total == 0:
            raise InputError(f"no labelled pixel was counted ({ignored} ignored)")
        hit, truth, guess = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)
        iou = hit / (truth + guess - hit)  # NaN: neither in truth nor in prediction
        accuracy = hit / truth  # NaN: not in truth
        return Scores(
            miou=iou.nanmean().item(),
            pixel_accuracy=(hit.sum() / total).item(),
            mean_accuracy=accuracy.nanmean().item(),
            frequency_weighted_iou=((truth / total) * iou.nan_to_num()).sum().item(),
            classes_averaged=int((~iou.isnan()).sum()),
            iou=tuple(iou.tolist()),
            accuracy=tuple(accuracy.tolist()),
        )
