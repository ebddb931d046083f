"""Boundary IoU: the IoU of what lies near the outlines, where large regions hide errors."""

import math
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from danet.types import IGNORE


class BoundaryScores(NamedTuple):
    """Scores in 0..1; classes without any outline are NaN and left out of the mean."""

    mean: float
    iou: tuple[float, ...]


class BoundaryIoU:
    """Counts, over a whole set, the pixels within a distance of an outline of their class.

    Cheng, Girshick, Dollar, Berg, Kirillov, "Boundary IoU: Improving Object-Centric Image
    Segmentation Evaluation", CVPR 2021, equation 4: with G the true and P the predicted region of
    a class, and X_d the pixels of a region X that lie no farther than d from its outline,
    |G_d and P_d| / |G_d or P_d|. As in the authors' code the distance is that of the chessboard
    (d erosions by 3x3), d is a part of the image's diagonal, and the border of the image is an
    outline. Sums run over the set, as for the mean IoU. Pixels without truth are cut out of the
    prediction, too, so both have the same outline there.

    Args:
        num_classes: K.
        ratio: d as a part of the diagonal, at least one pixel; 0.02 in the paper.
    """

    def __init__(self, num_classes: int, ratio: float = 0.02) -> None:
        if not 0 < ratio < 1:
            raise ValueError(f"ratio={ratio} is not in 0..1, both left out")
        self.num_classes, self.ratio = num_classes, ratio
        self._counts = torch.zeros(3, num_classes, dtype=torch.int64)

    @property
    def counts(self) -> Tensor:
        """int64 (3, K): pixels near outlines in both, in the truth, in the prediction."""
        return self._counts

    def update(self, prediction: np.ndarray, mask: np.ndarray) -> None:
        """Counts an image: two maps of classes, uint8 (H, W); IGNORE in the mask."""
        distance = max(1, round(self.ratio * math.hypot(*mask.shape)))
        prediction = np.where(mask == IGNORE, np.uint8(IGNORE), prediction)
        near_truth, near_guess = (_near_outline(x, distance) for x in (mask, prediction))
        both = near_truth & near_guess & (mask == prediction)
        for row, values in enumerate((mask[both], mask[near_truth], prediction[near_guess])):
            found = np.bincount(values, minlength=IGNORE + 1)[: self.num_classes]
            self._counts[row] += torch.from_numpy(found)

    def scores(self) -> BoundaryScores:
        """Computes the scores in float64."""
        both, truth, guess = self._counts.double()
        iou = both / (truth + guess - both)
        return BoundaryScores(iou.nanmean().item(), tuple(iou.tolist()))


def _near_outline(classes: np.ndarray, distance: int) -> np.ndarray:
    """Returns, bool (H, W), where a pixel of another class or the border is within a distance.

    For all classes at once: a pixel is near the outline of its own class exactly if the square
    around it holds something else.
    """
    values = classes.astype(np.int16) + 1  # 0 is outside
    square = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    lowest = cv2.erode(values, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    highest = cv2.dilate(values, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return np.asarray(lowest != highest)
