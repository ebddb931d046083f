"""Ways to run a network over an image: whole, in windows, at several scales.

Each is a callable (model, image) -> probabilities: the image is (B, 3, H, W) RGB in 0..255, uint8
or float; the result is float32 (B, K, H, W), non-negative with sum 1 over K.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from danet.ops.resize import resize


class Inference(Protocol):
    """What the classes of this module are."""

    def __call__(self, model: nn.Module, image: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to probabilities (B, K, H, W)."""
        ...


class Whole:
    """One pass over the whole image; with ``flip`` the mean with the mirrored image's result."""

    def __init__(self, *, flip: bool = False) -> None:
        self.flip = flip

    def __call__(self, model: nn.Module, image: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to probabilities (B, K, H, W)."""
        probabilities = model(image).logits.float().softmax(dim=1)
        if self.flip:
            mirrored = model(image.flip(-1)).logits.float().softmax(dim=1).flip(-1)
            probabilities = (probabilities + mirrored) / 2
        return probabilities


class Sliding:
    """Windows of one size over the image; where they overlap, probabilities are averaged.

    Windows start every ``stride`` pixels; the last of an axis is moved back to end at the border,
    so every window is full. An image smaller than the window in an axis is taken whole there.

    Args:
        crop: Height and width of the window.
        stride: Step in each axis, at most ``crop``.
        flip: As in Whole.
    """

    def __init__(self, *, crop: Sequence[int], stride: Sequence[int], flip: bool = False) -> None:
        if len(crop) != 2 or min(crop) < 32:
            raise ValueError(f"crop={list(crop)} is not [height, width] of at least 32")
        if len(stride) != 2 or min(stride) < 1:
            raise ValueError(f"stride={list(stride)} is not two numbers of at least 1")
        if stride[0] > crop[0] or stride[1] > crop[1]:
            raise ValueError(
                f"stride={list(stride)} is larger than crop={list(crop)}: pixels would be left out"
            )
        self.crop = (int(crop[0]), int(crop[1]))
        self.stride = (int(stride[0]), int(stride[1]))
        self._infer = Whole(flip=flip)

    def __call__(self, model: nn.Module, image: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to probabilities (B, K, H, W)."""
        height, width = image.shape[-2:]
        total: Tensor | None = None
        count = torch.zeros(height, width, device=image.device)
        for top in _starts(height, self.crop[0], self.stride[0]):
            for left in _starts(width, self.crop[1], self.stride[1]):
                here = (
                    ...,
                    slice(top, min(top + self.crop[0], height)),
                    slice(left, min(left + self.crop[1], width)),
                )
                part = self._infer(model, image[here])
                if total is None:
                    total = part.new_zeros(*part.shape[:2], height, width)
                total[here] += part
                count[here] += 1
        assert total is not None
        return total / count


def _starts(size: int, crop: int, stride: int) -> list[int]:
    """Returns where windows begin along an axis: they cover it, and the last one ends with it."""
    last = max(size - crop, 0)
    return [*range(0, last, stride), last]


class MultiScale:
    """Mean of the probabilities at several scales, each resized to the size of the image.

    Args:
        scales: Factors of the image's size.
        flip: As in Whole.
        crop, stride: As in Sliding; None runs each scale whole.
    """

    def __init__(
        self,
        *,
        scales: Sequence[float],
        flip: bool = True,
        crop: Sequence[int] | None = None,
        stride: Sequence[int] | None = None,
    ) -> None:
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales={list(scales)} is not a list of positive numbers")
        if (crop is None) != (stride is None):
            raise ValueError(f"crop={crop} and stride={stride}: give both, or neither")
        self.scales = tuple(float(scale) for scale in scales)
        self._infer: Inference = Whole(flip=flip)
        if crop is not None and stride is not None:
            self._infer = Sliding(crop=crop, stride=stride, flip=flip)

    def __call__(self, model: nn.Module, image: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to probabilities (B, K, H, W)."""
        height, width = image.shape[-2:]
        total: Tensor | None = None
        for scale in self.scales:
            size = max(1, round(height * scale)), max(1, round(width * scale))
            probabilities = self._infer(model, resize(image.float(), size))
            probabilities = resize(probabilities, (height, width))
            total = probabilities if total is None else total.add_(probabilities)
        assert total is not None
        return total / len(self.scales)
