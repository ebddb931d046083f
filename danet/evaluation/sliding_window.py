"""Sliding windows whose results are finished from top to bottom, in bands of rows.

No map of all classes exists at the size of the image unless it is requested: rows that no later
window covers are yielded, and what is kept is a band as high as a window.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """(B, K, rows, W)."""


class Windows:
    """Cuts images into overlapping windows of one size.

    Windows start every ``stride`` pixels; the last of an axis is moved back to end at the border,
    so every window is full. In an axis where the image is smaller than the window, it is whole.

    Args:
        crop: Height and width of the window, at least 32.
        stride: Step in each axis, at most ``crop``.
        per_batch: Windows of a forward pass; None for as many as PIXELS_PER_PASS allows.
        mirrored: Whether the function that is run on windows doubles them with their mirror images.
    """

    def __init__(
        self,
        crop: Sequence[int],
        stride: Sequence[int],
        per_batch: int | None = None,
        *,
        mirrored: bool = False,
    ) -> None:
        if len(crop) != 2 or min(crop) < 32:
            raise ValueError(f"crop={list(crop)} is not [height, width] of at least 32")
        if len(stride) != 2 or min(stride) < 1:
            raise ValueError(f"stride={list(stride)} is not two numbers of at least 1")
        if stride[0] > crop[0] or stride[1] > crop[1]:
            raise ValueError(
                f"stride={list(stride)} is larger than crop={list(crop)}: pixels would be left out"
            )
        if per_batch is not None and per_batch < 1:
            raise ValueError(f"windows_per_batch={per_batch} is not at least 1, or null")
        self.crop, self.stride = tuple(crop), tuple(stride)
        self.per_batch, self.mirrored = per_batch, mirrored

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
        corners = list(product(tops, lefts))
        if len(corners) == 1:
            yield Band(0, infer(image))  # (B, K, H, W)
            return
        row_counts = _coverage(tops, tall, height, image)[:, None]  # (H, 1)
        column_counts = _coverage(lefts, wide, width, image)  # (W,)
        pixels = batch * tall * wide * (2 if self.mirrored else 1)
        per_batch = self.per_batch or max(1, PIXELS_PER_PASS // pixels)
        sums, top = torch.empty(0), 0
        for first in range(0, len(corners), per_batch):
            group = corners[first : first + per_batch]
            crops = [image[:, :, t : t + tall, x : x + wide] for t, x in group]
            windows = torch.cat(crops)  # (len(group) * B, 3, tall, wide)
            # The windows of the batch follow each other, so a split by B gives one per corner.
            for (row, left), part in zip(group, infer(windows).split(batch), strict=True):
                if not sums.numel():
                    sums = part.new_zeros(*part.shape[:3], width)  # (B, K, tall, W)
                if row > top:  # no later window starts above this one
                    done = row - top
                    yield Band(top, sums[:, :, :done].div_(row_counts[top:row] * column_counts))
                    sums, top = F.pad(sums[:, :, done:], (0, 0, 0, done)), row
                sums[:, :, :, left : left + wide] += part
        yield Band(top, sums.div_(row_counts[top:] * column_counts))

    def argmax(self, infer: Infer, image: Tensor) -> Tensor:
        """Return the most probable classes, uint8 (B, H, W), those of ``bands``.

        Wide images are done in strips of columns: the same windows, of which those at the seams
        pass twice.
        """
        width, wide = image.shape[3], min(self.crop[1], image.shape[3])
        lefts = window_starts(width, wide, self.stride[1])
        per_strip = max(1, (STRIP - wide) // self.stride[1])
        strips = []
        for first in range(0, len(lefts), per_strip):
            begin, end = lefts[first], [*lefts, width][min(first + per_strip, len(lefts))]
            # All windows that cover a column of the strip.
            seen = [left for left in lefts if left < end and left + wide > begin]
            bands = self.bands(infer, image[:, :, :, seen[0] : seen[-1] + wide])
            kept = slice(begin - seen[0], end - seen[0])
            strips.append(argmax((Band(top, band[..., kept]) for top, band in bands)))
        return torch.cat(strips, dim=2)


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


def optional_windows(
    crop: Sequence[int] | None,
    stride: Sequence[int] | None,
    per_batch: int | None = None,
    *,
    mirrored: bool = False,
) -> Windows | None:
    """Return the windows, or None if neither ``crop`` nor ``stride`` is given."""
    if crop is None and stride is None:
        return None
    if crop is None or stride is None:
        raise ValueError(f"crop={crop} and stride={stride}: give both, or neither")
    return Windows(crop, stride, per_batch, mirrored=mirrored)


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


def argmax(bands: Iterable[Band]) -> Tensor:
    """Return the most probable classes of a map that comes in bands, uint8 (B, H, W)."""
    # (B, rows, W) each
    return torch.cat([part.argmax(dim=1).to(torch.uint8) for _, part in bands], dim=1)


def sum_maps(maps: Iterable[Iterable[Band]], height: int) -> Tensor:
    """Return the sum (B, K, H, W) of maps with ``height`` rows that come in bands."""
    total: Tensor | None = None
    for bands in maps:
        for top, part in bands:
            if total is None:
                total = part.new_zeros(*part.shape[:2], height, part.shape[3])  # (B, K, H, W)
            total[:, :, top : top + part.shape[2]] += part
    assert total is not None
    return total


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
    below, above, weight = _row_weights(height, size[0], align_corners)
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
        ready = int((above < top + part.shape[2]).sum())
        if ready > done:
            here = slice(done, ready)
            lower, upper, share = (
                values.to(part.device)
                for values in (below[here] - start, above[here] - start, weight[here])
            )
            mixed = rows[:, lower].lerp_(rows[:, upper], share[:, None, None])
            narrow = mixed.permute(0, 3, 1, 2)  # (B, K, ready - done, w)
            # Bilinear weights are separable: the rows are interpolated, the columns remain.
            yield Band(done, resize(narrow, (ready - done, size[1]), align_corners=align_corners))
            done = ready


def _row_weights(height: int, wanted: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each output row the two input rows around it, and the second's weight."""
    # In float32 throughout, the precision in which torch's kernels compute coordinates.
    place = torch.arange(wanted, dtype=torch.float32)
    if align_corners:
        place = place * (torch.tensor(height - 1.0) / max(wanted - 1, 1))
    else:
        place = ((place + 0.5) * (torch.tensor(float(height)) / wanted) - 0.5).clamp_(min=0)
    below = place.long().clamp_(max=height - 1)
    return below, (below + 1).clamp_(max=height - 1), place - below
