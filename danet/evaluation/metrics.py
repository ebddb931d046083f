"""Metrics: of one confusion matrix over a data set, near boundaries, image by image; the loss."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from danet.errors import InputError
from danet.types import IGNORE, ignore_index


class Scores(NamedTuple):
    """Scores in 0..1; classes that occur in neither truth nor prediction are NaN and left out."""

    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    frequency_weighted_iou: float
    classes_averaged: int
    """Number of classes in the mean IoU."""
    iou: tuple[float, ...]
    accuracy: tuple[float, ...]


_ELEMENTS = 2**20  # scores that are worked on at a time, 4 MiB, which caches may hold
_TINY = torch.finfo(torch.float32).tiny


def single_class_warning(matrix: Tensor, classes: Sequence[str]) -> str:
    """Return a warning where every pixel was predicted as one class and others occur, else "".

    The matrix (K, K) has the truth in its rows; ``classes`` are the names.
    """
    predicted, true = matrix.sum(dim=0).nonzero(), matrix.sum(dim=1).nonzero()
    if len(predicted) != 1 or len(true) < 2:
        return ""
    found = int(predicted[0])
    return (
        f"every pixel was predicted as class {found} ({classes[found]}), though others occur: the "
        "network distinguishes no classes, and its scores only show the share of that one"
    )


class ConfusionMatrix:
    """Counts pixels by true class (row) and predicted class (column) in int64."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes**2 + 2, dtype=torch.int64, device=device)
        """K * K cells, ignored pixels, and values that are not classes: one tensor, so that one
        all-reduce sums all over processes."""
        self.matrix = self.counts[:-2].view(num_classes, num_classes)
        """The counts by class, int64 (K, K), a view."""

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        """Count the pixels of a prediction and a mask of one shape, both class indices."""
        if prediction.shape != mask.shape:
            raise ValueError(f"prediction {tuple(prediction.shape)}, mask {tuple(mask.shape)}")
        # Every value has a row and a column: indexing by a boolean mask would copy all pixels.
        # All that are neither of a class nor of a byte go to the last.
        k, size = self.num_classes, max(self.num_classes, IGNORE) + 2
        bins = [x if x.dtype == torch.uint8 else self._bins(x.long()) for x in (mask, prediction)]
        key = bins[0].flatten().int() * size + bins[1].flatten()
        table = torch.bincount(key, minlength=size**2).view(size, size)
        valid, ignored = table[:k, :k], table[size - 2].sum()  # (K, K), ()
        self.matrix += valid
        self.counts[-2] += ignored
        # Refused in ``scores``, after the sum over processes, so that all of them fail alike.
        self.counts[-1] += key.numel() - valid.sum() - ignored

    def _bins(self, values: Tensor) -> Tensor:
        """Maps classes to themselves, what is ignored to max(K, 255), all others to the next."""
        k, ignored = self.num_classes, max(self.num_classes, IGNORE)
        bins = values.where((values >= 0) & (values < k), ignored + 1)
        return bins.masked_fill(values == ignore_index(k), ignored)

    def scores(self) -> Scores:
        """Compute the scores in float64.

        Raises InputError if nothing was counted, or values that are not classes.
        """
        (*_, ignored, invalid), count = self.counts.tolist(), self.num_classes
        if invalid:
            text = f"{invalid} pixels are neither one of {count} classes nor {ignore_index(count)}"
            raise InputError(text)
        matrix = self.matrix.double().cpu()  # (K, K); float32 is exact only up to 2**24 pixels
        total = matrix.sum()
        if total == 0:
            raise InputError(f"no labelled pixel was counted ({ignored} ignored)")
        hit, truth, predicted = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)  # (K,) each
        iou = hit / (truth + predicted - hit)  # NaN: neither in truth nor in prediction
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


def in_rows(scores: Tensor, *, are_logits: bool) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield groups of rows of a map (B, K, H, W): place, scores, and these as logits."""
    batch, classes, height, width = scores.shape
    count = max(1, _ELEMENTS // (batch * classes * width))
    for top in range(0, height, count):
        part = scores[:, :, top : top + count]
        logits = part if are_logits else part.clamp(min=_TINY).log_()
        yield slice(top, top + part.shape[2]), part, logits


class PixelLoss:
    """Sums a loss over the pixels of a data set, in float64 and without waiting for the device.

    The result is the mean over all labelled pixels, however they lie in images, bands of rows,
    batches and processes. Averaged probabilities p are compared as the logits log p, of which the
    softmax is p; below 1e-38 they count as that, so a pixel has a loss of at most 87. Logits
    (B, K, H, W) and a mask (B, H, W) are mapped by ``parts`` to parts, each a total and a divisor,
    of which those of several calls may be added up, and a factor of the quotient.
    """

    def __init__(
        self,
        parts: Callable[[Tensor, Tensor], Sequence[tuple[Tensor, Tensor, float]]],
        num_classes: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.parts = parts
        # A process may have no image, and its sums must have the same shape.
        nothing = torch.full((1, 1, 1), ignore_index(num_classes), device=device)
        empty = parts(torch.zeros(1, num_classes, 1, 1, device=device), nothing)
        self.factors = [factor for *_, factor in empty]
        self.sums = torch.zeros(len(empty), 2, dtype=torch.float64, device=device)
        """Total and divisor of every part: one tensor, to be summed over processes."""

    def update(self, scores: Tensor, mask: Tensor, *, are_logits: bool) -> None:
        """Count the pixels of logits or probabilities (B, K, H, W) and a mask (B, H, W)."""
        classes = scores.shape[1]
        # Refused by the confusion matrix; here they would index beyond the classes.
        mask = mask.masked_fill(mask >= classes, ignore_index(classes))
        for rows, _, logits in in_rows(scores, are_logits=are_logits):
            parts = self.parts(logits, mask[:, rows])
            self.sums += torch.stack([torch.stack(part[:2]) for part in parts])

    def mean(self) -> float:
        """Return the sum of the means, each with its factor; NaN without a labelled pixel."""
        means = (self.sums[:, 0] / self.sums[:, 1]).tolist()
        return sum(factor * mean for factor, mean in zip(self.factors, means, strict=True))


class BoundaryIoU:
    """Counts, over a data set, the pixels within a distance of a boundary of their class.

    Cheng, Girshick, Dollar, Berg, Kirillov, "Boundary IoU: Improving Object-Centric Image
    Segmentation Evaluation", CVPR 2021, equation 4: with G the true and P the predicted region of
    a class, and X_d the pixels of a region X no farther than d from its boundary,
    |G_d and P_d| / |G_d or P_d|. As in the authors' code the distance is Chebyshev's (d erosions by
    3x3), d is a fraction ``ratio`` of the image's diagonal, 0.02 in the paper, at least one pixel,
    and the border of the image is a boundary. Sums run over the set, as for the mean IoU. Pixels
    without truth are removed from the prediction, too, so both have the same boundary there.
    """

    def __init__(self, num_classes: int, ratio: float = 0.02) -> None:
        if not 0 < ratio < 1:
            raise ValueError(f"ratio={ratio} is not in 0..1, both left out")
        self.num_classes, self.ratio = num_classes, ratio
        self.counts = torch.zeros(3, num_classes, dtype=torch.int64)
        """Pixels near boundaries in both, in the truth, in the prediction, by class."""

    def update(self, prediction: np.ndarray, mask: np.ndarray) -> None:
        """Count an image: two maps of classes (H, W); the mask may have ignored pixels."""
        distance = max(1, round(self.ratio * math.hypot(*mask.shape)))
        prediction = np.where(mask == ignore_index(self.num_classes), mask, prediction)
        in_truth, in_prediction = (_near_boundary(x, distance) for x in (mask, prediction))
        both = in_truth & in_prediction & (mask == prediction)  # (H, W)
        for row, values in enumerate((mask[both], mask[in_truth], prediction[in_prediction])):
            # What is ignored has a bin, which is cut off with all values that are not classes.
            found = np.bincount(values, minlength=self.num_classes)[: self.num_classes]
            self.counts[row] += torch.from_numpy(found)

    def iou(self) -> Tensor:
        """Compute the score of each class, float64 (K,); NaN for one without any boundary."""
        both, truth, predicted = self.counts.double()  # (K,) each
        return both / (truth + predicted - both)


def _near_boundary(classes: np.ndarray, distance: int) -> np.ndarray:
    """Return, bool (H, W), where another class or the border of the image is within a distance."""
    # All classes at once, where the authors erode each: a pixel is near the boundary of its class
    # exactly if the square around it has a second value.
    # 0 is outside. OpenCV has no erosion of integers that hold more.
    values = classes.astype("int16" if classes.dtype == np.uint8 else "float32") + 1
    square = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    lowest = cv2.erode(values, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    highest = cv2.dilate(values, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return np.asarray(lowest != highest)


def image_iou(matrix: Tensor) -> Tensor:
    """Maps an image's confusion matrix, int64 (K, K), to its mean IoU and 1, float64 (2,).

    They are 0 and 0 where no pixel is labelled, so sums over images give the average of Csurka,
    Larlus, Perronnin, "What is a good evaluation measure for semantic segmentation?", BMVC 2013,
    in which no image outweighs others. A class in neither truth nor prediction is left out.
    """
    hit = matrix.diag().double()  # (K,)
    mean = (hit / (matrix.sum(dim=0) + matrix.sum(dim=1) - hit)).nanmean()
    is_counted = (matrix.sum() > 0).double()
    # Weighted by 0 or 1 rather than left out by an ``if``, which would wait for the device.
    return torch.stack((mean.nan_to_num() * is_counted, is_counted))
