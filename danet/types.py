"""The records that flow through the project.

Shape letters: B images in a batch, C channels, H rows, W columns, K classes,
N = H * W positions of a feature map, D channels of a key or query.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # torch takes seconds, which a misspelt setting need not wait for
    import numpy as np
    from torch import Tensor

IGNORE = 255
"""Mask value of pixels that count neither in a loss nor in a score, with up to 255 classes."""
MAX_CLASSES = 8192
"""The confusion matrix of so many takes 512 MiB."""


def ignore_index(num_classes: int) -> int:
    """Return the mask value that is ignored: IGNORE, or with more than 255 classes 65535."""
    return IGNORE if num_classes <= IGNORE else 65535


def ignore_of(mask: np.ndarray) -> int:
    """Return the ignored value of a mask of a sample: only uint16 has more than 255 classes."""
    return 65535 if mask.dtype == "uint16" else IGNORE


class SampleKey(NamedTuple):
    """Key of one training sample: all that decides it."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which is not needed
    seed: int
    """Of its augmentation."""
    focus: int | None = None
    """The class for which rare-class sampling chose the picture."""
    partner: SampleKey | None = None
    """Key of the sample whose classes are pasted over this one; see danet.data.class_mix."""


class Sample(NamedTuple):
    """One image with its mask, as read from disk or after augmentation."""

    image: np.ndarray
    """uint8 (H, W, 3), RGB; or the N bands of ``data.channels``, raw, of any number of bits."""
    mask: np.ndarray
    """uint8 (H, W), class indices 0..K-1 or IGNORE; uint16 with more than 255 classes."""
    name: str
    """Name in messages and file names; unique within its split."""


class Batch(NamedTuple):
    """Several samples of one size."""

    image: Tensor
    """uint8 (B, N, H, W), a quarter of the bytes of float, which it is if the samples have more
    than 8 bits; the model normalises."""
    mask: Tensor
    """uint8 (B, H, W), class indices or IGNORE; int32 with more than 255 classes, since torch lacks
    operations on uint16. Losses widen it to int64."""
    name: tuple[str, ...]


class SegmentationOutput(NamedTuple):
    """Output of a network for a batch."""

    logits: Tensor
    """(B, K, H, W), before softmax: at the size of the image in eval mode; in training at the
    resolution of the head, for the loss to upsample piece by piece."""
    auxiliary: dict[str, Tensor]
    """Further logits of the same shape for deep supervision; empty in eval mode."""
