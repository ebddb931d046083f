"""Losses: each maps logits and a mask to a scalar; DeepSupervision applies them to all outputs.

All accept logits (B, K, h, w) and a mask (B, H, W) of class indices or IGNORE, upsample logits that
are coarser than the mask, compute in float32, and return exactly 0 with finite gradients where
every pixel is IGNORE. Cross entropy and OHEM never hold the upsampled logits of a whole batch; Dice
and Lovasz need all pixels of a class at once and do.

A batch may be spread over micro-batches and processes. Means over pixels are then sums over all of
them, divided by one common divisor (``Part``), so that the same images give the same loss however
they are spread. What is not a mean over pixels is computed per micro-batch and averaged over those
with a labelled pixel: Dice and Lovasz, and the selection of OHEM by ``min_kept``.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danet.ops.cross_entropy import cross_entropy_sum, pixel_losses
from danet.ops.resize import resize
from danet.types import IGNORE, SegmentationOutput


class Part(NamedTuple):
    """A mean before the division; a loss is a sum of such means.

    Totals and divisors of several micro-batches may be added up before the division. A loss that
    allows it has the methods ``parts`` and ``divisors``; see CrossEntropy.
    """

    total: Tensor
    """Scalar, with gradient."""
    divisor: Tensor
    """Scalar without gradient: labelled pixels or the sum of their weights; 1 for a whole loss."""
    factor: float = 1.0
    """Of the mean."""


def mean_of(parts: Sequence[Part], divisors: Sequence[Tensor] | None = None) -> Tensor:
    """Return the sum of the means, each divided by its own divisor or by that in ``divisors``."""
    means = [
        # A divisor of 0 means no labelled pixel: the total is 0, too, and 0 / 1e-12 is exactly 0.
        part.factor * (part.total / divisor.clamp(min=1e-12))
        for part, divisor in zip(parts, divisors or [p.divisor for p in parts], strict=True)
    ]
    return torch.stack(means).sum() if len(means) > 1 else means[0]


def _parts(loss: Any, logits: Tensor, mask: Tensor, *, align_corners: bool) -> list[Part]:
    """Return the parts of any loss; one that has none is averaged over micro-batches."""
    if hasattr(loss, "parts"):
        return loss.parts(logits, mask, align_corners=align_corners)
    return [Part(loss(logits, mask, align_corners=align_corners), _has_labels(mask))]


def _divisors(loss: Any, mask: Tensor) -> list[Tensor] | None:
    return loss.divisors(mask) if hasattr(loss, "divisors") else [_has_labels(mask)]


def _has_labels(mask: Tensor) -> Tensor:
    """Return 1.0 if any pixel is labelled, else 0.0."""
    return (mask != IGNORE).any().float()


def _target(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the mask as int64, (B, H, W); raise ValueError unless it fits the logits."""
    # Converted silently, the fractions of a resized float mask would become other classes.
    if mask.dtype.is_floating_point:
        raise ValueError(f"the mask is {mask.dtype}; it must hold whole class indices")
    fits = mask.ndim == 3 and mask.shape[0] == logits.shape[0]
    if not fits or mask.shape[1] < logits.shape[2] or mask.shape[2] < logits.shape[3]:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit logits {tuple(logits.shape)}")
    return mask.long()  # uint8 until here: an eighth of the bytes on the way to the device


def _require_finite(numbers: Mapping[str, float]) -> None:
    """Raise ValueError, with its name, for a number that is negative or not finite."""
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} is not a finite number >= 0")


class CrossEntropy(nn.Module):
    """Mean of -log p[y] over the labelled pixels of the batch.

    With ``class_weights``, K factors, it is divided by the sum of the pixels' weights, as in torch.
    """

    class_weights: Tensor | None

    def __init__(self, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        factors = None
        if class_weights is not None:
            _require_finite({f"class_weights[{i}]": w for i, w in enumerate(class_weights)})
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
        total = cross_entropy_sum(logits, target, weights, align_corners=align_corners)
        return [Part(total, weights.sum())]

    def divisors(self, mask: Tensor) -> list[Tensor] | None:
        """Return the divisors of ``parts`` from the mask; None if they depend on the logits."""
        return [self._pixel_weights(mask.long()).sum()]

    def target_and_weights(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mask as int64 and the weight of every pixel, float32; both (B, H, W)."""
        weights, classes = self.class_weights, logits.shape[1]
        if weights is not None and weights.numel() != classes:
            raise ValueError(f"{weights.numel()} class_weights for {classes} classes")
        target = _target(logits, mask)
        return target, self._pixel_weights(target)

    def _pixel_weights(self, target: Tensor) -> Tensor:
        """Return the weight of every pixel, float32 (B, H, W); 0 where the target is IGNORE."""
        valid = target != IGNORE  # (B, H, W)
        if self.class_weights is None:
            return valid.float()
        # 255 would be out of range. A class without a weight is refused by ``parts``; ``divisors``
        # may come first and must not crash (on CUDA that would be a device-side assertion).
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
        class_weights: As in CrossEntropy; they do not influence the selection.
    """

    def __init__(
        self,
        threshold: float = 0.7,
        min_kept: int = 100_000,
        *,
        normalise: Literal["kept", "labelled"] = "kept",
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(class_weights)
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
        kept = weights * self.hard_pixels(losses, target)
        total = cross_entropy_sum(logits, target, kept, align_corners=align_corners)
        return [Part(total, (kept if self.normalise == "kept" else weights).sum())]

    def divisors(self, mask: Tensor) -> list[Tensor] | None:
        """Return the divisors of ``parts`` from the mask; None if they depend on the logits."""
        return None if self.normalise == "kept" else super().divisors(mask)

    def hard_pixels(self, losses: Tensor, target: Tensor) -> Tensor:
        """Return which pixels are kept, bool (B, H, W), from -log p[y] of the same shape."""
        valid = target != IGNORE
        # Compared as log p: where probabilities saturate at 1, logarithms still differ.
        ease = (-losses).masked_fill(~valid, torch.inf)
        k = min(self.min_kept, ease.numel())
        if ease.is_cuda:  # where kthvalue is not deterministic and uses one block per row
            kth = ease.flatten().sort().values[k - 1]
        else:
            kth = ease.flatten().kthvalue(k).values  # linear time; +inf when fewer are labelled
        return valid & (ease <= kth.clamp(min=math.log(self.threshold)))


class Dice(nn.Module):
    """One minus the mean soft Dice coefficient of the classes that occur in the micro-batch.

    Milletari et al., V-Net, 2016, for several classes, with linear (not squared) denominators.

    ``smooth``, in pixels, is added to numerator and denominator.
    """

    def __init__(self, smooth: float = 1.0) -> None:
        super().__init__()
        _require_finite({"smooth": smooth})
        self.smooth = smooth

    def forward(self, logits: Tensor, mask: Tensor, *, align_corners: bool = True) -> Tensor:
        """Maps (B, K, h, w) and (B, H, W) to a scalar."""
        probabilities, truth = _probabilities_and_truth(logits, mask, align_corners)
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
        probabilities, truth = _probabilities_and_truth(logits, mask, align_corners)
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


def _probabilities_and_truth(
    logits: Tensor, mask: Tensor, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Return softmax and one-hot truth, both float32 (K, P) with zeros where ignored."""
    target = _target(logits, mask)
    fine = resize(logits.float(), target.shape[1:], align_corners=align_corners)
    valid = target != IGNORE
    truth = F.one_hot(target.masked_fill(~valid, 0), logits.shape[1]).movedim(-1, 0)
    probabilities = fine.softmax(dim=1).movedim(1, 0)  # (K, B, H, W), as the truth
    return (probabilities * valid).flatten(1), (truth * valid).flatten(1).float()  # P = B * H * W


class WeightedSum(nn.Module):
    """Weighted sum of losses: ``sum_i weights[i] * losses[i](logits, mask)``."""

    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        if len(losses) != len(weights):
            raise ValueError(f"{len(losses)} losses and {len(weights)} weights")
        self.losses = nn.ModuleList(losses)
        self.weights = tuple(weights)

    def forward(self, logits: Tensor, mask: Tensor, *, align_corners: bool = True) -> Tensor:
        """Maps (B, K, h, w) and (B, H, W) to a scalar."""
        return mean_of(self.parts(logits, mask, align_corners=align_corners))

    def parts(self, logits: Tensor, mask: Tensor, *, align_corners: bool = True) -> list[Part]:
        """Return the weighted parts of all losses."""
        return [
            part._replace(factor=weight * part.factor)
            for weight, loss in zip(self.weights, self.losses, strict=True)
            for part in _parts(loss, logits, mask, align_corners=align_corners)
        ]

    def divisors(self, mask: Tensor) -> list[Tensor] | None:
        """Return the divisors of all losses; None if one of them depends on the logits."""
        found = [_divisors(loss, mask) for loss in self.losses]
        return None if None in found else [d for divisors in found for d in divisors or ()]


class DeepSupervision(nn.Module):
    """Losses of all outputs of a network (section 3.4; equal weights in the authors' code).

    Args:
        main: The loss of the prediction, with weight 1.
        auxiliary: The loss of the other outputs; ``main`` again if None.
        weights: Of the other outputs by name. A name without an output is ignored; an output
            without a weight is an error.
        align_corners: How logits are upsampled to the mask; the same as in evaluation.
    """

    def __init__(
        self,
        main: nn.Module,
        auxiliary: nn.Module | None = None,
        weights: Mapping[str, float] | None = None,
        *,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.main = main
        self.auxiliary = auxiliary if auxiliary is not None else main
        self.weights = dict(weights or {})
        _require_finite({f"weights.{name}": weight for name, weight in self.weights.items()})

    def forward(self, output: SegmentationOutput, mask: Tensor) -> dict[str, Tensor]:
        """Return weighted scalars by output name; their sum is the loss."""
        return {name: mean_of(parts) for name, parts in self.parts(output, mask).items()}

    def parts(self, output: SegmentationOutput, mask: Tensor) -> dict[str, list[Part]]:
        """Return the weighted parts of each output by name."""
        parts = partial(_parts, mask=mask, align_corners=self.align_corners)
        terms = {"main": parts(self.main, output.logits)}
        for name, logits in output.auxiliary.items():
            if name not in self.weights:
                raise ValueError(
                    f"loss.weights has no entry for the output {name!r} of the network, only "
                    f"{', '.join(self.weights) or 'none'}"
                )
            found, weight = parts(self.auxiliary, logits), self.weights[name]
            terms[name] = [part._replace(factor=weight * part.factor) for part in found]
        return terms

    def divisors(self, mask: Tensor) -> dict[str, list[Tensor]] | None:
        """Return those of ``parts`` as losses do, for all weighted outputs, present or not."""
        main, others = _divisors(self.main, mask), _divisors(self.auxiliary, mask)
        if main is None or others is None:
            return None
        return {**dict.fromkeys(self.weights, others), "main": main}
