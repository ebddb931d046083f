"""Losses of regions: of all pixels of a class, and of windows of neighbouring pixels."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from danet.losses.parts import Part, labelled, mean_of, require_finite, target_of
from danet.ops.arithmetic import sum_dtype, without_autocast
from danet.ops.resize import resize


class Dice(nn.Module):
    """One minus the mean soft Dice coefficient of the classes that occur in the micro-batch.

    Milletari et al., V-Net, 2016, for several classes, with linear (not squared) denominators.

    ``smooth``, in pixels, is added to numerator and denominator.
    """

    def __init__(self, smooth: float = 1.0) -> None:
        super().__init__()
        require_finite({"smooth": smooth})
        self.smooth = smooth

    def forward(self, logits: Tensor, mask: Tensor, *, align_corners: bool = True) -> Tensor:
        """Maps (B, K, h, w) and (B, H, W) to a scalar."""
        probabilities, truth = map(_by_class, _maps(logits, mask, align_corners))
        overlap = (probabilities * truth).sum(dim=1)  # (K,)
        total = probabilities.sum(dim=1) + truth.sum(dim=1)  # (K,)
        # With smooth=0 this would be 0 / 0 where every pixel is ignored.
        dice = (2 * overlap + self.smooth) / (total + self.smooth).clamp(min=1e-12)
        present = truth.sum(dim=1) > 0  # (K,)
        return ((1 - dice) * present).sum() / present.sum().clamp(min=1)


class LovaszSoftmax(nn.Module):
    """Convex surrogate of 1 - mean IoU over the classes that occur in the micro-batch.

    Berman et al., The Lovasz-Softmax loss, CVPR 2018, algorithm 1. The cost is one sort of the
    pixels per class.
    """

    def forward(self, logits: Tensor, mask: Tensor, *, align_corners: bool = True) -> Tensor:
        """Maps (B, K, h, w) and (B, H, W) to a scalar."""
        probabilities, truth = map(_by_class, _maps(logits, mask, align_corners))
        # Ignored pixels have error 0 and truth 0: sorted last, they add nothing.
        errors = (truth - probabilities).abs()  # (K, P)
        errors, order = errors.sort(dim=1, descending=True)
        # Factors without gradient: the increase of the Jaccard loss per pixel in that order.
        ordered, total = truth.gather(1, order), truth.sum(dim=1, keepdim=True)  # (K, P), (K, 1)
        union = total + (1 - ordered).cumsum(dim=1)
        jaccard = 1 - (total - ordered.cumsum(dim=1)) / union.clamp(min=1)
        increase = jaccard.diff(dim=1, prepend=torch.zeros_like(total))
        per_class = (errors * increase).sum(dim=1)  # (K,)
        present = truth.sum(dim=1) > 0
        return (per_class * present).sum() / present.sum().clamp(min=1)


class RegionMutualInformation(nn.Module):
    """Minus a lower bound of the mutual information between windows of truth and prediction.

    Zhao et al., Region Mutual Information Loss for Semantic Segmentation, NeurIPS 2019. For each
    image and class, a window of ``d = region ** 2`` neighbours is a point of d dimensions, Y of the
    truth and P of the probabilities. With ``M = cov(Y) - cov(Y, P) (cov(P) + e I)^-1 cov(P, Y)``,
    the covariance of Y given P, the loss is the sum over the classes of

        log det(I + M / e) / (2 d)

    averaged over the images that have a labelled pixel: the paper's ``log det(M + e I) / (2 d)``
    with a constant added that makes it 0 for a class that does not occur, and at most log(2) / 2
    for one that is predicted exactly. It is computed in float64. Since truth follows from its
    opposite as well, this is no loss without cross entropy beside it.

    Unlike the paper's, probabilities are those of a softmax. Its sigmoid belongs to the binary
    cross entropy that it is added to. The cross entropy of a softmax leaves the mean of a pixel's
    logits free, so that sigmoids could saturate.

    An ignored pixel has no part in the average or maximum of its cell. A cell of ignored pixels
    alone has none in the means, and deviates from them by 0 in the covariances; the other cells of
    a window count nevertheless, or objects with ignored outlines (Pascal VOC) would lose theirs.
    What an image lacks to the size of a window is ignored.

    Args:
        region: Side of a window, in cells.
        stride: Side of a cell, in pixels; images are downsampled to cells first.
        pooling: Whether a cell is the ``average`` or the ``max`` of its pixels.
        epsilon: e above, a variance that counts as noise; a larger one gives smoother gradients.
    """

    def __init__(
        self,
        region: int = 3,
        stride: int = 4,
        *,
        pooling: Literal["average", "max"] = "average",
        epsilon: float = 1e-6,
    ) -> None:
        super().__init__()
        for name, value in {"region": region, "stride": stride}.items():
            if value < 1:
                raise ValueError(f"{name}={value} is not at least 1")
        if pooling not in ("average", "max"):
            raise ValueError(f"pooling={pooling!r} is neither 'average' nor 'max'")
        # Below, rounding could leave the covariance of float64 without a Cholesky factor.
        if not 1e-9 <= epsilon < math.inf:
            raise ValueError(f"epsilon={epsilon} is not a number of at least 1e-9")
        self.region, self.stride = region, stride
        self.pooling, self.epsilon = pooling, epsilon

    def forward(self, logits: Tensor, mask: Tensor, *, align_corners: bool = True) -> Tensor:
        """Maps (B, K, h, w) and (B, H, W) to a scalar."""
        return mean_of(self.parts(logits, mask, align_corners=align_corners))

    def parts(self, logits: Tensor, mask: Tensor, *, align_corners: bool = True) -> list[Part]:
        """Return the sum over the images, and how many of them have a labelled pixel."""
        with without_autocast(logits.device.type):
            maps = _maps(logits, mask, align_corners)
            valid = labelled(mask, logits.shape[1]).unsqueeze(1)
            cells, seen = self._cells(maps, valid.float())
            # One image at a time, and again for the gradient: windows of 3 x 3 in float64 take 18
            # times the memory of the cells.
            images = zip(cells.double().split(1), seen.double().split(1), strict=True)
            costs = [
                checkpoint(self._cost, *image, use_reentrant=False, preserve_rng_state=False)
                for image in images
            ]
            total = torch.cat(costs).sum().to(cells.dtype)
        return [Part(total, self.divisors(mask, logits.shape[1])[0])]

    def divisors(self, mask: Tensor, num_classes: int) -> list[Tensor]:
        """Return how many images have a labelled pixel."""
        return [labelled(mask, num_classes).flatten(1).any(dim=1).sum().float()]

    def _cells(self, maps: Sequence[Tensor], valid: Tensor) -> tuple[Tensor, Tensor]:
        """Downsample to cells, and pad with ignored ones to the size of a window.

        Maps two of (B, K, H, W), which are 0 where ``valid``, (B, 1, H, W), is 0, to
        (B, K, 2, h, w), and ``valid`` to (B, 1, 1, h, w), 1 for cells with a labelled pixel.
        """
        pool = F.max_pool2d if self.pooling == "max" else F.avg_pool2d
        share = F.avg_pool2d(valid, self.stride, ceil_mode=True)
        cells = torch.stack([pool(x, self.stride, ceil_mode=True) for x in maps], dim=2)
        if self.pooling == "average":  # of the labelled pixels alone
            cells = cells / share.unsqueeze(2).clamp(min=1e-12)
        lack = [max(0, self.region - side) for side in cells.shape[-2:]]
        seen = (share > 0).unsqueeze(2).float()
        padding = (0, lack[1], 0, lack[0])
        return F.pad(cells, padding), F.pad(seen, padding)

    def _cost(self, cells: Tensor, labelled: Tensor) -> Tensor:
        """Return the loss of every image, (B,), from what ``_cells`` returns, in float64."""
        points, seen = (_windows(x, self.region) for x in (cells, labelled))  # (B, K, 2, d, N)
        means = points.sum(dim=-1, keepdim=True) / seen.sum(dim=-1, keepdim=True).clamp(min=1)
        points = ((points - means) * seen).flatten(2, 3)  # (B, K, 2 d, N)
        windows = seen.amax(dim=3).sum(dim=-1, keepdim=True).clamp(min=1)  # (B, 1, 1, 1)
        one = torch.eye(points.shape[2], dtype=points.dtype, device=points.device)
        joint = points @ points.mT / (windows * self.epsilon) + one  # (B, K, 2 d, 2 d)
        # The lower right block of the factor is that of I + M / e. Unchecked, as a check would wait
        # for the device.
        factor, _ = torch.linalg.cholesky_ex(joint)
        diagonal = factor.diagonal(dim1=-2, dim2=-1)[..., self.region**2 :]  # (B, K, d)
        return diagonal.log().mean(dim=-1).sum(dim=-1)


def _windows(x: Tensor, side: int) -> Tensor:
    """Maps (..., h, w) to the points of all N windows inside, (..., side * side, N)."""
    h, w = x.shape[-2] - side + 1, x.shape[-1] - side + 1
    shifted = [x[..., i : i + h, j : j + w] for i in range(side) for j in range(side)]
    return torch.stack(shifted, dim=-3).flatten(-2)


def _maps(logits: Tensor, mask: Tensor, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Return softmax and one-hot truth, both (B, K, H, W) with zeros where ignored.

    They are float32, or float64 for float64 logits.
    """
    target = target_of(logits, mask)
    wide = logits.to(sum_dtype(logits))
    fine = resize(wide, target.shape[1:], align_corners=align_corners)
    valid = labelled(target, logits.shape[1]).unsqueeze(1)  # (B, 1, H, W)
    probabilities = fine.softmax(dim=1) * valid
    # Not by F.one_hot, whose int64 with the classes last is twice the size.
    places = target.unsqueeze(1).masked_fill(~valid, 0)
    truth = torch.zeros_like(probabilities).scatter_(1, places, valid.to(probabilities.dtype))
    return probabilities, truth


def _by_class(x: Tensor) -> Tensor:
    """Maps (B, K, H, W) to (K, P), with all P pixels of the batch side by side."""
    return x.movedim(1, 0).flatten(1)
