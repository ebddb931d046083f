"""Inference modes: a network run over whole images, in windows, at several scales.

Images are (B, 3, H, W) RGB in 0..255, uint8 or float. A mode is a callable that returns
probabilities, float32 (B, K, H, W), non-negative with sum 1 over K. Its ``predict`` returns the
classes alone and, in windows, never holds more than a band of probabilities.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from danet.evaluation.base import Precision, WindowInference
from danet.evaluation.sliding_window import (
    Band,
    PixelBudget,
    Windows,
    optional_windows,
    resize_bands,
    sum_maps,
)
from danet.ops.resize import resize

LARGEST_SCALE = 16.0
"""Of an image; the papers go up to 2.25. A config may come with somebody else's checkpoint."""
MAX_PIXELS = 2**22
"""Of an image that passes a network whole: 2048 x 2048, twice an image of Cityscapes."""


class Inference(Protocol):
    """The interface of an inference mode."""

    def __call__(self, model: nn.Module, image: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to probabilities (B, K, H, W)."""
        ...

    def predict(self, model: nn.Module, image: Tensor) -> Tensor:
        """Predict the most probable classes, uint8 (B, H, W), of images (B, 3, H, W)."""
        ...


class Whole(WindowInference):
    """One pass over the whole image; with ``flip`` the mean with the mirrored image's result.

    Args:
        flip: Whether to run the mirrored image, too.
        max_pixels: A larger image is done in overlapping windows of ``sliding_window.TILE``, as by
            Sliding, which is noted on stderr the first time.
        precision: Of the network: float32, or bfloat16 for speed. Probabilities are float32.
    """

    def __init__(
        self,
        *,
        flip: bool = False,
        max_pixels: int = MAX_PIXELS,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(PixelBudget(max_pixels).windows, flip=flip, precision=precision)

    @torch.no_grad()
    def predict(self, model: nn.Module, image: Tensor) -> Tensor:
        """Predict the most probable classes, uint8 (B, H, W), of images (B, 3, H, W)."""
        if self.flip or self.windows(image) is not None:
            return super().predict(model, image)
        # Softmax is monotonic, so there is nothing to compute it for.
        return self.logits(model, image).argmax(dim=1).to(torch.uint8)  # (B, H, W)


class Sliding(WindowInference):
    """Windows of one size over the image; where they overlap, probabilities are averaged.

    Args:
        crop, stride: As in ``sliding_window.Windows``.
        flip: As in Whole.
        windows_per_batch: Of a forward pass; None for as many as have
            ``sliding_window.PIXELS_PER_PASS`` pixels, mirror images included.
        precision: As in Whole.
    """

    def __init__(
        self,
        *,
        crop: Sequence[int],
        stride: Sequence[int],
        flip: bool = False,
        windows_per_batch: int | None = None,
        precision: Precision = "float32",
    ) -> None:
        windows = Windows(crop, stride, windows_per_batch, mirrored=flip)
        super().__init__(lambda image: windows, flip=flip, precision=precision)


class MultiScale(WindowInference):
    """Mean of the probabilities at several scales, each resized to the size of the image.

    Args:
        scales: Factors of the image's size.
        flip: As in Whole.
        crop, stride: As in Sliding; None runs each scale whole.
        windows_per_batch: As in Sliding.
        max_pixels: As in Whole, of the image and, without ``crop``, of each resized one. The
            windows of a larger image are images of their own, each with all its scales.
        precision: As in Whole.
    """

    def __init__(
        self,
        *,
        scales: Sequence[float],
        flip: bool = True,
        crop: Sequence[int] | None = None,
        stride: Sequence[int] | None = None,
        windows_per_batch: int | None = None,
        max_pixels: int = MAX_PIXELS,
        precision: Precision = "float32",
    ) -> None:
        require_factors("scales", scales, LARGEST_SCALE)
        budget = PixelBudget(max_pixels)
        super().__init__(budget.windows, flip=flip, precision=precision)
        self.scales = tuple(float(scale) for scale in scales)
        windows = optional_windows(crop, stride, windows_per_batch, mirrored=flip)
        self._at_one_scale = WindowInference(
            (lambda image: windows) if windows else PixelBudget(max_pixels).windows,
            flip=flip,
            precision=precision,
        )

    def probabilities(self, model: nn.Module, image: Tensor) -> Tensor:
        """Compute the mean over the scales, (B, K, h, w), of images or windows (B, 3, h, w)."""
        height, width = image.shape[-2:]
        # Scales that round to one size give one result, which counts as often.
        sizes = Counter(
            (max(1, round(height * scale)), max(1, round(width * scale))) for scale in self.scales
        )

        def at(size: tuple[int, int], times: int) -> Iterator[Band]:
            scaled = image if size == (height, width) else resize(image.float(), size)
            bands = self._at_one_scale.bands(model, scaled)  # (B, K, rows, size[1]) each
            for top, part in resize_bands(bands, size[0], (height, width)):
                yield Band(top, part.mul_(times))

        # Added band by band: only the sum has all classes at the size of the image.
        total = sum_maps((at(*counted) for counted in sizes.items()), height)  # (B, K, h, w)
        return total.div_(len(self.scales))


def require_factors(name: str, values: Sequence[float], largest: float, why: str = "") -> None:
    """Raise ValueError unless there are values, all above 0 and up to ``largest``."""
    if not values or not 0 < min(values) <= max(values) <= largest:
        raise ValueError(
            f"{name}={list(values)} is not a list of positive numbers up to {largest:g}{why}"
        )


def mode_name(node: Mapping[str, Any]) -> str:
    """Return the name of an inference mode: the class of its config in snake case."""
    target = str(node.get("_target_", "")).rpartition(".")[2]
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", target).lower()


def describe(node: Mapping[str, Any], name: str | None = None) -> str:
    """Return the name and every value that is set: ``whole (flip=false, precision=float32)``.

    Args:
        node: The config group ``evaluation``.
        name: The choice on the command line; None for the name of the class.
    """
    values = [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in node.items()
        if not key.startswith("_") and value is not None
    ]
    return f"{name or mode_name(node)} ({', '.join(values)})"
