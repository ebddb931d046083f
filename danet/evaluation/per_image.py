"""The mean IoU of single images, averaged: how well it goes on a picture, not on all pixels."""

import math

import torch
from torch import Tensor


class ImageIoU:
    """Averages over images the mean IoU of each, over the classes that it has.

    The confusion matrix of a set weighs images by their pixels, and a class that fills one picture
    outweighs small ones elsewhere. Csurka, Larlus, Perronnin, "What is a good evaluation measure
    for semantic segmentation?", BMVC 2013, therefore score image by image. A class that is
    neither in the truth nor in the prediction of an image is left out there, as it is in the
    set's mean; an image without a labelled pixel is left out altogether.

    Args:
        device: Where it adds up.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    @property
    def counts(self) -> Tensor:
        """float64 (2,): the sum of the images' means, and the number of images."""
        return self._sums

    def update(self, matrix: Tensor) -> None:
        """Adds an image: its confusion matrix, int64 (K, K), rows are the truth."""
        hit = matrix.diag().double()
        mean = (hit / (matrix.sum(dim=0) + matrix.sum(dim=1) - hit)).nanmean()
        is_counted = (matrix.sum() > 0).double()
        self._sums += torch.stack((mean.nan_to_num() * is_counted, is_counted))

    def score(self) -> float:
        """Returns the average in 0..1; NaN without images."""
        total, count = self._sums.tolist()
        return total / count if count else math.nan
