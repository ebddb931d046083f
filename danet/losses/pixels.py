"""Losses of single pixels, averaged over those that are labelled."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from danet.losses.parts import Part, labelled, mean_of, require_finite, target_of
from danet.ops.cross_entropy import cross_entropy_sum, pixel_losses
from danet.types import ignore_index


class CrossEntropy(nn.Module):
    """Mean of -log p[y] over the labelled pixels of the batch.

    With ``class_weights``, K factors, it is divided by the sum of the pixels' weights, as in torch.

    ``label_smoothing``, in [0, 1), is the share of the truth that is spread evenly over all K
    classes, each with its own weight, as in torch (Szegedy et al., CVPR 2016).
    """

    class_weights: Tensor | None

    def __init__(
        self, class_weights: Sequence[float] | None = None, *, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} is not a number in [0, 1)")
        self.label_smoothing = label_smoothing
        factors = None
        if class_weights is not None:
            require_finite({f"class_weights[{i}]": w for i, w in enumerate(class_weights)})
            if not any(class_weights):
                raise ValueError("class_weights are all zero")
            factors = torch.tensor(class_weights, dtype=torch.float32)
        # A buffer, to follow the loss to its device; not persistent, as a setting is no state.
        self.register_buffer("class_weights", factors, persistent=False)

    def forward(self, logits: Tensor, mask: Tensor, *, align_corners: bool = True) -> Tensor:
        """Maps (B, K, h, w) and (B, H, W) to a scalar."""
        return mean_of(self.parts(logits, mask, align_corners=align_corners))

    def parts(self, logits: Tensor, mask: Tensor, *, align_corners: bool = True) -> list[Part]:
        """Return the sum over the labelled pixels, and the sum of their weights."""
        target, weights = self.target_and_weights(logits, mask)
        return [Part(self._sum(logits, target, weights, align_corners), weights.sum())]

    def pixel_parts(self, logits: Tensor, mask: Tensor) -> list[Part]:
        """Return parts that are sums over pixels alone; those of the rows of an image add up."""
        return self.parts(logits, mask)

    def divisors(self, mask: Tensor, num_classes: int) -> list[Tensor] | None:
        """Return the divisors of ``parts`` from the mask; None if they depend on the logits."""
        return [self._pixel_weights(mask.long(), num_classes).sum()]

    def target_and_weights(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mask as int64 and the weight of every pixel, float32; both (B, H, W)."""
        weights, classes = self.class_weights, logits.shape[1]
        if weights is not None and weights.numel() != classes:
            raise ValueError(f"{weights.numel()} class_weights for {classes} classes")
        target = target_of(logits, mask)
        return target, self._pixel_weights(target, classes)

    def _sum(self, logits: Tensor, target: Tensor, weights: Tensor, align_corners: bool) -> Tensor:
        """Return the weighted sum over the labelled pixels."""
        share, smoothing = self.label_smoothing, None
        if share:
            classes = weights.new_ones(logits.shape[1])
            classes = classes if self.class_weights is None else self.class_weights
            smoothing, weights = classes * (share / len(classes)), weights * (1 - share)
        return cross_entropy_sum(
            logits, target, weights, smoothing=smoothing, align_corners=align_corners
        )

    def _pixel_weights(self, target: Tensor, num_classes: int) -> Tensor:
        """Return the weight of every pixel, float32 (B, H, W); 0 where the target is ignored."""
        valid = labelled(target, num_classes)  # (B, H, W)
        if self.class_weights is None:
            return valid.float()
        # What is ignored would be out of range. A class without a weight is refused by ``parts``;
        # ``divisors`` may come first and must not crash (on CUDA: a device-side assertion).
        last = self.class_weights.numel() - 1
        return self.class_weights[target.masked_fill(~valid, 0).clamp(max=last)] * valid


class OHEM(CrossEntropy):
    """Cross entropy over hard pixels only (online hard example mining).

    A labelled pixel is kept if the probability of its true class is at most
    ``max(threshold, k-th smallest such probability)`` with k = ``min_kept``, counted over one
    micro-batch of one process: all pixels below the threshold, and never fewer than ``min_kept``
    (or all there are). Ties are kept together. This is the rule in the history of PyTorch-Encoding,
    from which DANet's repository stems; DANet itself was trained without OHEM.

    Args:
        threshold: Probability, 0..1.
        min_kept: Pixels.
        normalise: Divide the sum over kept pixels by the ``kept`` ones or by all ``labelled`` ones.
        class_weights, label_smoothing: As in CrossEntropy; they do not influence the selection.
    """

    def __init__(
        self,
        threshold: float = 0.7,
        min_kept: int = 100_000,
        *,
        normalise: Literal["kept", "labelled"] = "kept",
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(class_weights, label_smoothing=label_smoothing)
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold} is not a probability in (0, 1]")
        if min_kept < 1:
            raise ValueError(f"min_kept={min_kept} is not at least 1")
        if normalise not in ("kept", "labelled"):
            raise ValueError(f"normalise={normalise!r} is neither 'kept' nor 'labelled'")
        self.threshold = threshold
        self.min_kept = min_kept
        self.normalise = normalise

    def parts(self, logits: Tensor, mask: Tensor, *, align_corners: bool = True) -> list[Part]:
        """Return the sum over the kept pixels, and the sum of the weights to divide it by."""
        target, weights = self.target_and_weights(logits, mask)
        # The selection needs all losses before any gradient, so logits are upsampled twice.
        losses = pixel_losses(logits, target, align_corners=align_corners)  # (B, H, W)
        is_hard = self.hard_pixels(losses, labelled(target, logits.shape[1]))
        kept, ignored = weights * is_hard, ignore_index(logits.shape[1])
        total = self._sum(logits, target.masked_fill(~is_hard, ignored), kept, align_corners)
        return [Part(total, (kept if self.normalise == "kept" else weights).sum())]

    def pixel_parts(self, logits: Tensor, mask: Tensor) -> list[Part]:
        """Return the cross entropy of all pixels: how hard one is depends on the others."""
        return super().parts(logits, mask)

    def divisors(self, mask: Tensor, num_classes: int) -> list[Tensor] | None:
        """Return the divisors of ``parts`` from the mask; None if they depend on the logits."""
        return None if self.normalise == "kept" else super().divisors(mask, num_classes)

    def hard_pixels(self, losses: Tensor, valid: Tensor) -> Tensor:
        """Return which of the labelled pixels are kept, bool (B, H, W), from -log p[y] of all."""
        # Compared as log p: where probabilities saturate at 1, logarithms still differ.
        ease = (-losses).masked_fill(~valid, torch.inf)
        k = min(self.min_kept, ease.numel())
        if ease.is_cuda:  # where kthvalue is not deterministic and uses one block per row
            kth = ease.flatten().sort().values[k - 1]
        else:
            kth = ease.flatten().kthvalue(k).values  # linear time; +inf when fewer are labelled
        return valid & (ease <= kth.clamp(min=math.log(self.threshold)))


class Focal(CrossEntropy):
    """Mean of -(1 - p[y]) ** gamma * log p[y] over the labelled pixels of the batch.

    Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, for a softmax over K classes.
    ``class_weights`` are the paper's alpha, one factor per class. The sum is divided as in
    CrossEntropy, which ``gamma`` 0 is; the paper divides by the number of positive boxes.
    """

    def __init__(self, gamma: float = 2.0, *, class_weights: Sequence[float] | None = None) -> None:
        super().__init__(class_weights)
        require_finite({"gamma": gamma})
        self.gamma = gamma

    def _sum(self, logits: Tensor, target: Tensor, weights: Tensor, align_corners: bool) -> Tensor:
        return cross_entropy_sum(
            logits, target, weights, gamma=self.gamma, align_corners=align_corners
        )
