"""What all losses share: means that are divided late, and the checks of their arguments."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from danet.types import ignore_index


class Part(NamedTuple):
    """A mean before the division; a loss is a sum of such means.

    Totals and divisors of several micro-batches may be added up before the division. A loss that
    allows it has the methods ``parts`` and ``divisors``, and ``pixel_parts`` for the loss over a
    validation set; see CrossEntropy.
    """

    total: Tensor
    """Scalar, with gradient."""
    divisor: Tensor
    """Scalar without gradient: labelled pixels, their weights, or images; 1 for a whole loss."""
    factor: float = 1.0
    """Of the mean."""


def mean_of(parts: Sequence[Part], divisors: Sequence[Tensor] | None = None) -> Tensor:
    """Return the sum of the means, each divided by its own divisor or by that in ``divisors``."""
    means = [
        # A divisor of 0 means that no pixel counts. The total is 0 then, but for label smoothing
        # where all pixels are of classes without weight.
        part.factor * (part.total / divisor.clamp(min=1e-12) * (divisor > 0))
        for part, divisor in zip(parts, divisors or [p.divisor for p in parts], strict=True)
    ]
    return torch.stack(means).sum() if len(means) > 1 else means[0]


def parts_of(loss: Any, logits: Tensor, mask: Tensor, *, align_corners: bool) -> list[Part]:
    """Return the parts of any loss; one that has none is averaged over micro-batches."""
    if hasattr(loss, "parts"):
        return loss.parts(logits, mask, align_corners=align_corners)
    whole = loss(logits, mask, align_corners=align_corners)
    return [Part(whole, has_labels(mask, logits.shape[1]))]


def pixel_parts_of(loss: Any, logits: Tensor, mask: Tensor) -> list[Part]:
    """Return the parts of a loss that are sums over pixels alone, if it has any."""
    return loss.pixel_parts(logits, mask) if hasattr(loss, "pixel_parts") else []


def divisors_of(loss: Any, mask: Tensor, num_classes: int) -> list[Tensor] | None:
    """Return the divisors of ``parts_of`` from the mask; None if they depend on the logits."""
    if hasattr(loss, "divisors"):
        return loss.divisors(mask, num_classes)
    return [has_labels(mask, num_classes)]


def has_labels(mask: Tensor, num_classes: int) -> Tensor:
    """Return 1.0 if any pixel is labelled, else 0.0."""
    return labelled(mask, num_classes).any().float()


def labelled(mask: Tensor, num_classes: int) -> Tensor:
    """Return which pixels count, bool (B, H, W)."""
    # Widened, since torch takes 65535 for 255 where it compares it with bytes.
    return mask.long() != ignore_index(num_classes)


def target_of(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the mask as int64, (B, H, W); raise ValueError unless it fits the logits."""
    # Converted silently, the fractions of a resized float mask would become other classes.
    if mask.dtype.is_floating_point:
        raise ValueError(f"the mask is {mask.dtype}; it must hold whole class indices")
    fits = mask.ndim == 3 and mask.shape[0] == logits.shape[0]
    if not fits or mask.shape[1] < logits.shape[2] or mask.shape[2] < logits.shape[3]:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit logits {tuple(logits.shape)}")
    return mask.long()  # uint8 until here: an eighth of the bytes on the way to the device


def require_finite(numbers: Mapping[str, float]) -> None:
    """Raise ValueError, with its name, for a number that is negative or not finite."""
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} is not a finite number >= 0")
