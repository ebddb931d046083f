"""Inference modes: a network run over whole images, in windows, at several scales.

Images are (B, 3, H, W) RGB in 0..255, uint8 or float. A mode is a callable that returns
probabilities, float32 (B, K, H, W), non-negative with sum 1 over K. Its ``predict`` returns the
classes alone and, in windows, never holds more than a band of probabilities.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from danet.evaluation.sliding_window import (
    PIXELS_PER_PASS,
    PixelBudget,
    WindowInference,
    Windows,
    empty_map,
    resize_bands,
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
    """

    def __init__(self, *, flip: bool = False, max_pixels: int = MAX_PIXELS) -> None:
        self.flip = flip
        self._budget = PixelBudget(max_pixels)

    def windows(self, image: Tensor) -> Windows | None:
        """Return the windows for an image (B, 3, H, W) above ``max_pixels``, None for others."""
        return self._budget.windows(image)

    def probabilities(self, model: nn.Module, image: Tensor) -> Tensor:
        """Compute the probabilities (B, K, h, w) of images or windows (B, 3, h, w)."""
        return _probabilities(model, image, self.flip)

    @torch.no_grad()
    def predict(self, model: nn.Module, image: Tensor) -> Tensor:
        """Predict the most probable classes, uint8 (B, H, W), of images (B, 3, H, W)."""
        if self.flip or self.windows(image) is not None:
            return super().predict(model, image)
        # Softmax is monotonic, so there is nothing to compute it for.
        return model(image).logits.argmax(dim=1).to(torch.uint8)  # (B, H, W)


class Sliding(WindowInference):
    """Windows of one size over the image; where they overlap, probabilities are averaged.

    Windows start every ``stride`` pixels; the last of an axis is moved back to end at the border,
    so every window is full. In an axis where the image is smaller than the window, it is whole.

    Args:
        crop: Height and width of the window.
        stride: Step in each axis, at most ``crop``.
        flip: As in Whole.
        windows_per_batch: Of a forward pass; None for as many as have
            ``sliding_window.PIXELS_PER_PASS`` pixels, mirror images included.
    """

    def __init__(
        self,
        *,
        crop: Sequence[int],
        stride: Sequence[int],
        flip: bool = False,
        windows_per_batch: int | None = None,
    ) -> None:
        if len(crop) != 2 or min(crop) < 32:
            raise ValueError(f"crop={list(crop)} is not [height, width] of at least 32")
        if len(stride) != 2 or min(stride) < 1:
            raise ValueError(f"stride={list(stride)} is not two numbers of at least 1")
        if stride[0] > crop[0] or stride[1] > crop[1]:
            raise ValueError(
                f"stride={list(stride)} is larger than crop={list(crop)}: pixels would be left out"
            )
        if windows_per_batch is not None and windows_per_batch < 1:
            raise ValueError(f"windows_per_batch={windows_per_batch} is not at least 1, or null")
        self.flip = flip
        self._windows = Windows(
            (int(crop[0]), int(crop[1])),
            (int(stride[0]), int(stride[1])),
            windows_per_batch,
            mirrored=flip,
        )

    def windows(self, image: Tensor) -> Windows:
        """Return the windows, the same for every image."""
        return self._windows

    def probabilities(self, model: nn.Module, image: Tensor) -> Tensor:
        """Compute the probabilities (B, K, h, w) of windows (B, 3, h, w)."""
        return _probabilities(model, image, self.flip)


class MultiScale(WindowInference):
    """Mean of the probabilities at several scales, each resized to the size of the image.

    Args:
        scales: Factors of the image's size.
        flip: As in Whole.
        crop, stride: As in Sliding; None runs each scale whole.
        windows_per_batch: As in Sliding.
        max_pixels: As in Whole, of the image and, without ``crop``, of each resized one. The
            windows of a larger image are images of their own, each with all its scales.
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
    ) -> None:
        if not scales or not 0 < min(scales) <= max(scales) <= LARGEST_SCALE:
            raise ValueError(
                f"scales={list(scales)} is not a list of positive numbers up to {LARGEST_SCALE:g}"
            )
        if (crop is None) != (stride is None):
            raise ValueError(f"crop={crop} and stride={stride}: give both, or neither")
        self.scales = tuple(float(scale) for scale in scales)
        self._budget = PixelBudget(max_pixels)
        self._infer: Whole | Sliding = Whole(flip=flip, max_pixels=max_pixels)
        if crop is not None and stride is not None:
            self._infer = Sliding(
                crop=crop, stride=stride, flip=flip, windows_per_batch=windows_per_batch
            )

    def windows(self, image: Tensor) -> Windows | None:
        """Return the windows for an image (B, 3, H, W) above ``max_pixels``, None for others."""
        return self._budget.windows(image)

    def probabilities(self, model: nn.Module, image: Tensor) -> Tensor:
        """Compute the mean over the scales, (B, K, h, w), of images or windows (B, 3, h, w)."""
        height, width = image.shape[-2:]
        # Scales that round to one size give one result, which counts as often.
        sizes = Counter(
            (max(1, round(height * scale)), max(1, round(width * scale))) for scale in self.scales
        )
        total: Tensor | None = None
        for size, times in sizes.items():
            scaled = image if size == (height, width) else resize(image.float(), size)
            bands = self._infer.bands(model, scaled)  # (B, K, rows, size[1]) each
            # Added band by band: only the sum has all classes at the size of the image.
            for top, part in resize_bands(bands, size[0], (height, width)):
                if total is None:
                    total = empty_map(part, height, width).zero_()  # (B, K, h, w)
                total[:, :, top : top + part.shape[2]].add_(part, alpha=times)
        assert total is not None
        return total.div_(len(self.scales))


def _probabilities(model: nn.Module, image: Tensor, flip: bool) -> Tensor:
    """Compute (B, K, h, w) of (B, 3, h, w), with mirror images in the same pass where they fit."""
    if not flip:
        return _softmax(model, image)
    mirrored = image.flip(-1)
    if 2 * image.shape[0] * image.shape[2] * image.shape[3] <= PIXELS_PER_PASS:
        total, other = _softmax(model, torch.cat((image, mirrored))).chunk(2)  # (B, K, h, w) each
    else:
        total, other = _softmax(model, image), _softmax(model, mirrored)
    # In place: a map of all classes is the largest tensor here.
    return total.add_(other.flip(-1)).div_(2)


def _softmax(model: nn.Module, image: Tensor) -> Tensor:
    return model(image).logits.float().softmax(dim=1)  # (B, K, h, w)


def mode_name(node: Mapping[str, Any]) -> str:
    """Return the name of an inference mode: the class of its config in snake case."""
    target = str(node.get("_target_", "")).rpartition(".")[2]
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", target).lower()


def describe(node: Mapping[str, Any], name: str | None = None) -> str:
    """Return the name and every value that is set: ``whole (flip=false, max_pixels=4194304)``.

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
