"""Sliding windows whose results are finished from top to bottom, in bands of rows.

No map of all classes exists at the size of the image unless it is requested: rows that no later
window covers are yielded, and what is kept is a band as high as a window.
"""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from danet.ops.resize import resize

PIXELS_PER_PASS = 2**21
"""Pixels of a forward pass, those of 1024 x 2048; a larger image passes by itself."""
STRIP = 4096
"""Width of the strips of columns that a wider image is cut into, each done from top to bottom, so
that a band of all classes does not grow with the width."""
TILE = 1024
"""Side of the windows of an image above ``max_pixels``; the stride is three quarters of it."""

Infer = Callable[[Tensor], Tensor]
"""Maps images (B, 3, H, W) to probabilities (B, K, H, W)."""


class Band(NamedTuple):
    """Finished rows of a result."""

    top: int
    probabilities: Tensor
    """(B, K, rows, W); its memory is reused for the next band."""


class Windows:
    """Cuts images into overlapping windows of one size.

    Args:
        crop, stride: As in Sliding.
        per_batch: Windows of a forward pass; None for as many as PIXELS_PER_PASS allows.
        mirrored: Whether the function that is run on windows doubles them with their mirror images.
    """

    def __init__(
        self,
        crop: tuple[int, int],
        stride: tuple[int, int],
        per_batch: int | None = None,
        *,
        mirrored: bool = False,
    ) -> None:
        self.crop = crop
        self.stride = stride
        self.per_batch = per_batch
        self.mirrored = mirrored

    def bands(self, infer: Infer, image: Tensor) -> Iterator[Band]:
        """Yield the mean over the windows that cover a pixel.

        Args:
            infer: Is run on windows, concatenated along B.
            image: (B, 3, H, W).
        """
        batch, _, height, width = image.shape
        tall, wide = min(self.crop[0], height), min(self.crop[1], width)
        tops = window_starts(height, tall, self.stride[0])
        lefts = window_starts(width, wide, self.stride[1])
        if len(tops) == len(lefts) == 1:
            yield Band(0, infer(image))  # (B, K, H, W)
            return
        row_counts = _coverage(tops, tall, height, image)[:, None]  # (H, 1)
        column_counts = _coverage(lefts, wide, width, image)  # (W,)
        pixels = batch * tall * wide * (2 if self.mirrored else 1)
        per_batch = self.per_batch or max(1, PIXELS_PER_PASS // pixels)
        corners, sums, top = list(product(tops, lefts)), torch.empty(0), 0
        for first in range(0, len(corners), per_batch):
            group = corners[first : first + per_batch]
            crops = [image[:, :, t : t + tall, x : x + wide] for t, x in group]
            windows = torch.cat(crops)  # (len(group) * B, 3, tall, wide)
            # The windows of the batch follow each other, so a split by B gives one per corner.
            for (row, left), part in zip(group, infer(windows).split(batch), strict=True):
                if not sums.numel():
                    sums = empty_map(part, tall, width).zero_()  # (B, K, tall, W)
                if row > top:  # no later window starts above this one
                    done = row - top
                    yield Band(top, sums[:, :, :done].div_(row_counts[top:row] * column_counts))
                    _shift_up(sums, done)
                    top = row
                sums[:, :, :, left : left + wide] += part
        yield Band(top, sums.div_(row_counts[top:] * column_counts))

    def argmax(self, infer: Infer, image: Tensor) -> Tensor:
        """Return the most probable classes, uint8 (B, H, W), those of ``bands``.

        Wide images are done in strips of columns: the same windows, of which those at the seams
        pass twice.
        """
        batch, _, height, width = image.shape
        result = torch.empty((batch, height, width), dtype=torch.uint8, device=image.device)
        for strip in self.strips(width):
            part = image[:, :, :, strip.seen]
            done = slice(strip.kept.start - strip.seen.start, strip.kept.stop - strip.seen.start)
            for top, band in self.bands(infer, part):
                rows = slice(top, top + band.shape[2])
                result[:, rows, strip.kept] = band[:, :, :, done].argmax(dim=1)
        return result

    def strips(self, width: int) -> list["Strip"]:
        """Cut the columns of an image so that each strip has all windows that cover its pixels."""
        wide = min(self.crop[1], width)
        lefts = window_starts(width, wide, self.stride[1])
        per_strip = max(1, (STRIP - wide) // self.stride[1])
        strips = []
        for first in range(0, len(lefts), per_strip):
            until = min(first + per_strip, len(lefts))
            kept = slice(lefts[first], lefts[until] if until < len(lefts) else width)
            seen = [left for left in lefts if left < kept.stop and left + wide > kept.start]
            strips.append(Strip(slice(seen[0], seen[-1] + wide), kept))
        return strips


class Strip(NamedTuple):
    """Columns of an image."""

    seen: slice
    """Input columns, cut into windows."""
    kept: slice
    """Output columns: those of ``seen`` whose windows are all in the strip."""


class PixelBudget:
    """Decides whether an image passes whole, and prints a note the first time one does not."""

    def __init__(self, max_pixels: int) -> None:
        if max_pixels < 32 * 32:
            raise ValueError(f"max_pixels={max_pixels} is not at least 1024 (32 x 32)")
        self.max_pixels = max_pixels
        self._is_reported = False

    def windows(self, image: Tensor) -> Windows | None:
        """Return the windows for an image (B, 3, H, W) above the budget, None for others."""
        height, width = image.shape[-2:]
        if height * width <= self.max_pixels:
            return None
        side = min(TILE, math.isqrt(self.max_pixels))
        stride = side * 3 // 4
        if not self._is_reported:
            self._is_reported = True
            print(
                f"an image of {width} x {height} is larger than "
                f"evaluation.max_pixels={self.max_pixels}: it and others like it are done in "
                f"windows of {side} x {side}, one every {stride} pixels",
                file=sys.stderr,
                flush=True,
            )
        # One window per pass: memory is short for an image this large.
        return Windows((side, side), (stride, stride), per_batch=1)


class BandInference(ABC):
    """Base of the inference modes, which define ``bands``.

    It lies outside the modules whose classes a config may name, see ``danet.config.targets``.
    """

    @abstractmethod
    def bands(self, model: nn.Module, image: Tensor) -> Iterator[Band]:
        """Yield the probabilities from top to bottom."""

    @torch.no_grad()
    def __call__(self, model: nn.Module, image: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to probabilities (B, K, H, W)."""
        return concat_bands(self.bands(model, image), image.shape[2])

    @torch.no_grad()
    def predict(self, model: nn.Module, image: Tensor) -> Tensor:
        """Predict the most probable classes, uint8 (B, H, W), of images (B, 3, H, W)."""
        return argmax(self.bands(model, image), image.shape[2])


class WindowInference(BandInference):
    """Base of the modes that run one function on the windows of an image, or on all of it."""

    @abstractmethod
    def windows(self, image: Tensor) -> Windows | None:
        """Return the windows for an image (B, 3, H, W); None passes it whole."""

    @abstractmethod
    def probabilities(self, model: nn.Module, image: Tensor) -> Tensor:
        """Compute the probabilities (B, K, h, w) of windows or images (B, 3, h, w)."""

    def bands(self, model: nn.Module, image: Tensor) -> Iterator[Band]:
        """Yield the probabilities from top to bottom."""
        windows = self.windows(image)
        if windows is None:
            return iter([Band(0, self.probabilities(model, image))])
        return windows.bands(partial(self.probabilities, model), image)

    @torch.no_grad()
    def predict(self, model: nn.Module, image: Tensor) -> Tensor:
        """Predict the most probable classes, uint8 (B, H, W), of images (B, 3, H, W)."""
        windows = self.windows(image)
        if windows is None:
            return super().predict(model, image)
        return windows.argmax(partial(self.probabilities, model), image)


def window_starts(size: int, crop: int, stride: int) -> list[int]:
    """Return where windows start along an axis: they cover it, and the last one ends with it."""
    last = max(size - crop, 0)
    return [*range(0, last, stride), last]


def _coverage(begins: list[int], crop: int, size: int, like: Tensor) -> Tensor:
    """Return how many windows cover each position of an axis, float32 (size,).

    Windows form a grid, so those that cover a pixel are the product of its two axes.
    """
    counts = torch.zeros(size, device=like.device)
    for begin in begins:
        counts[begin : begin + crop] += 1
    return counts


def _shift_up(sums: Tensor, rows: int) -> None:
    """Drop the first rows, shift the others to the top, and fill the rest with zeros."""
    rest = sums.shape[2] - rows
    kept = sums[:, :, rows:]  # (B, K, rest, W)
    # More rows than are dropped overlap with where they go, which a copy in place must not.
    sums[:, :, :rest] = kept.clone() if rest > rows else kept
    sums[:, :, rest:] = 0


def empty_map(like: Tensor, height: int, width: int) -> Tensor:
    """Return uninitialised memory (B, K, height, width) in the memory format of ``like``."""
    # Adding maps of one format walks straight through memory; of two formats it jumps. The stride
    # of a dimension with one element is arbitrary, hence K > 1.
    is_last = like.stride(1) == 1 and like.shape[1] > 1
    order = torch.channels_last if is_last else torch.contiguous_format
    size = (*like.shape[:2], height, width)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=order)


def concat_bands(bands: Iterable[Band], height: int) -> Tensor:
    """Return the bands as one map (B, K, H, W)."""
    whole: Tensor | None = None
    for top, part in bands:
        if part.shape[2] == height:
            return part  # the only band, without a copy
        if whole is None:
            whole = empty_map(part, height, part.shape[3])
        whole[:, :, top : top + part.shape[2]] = part
    assert whole is not None
    return whole


def argmax(bands: Iterable[Band], height: int) -> Tensor:
    """Return the most probable classes, uint8 (B, H, W)."""
    whole: Tensor | None = None
    for top, part in bands:
        if whole is None:
            size = part.shape[0], height, part.shape[3]
            whole = torch.empty(size, dtype=torch.uint8, device=part.device)
        whole[:, top : top + part.shape[2]] = part.argmax(dim=1)  # (B, rows, W)
    assert whole is not None
    return whole


def resize_bands(
    bands: Iterable[Band], height: int, size: tuple[int, int], *, align_corners: bool = True
) -> Iterator[Band]:
    """Resize a map that comes in bands, as ``resize`` does a whole one, and yield bands of it.

    Args:
        bands: Of a map with ``height`` rows.
        height: Rows of all bands together.
        size: Height and width of the result.
        align_corners: As in ``resize``.
    """
    below, above, weight, needed = _row_weights(height, size[0], align_corners)
    start, done, kept = 0, 0, None
    for top, part in bands:
        if part.shape[2] == height:
            yield Band(0, resize(part, size, align_corners=align_corners))
            return
        # Rows of the result lie between two rows, the first of which may end the previous band.
        rows = part.permute(0, 2, 3, 1)  # (B, rows, w, K)
        if kept is not None:
            rows, start = torch.cat((kept, rows), dim=1), top - 1
        kept = rows[:, -1:].clone()
        ready = sum(i < top + part.shape[2] for i in needed)
        if ready > done:
            here = slice(done, ready)
            device = part.device
            lower = rows.index_select(1, (below[here] - start).to(device))
            upper = rows.index_select(1, (above[here] - start).to(device))
            lower.lerp_(upper, weight[here].to(device)[:, None, None])
            narrow = lower.permute(0, 3, 1, 2)  # (B, K, ready - done, w)
            # Bilinear weights are separable: the rows are interpolated, the columns remain.
            yield Band(done, resize(narrow, (ready - done, size[1]), align_corners=align_corners))
            done = ready


def _row_weights(
    height: int, wanted: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Return for each output row the two input rows around it, the second's weight, the second.

    All but the last are tensors (wanted,).
    """
    # In float32 throughout, the precision in which torch's kernels compute coordinates.
    place = torch.arange(wanted, dtype=torch.float32)
    if align_corners:
        place = place * (torch.tensor(height - 1.0) / max(wanted - 1, 1))
    else:
        place = ((place + 0.5) * (torch.tensor(float(height)) / wanted) - 0.5).clamp_(min=0)
    below = place.long().clamp_(max=height - 1)
    above = (below + 1).clamp_(max=height - 1)
    return below, above, place - below, above.tolist()
