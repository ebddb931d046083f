"""Inference modes: a network run over whole images, in windows, at several scales.

Images are (B, 3, H, W) RGB in 0..255, uint8 or float. A mode is a callable that returns
probabilities, float32 (B, K, H, W), non-negative with sum 1 over K. Its ``predict`` returns the
classes alone and, in windows, never holds more than a band of probabilities. The arguments that
modes share:

    flip: Whether to average with the result of the mirrored image.
    crop, stride: Height and width of windows, and their step in each axis.
    windows_per_batch: Of a forward pass; None for as many as have
        ``sliding_window.PIXELS_PER_PASS`` pixels, mirror images included.
    max_pixels: A larger image is done in overlapping windows of ``sliding_window.TILE``, which is
        noted on stderr the first time.
    precision: Of the network: float32, or bfloat16 for speed. Probabilities are float32.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from danet.evaluation.evaluate import WindowInference
from danet.evaluation.sliding_window import MAX_PIXELS, Piece, Windows, resize_bands, sum_maps
from danet.ops.resize import resize

LARGEST_SCALE = 16.0
"""Of an image; the papers go up to 2.25. A config may come with somebody else's checkpoint."""


@dataclass(kw_only=True, eq=False)
class Whole(WindowInference):
    """One pass over the whole image."""

    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.windows = Windows(max_pixels=self.max_pixels)

    def pieces(self, model: nn.Module, image: Tensor) -> Iterator[Piece]:
        """Yield what ``bands`` does, or the logits where one pass without mirror image gives it."""
        if self.flip or self.windows.grid(image)[0] != image.shape[-2:]:
            return super().pieces(model, image)
        # Softmax is monotonic, so there is nothing to compute it for.
        return iter([Piece(self.logits(model, image), are_logits=True)])


@dataclass(kw_only=True, eq=False)
class Sliding(WindowInference):
    """Windows of one size over the image; where they overlap, probabilities are averaged."""

    crop: Sequence[int]
    stride: Sequence[int]
    windows_per_batch: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        places = self.crop, self.stride, self.windows_per_batch
        self.windows = Windows(*places, mirrored=self.flip)


@dataclass(kw_only=True, eq=False)
class MultiScale(WindowInference):
    """Mean of the probabilities at several scales, each resized to the size of the image."""

    scales: Sequence[float]  # factors of the image's size
    flip: bool = True
    crop: Sequence[int] | None = None  # without it and ``stride`` each scale is run whole
    stride: Sequence[int] | None = None
    windows_per_batch: int | None = None
    # Of the image and, without ``crop``, of each resized one. The windows of a larger image are
    # images of their own, each with all its scales.
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        require_factors("scales", self.scales, LARGEST_SCALE)
        super().__post_init__()
        self.windows = Windows(max_pixels=self.max_pixels)
        places = self.crop, self.stride, self.windows_per_batch
        self.windows_at_scale = Windows(*places, max_pixels=self.max_pixels, mirrored=self.flip)

    def probabilities(self, model: nn.Module, image: Tensor) -> Tensor:
        """Compute the mean over the scales, (B, K, h, w), of images or windows (B, 3, h, w)."""
        height, width = image.shape[-2:]
        infer = partial(super().probabilities, model)

        def at(scale: float) -> Iterator[Tensor]:
            size = max(1, round(height * scale)), max(1, round(width * scale))
            scaled = image if size == (height, width) else resize(image.float(), size)
            bands = self.windows_at_scale.bands(infer, scaled)
            return resize_bands(bands, size[0], (height, width))

        # Added band by band: only the sum has all classes at the size of the image.
        return sum_maps(map(at, self.scales), height).div_(len(self.scales))  # (B, K, h, w)


def require_factors(name: str, values: Sequence[float], largest: float) -> None:
    """Raise ValueError unless there are values, all above 0 and up to ``largest``."""
    if not values or not 0 < min(values) <= max(values) <= largest:
        raise ValueError(
            f"{name}={list(values)} is not a list of positive numbers up to {largest:g}"
        )


def mode_name(node: Mapping[str, Any]) -> str:
    """Return the name of an inference mode: the class of its config in snake case."""
    target = str(node.get("_target_", "")).rpartition(".")[2]
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", target).lower()


def describe(node: Mapping[str, Any], name: str | None = None) -> str:
    """Return the values set in the group ``evaluation``: ``whole (flip=false, max_pixels=4096)``.

    The name is the choice on the command line; None for that of the class.
    """
    values = [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in node.items()
        if not key.startswith("_") and value is not None
    ]
    return f"{name or mode_name(node)} ({', '.join(values)})"
