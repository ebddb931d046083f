"""An image in overlapping windows, and results that are finished from top to bottom.

No map of all classes exists at the size of the image unless it is asked for: rows that no later
window touches are handed on, and what is kept is a band as high as a window.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from danet.ops.resize import resize

PIXELS_PER_PASS = 2**21
"""What passes a network together, as 1024 x 2048 alone does; a larger image passes by itself."""
STRIP = 4096
"""Width of what is done from top to bottom before the next columns of a wider image are, so that a
band of all classes does not grow with the width."""
TILE = 1024
"""Side of the windows of an image above ``max_pixels``; they start every three quarters of it."""

Infer = Callable[[Tensor], Tensor]
"""Maps images (B, 3, H, W) to probabilities (B, K, H, W)."""


class Band(NamedTuple):
    """Finished rows of a result."""

    top: int
    probabilities: Tensor
    """(B, K, rows, W); its memory is used again once the next band is asked for."""


class Windows:
    """Cuts images into windows that all have one size and overlap.

    Args:
        crop, stride: As in Sliding.
        per_batch: Windows that pass together; None for as many as PIXELS_PER_PASS allows.
    """

    def __init__(
        self, crop: tuple[int, int], stride: tuple[int, int], per_batch: int | None = None
    ) -> None:
        self.crop = crop
        self.stride = stride
        self.per_batch = per_batch

    def bands(self, infer: Infer, image: Tensor, *, mirrored: bool = False) -> Iterator[Band]:
        """Yields the mean over the windows that show a pixel.

        Args:
            infer: What is done with windows, put together along B.
            image: (B, 3, H, W).
            mirrored: Whether ``infer`` puts the mirror images beside the windows.
        """
        batch, _, height, width = image.shape
        tall, wide = min(self.crop[0], height), min(self.crop[1], width)
        tops = starts(height, tall, self.stride[0])
        lefts = starts(width, wide, self.stride[1])
        if len(tops) == len(lefts) == 1:
            yield Band(0, infer(image))
            return
        counts = _counts(tops, tall, height, image)[:, None], _counts(lefts, wide, width, image)
        pixels = batch * tall * wide * (2 if mirrored else 1)
        per_batch = self.per_batch or max(1, PIXELS_PER_PASS // pixels)
        corners, sums, top = list(product(tops, lefts)), torch.empty(0), 0
        for first in range(0, len(corners), per_batch):
            group = corners[first : first + per_batch]
            windows = torch.cat([image[:, :, t : t + tall, x : x + wide] for t, x in group])
            for (row, left), part in zip(group, infer(windows).split(batch), strict=True):
                if not sums.numel():
                    sums = empty_map(part, tall, width).zero_()
                if row > top:  # no later window starts above this one
                    done = row - top
                    yield Band(top, sums[:, :, :done].div_(counts[0][top:row] * counts[1]))
                    _move_up(sums, done)
                    top = row
                sums[:, :, :, left : left + wide] += part
        yield Band(top, sums.div_(counts[0][top:] * counts[1]))

    def classes(self, infer: Infer, image: Tensor, *, mirrored: bool = False) -> Tensor:
        """Returns the most probable classes, uint8 (B, H, W), as from ``bands``.

        Wide images are done in strips of columns: the same windows, of which those at the seams
        pass twice.
        """
        batch, _, height, width = image.shape
        result = torch.empty((batch, height, width), dtype=torch.uint8, device=image.device)
        for strip in self.strips(width):
            part = image[:, :, :, strip.seen]
            done = slice(strip.kept.start - strip.seen.start, strip.kept.stop - strip.seen.start)
            for top, band in self.bands(infer, part, mirrored=mirrored):
                rows = slice(top, top + band.shape[2])
                result[:, rows, strip.kept] = band[:, :, :, done].argmax(dim=1)
        return result

    def strips(self, width: int) -> list["Strip"]:
        """Cuts the columns of an image so that each strip has all windows that show its pixels."""
        wide = min(self.crop[1], width)
        lefts = starts(width, wide, self.stride[1])
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
    """What passes, in windows."""
    kept: slice
    """Of it the columns whose windows are all there."""


class PixelBudget:
    """Decides whether an image passes whole, and says once when one does not."""

    def __init__(self, max_pixels: int) -> None:
        if max_pixels < 32 * 32:
            raise ValueError(f"max_pixels={max_pixels} is not at least 1024 (32 x 32)")
        self.max_pixels = max_pixels
        self._is_told = False

    def windows(self, image: Tensor) -> Windows | None:
        """Returns the windows for an image (B, 3, H, W) above the budget; None for others."""
        height, width = image.shape[-2:]
        if height * width <= self.max_pixels:
            return None
        side = min(TILE, math.isqrt(self.max_pixels))
        stride = side * 3 // 4
        if not self._is_told:
            self._is_told = True
            print(
                f"an image of {width} x {height} is larger than "
                f"evaluation.max_pixels={self.max_pixels}: it and others like it are done in "
                f"windows of {side} x {side}, one every {stride} pixels",
                file=sys.stderr,
                flush=True,
            )
        return Windows((side, side), (stride, stride), per_batch=1)


def starts(size: int, crop: int, stride: int) -> list[int]:
    """Returns where windows begin along an axis: they cover it, and the last one ends with it."""
    last = max(size - crop, 0)
    return [*range(0, last, stride), last]


def _counts(begins: list[int], crop: int, size: int, like: Tensor) -> Tensor:
    """Returns how many windows cover each place of an axis, float32 (size,).

    Windows form a grid, so those that cover a pixel are the product of its two axes.
    """
    counts = torch.zeros(size, device=like.device)
    for begin in begins:
        counts[begin : begin + crop] += 1
    return counts


def _move_up(sums: Tensor, rows: int) -> None:
    """Drops the first rows, moves the others to the top, and fills the rest with zeros."""
    rest = sums.shape[2] - rows
    kept = sums[:, :, rows:]
    sums[:, :, :rest] = kept.clone() if rest > rows else kept
    sums[:, :, rest:] = 0


def empty_map(like: Tensor, height: int, width: int) -> Tensor:
    """Returns memory for (B, K, height, width) in the order of ``like``: adding goes straight."""
    is_last = like.stride(1) == 1 and like.shape[1] > 1
    order = torch.channels_last if is_last else torch.contiguous_format
    size = (*like.shape[:2], height, width)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=order)


def joined(bands: Iterable[Band], height: int) -> Tensor:
    """Returns the bands as one map (B, K, H, W)."""
    whole: Tensor | None = None
    for top, part in bands:
        if part.shape[2] == height:
            return part
        if whole is None:
            whole = empty_map(part, height, part.shape[3])
        whole[:, :, top : top + part.shape[2]] = part
    assert whole is not None
    return whole


def classes(bands: Iterable[Band], height: int) -> Tensor:
    """Returns the most probable classes, uint8 (B, H, W)."""
    whole: Tensor | None = None
    for top, part in bands:
        if whole is None:
            size = part.shape[0], height, part.shape[3]
            whole = torch.empty(size, dtype=torch.uint8, device=part.device)
        whole[:, top : top + part.shape[2]] = part.argmax(dim=1)
    assert whole is not None
    return whole


def resized(
    bands: Iterable[Band], height: int, size: tuple[int, int], *, align_corners: bool = True
) -> Iterator[Band]:
    """Resizes a map that comes in bands, as ``resize`` does a whole one, and yields bands of it.

    Args:
        bands: Of a map with ``height`` rows.
        height: In all bands together.
        size: Height and width of the result.
        align_corners: As in ``resize``.
    """
    below, above, share, known = _row_weights(height, size[0], align_corners)
    start, done, kept = 0, 0, None
    for top, part in bands:
        if part.shape[2] == height:
            yield Band(0, resize(part, size, align_corners=align_corners))
            return
        # Rows of the result lie between two rows, the first of which may be the last band's last.
        rows = part.permute(0, 2, 3, 1)  # (B, rows, w, K)
        if kept is not None:
            rows, start = torch.cat((kept, rows), dim=1), top - 1
        kept = rows[:, -1:].clone()
        ready = sum(i < top + part.shape[2] for i in known)
        if ready > done:
            here = slice(done, ready)
            device = part.device
            lower = rows.index_select(1, (below[here] - start).to(device))
            upper = rows.index_select(1, (above[here] - start).to(device))
            lower.lerp_(upper, share[here].to(device)[:, None, None])
            narrow, here_size = lower.permute(0, 3, 1, 2), (ready - done, size[1])
            yield Band(done, resize(narrow, here_size, align_corners=align_corners))
            done = ready


def _row_weights(
    height: int, wanted: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Returns for each wanted row the two rows it lies between, the second's share, the second.

    In float32 throughout, as torch's kernels round.
    """
    place = torch.arange(wanted, dtype=torch.float32)
    if align_corners:
        place = place * (torch.tensor(height - 1.0) / max(wanted - 1, 1))
    else:
        place = ((place + 0.5) * (torch.tensor(float(height)) / wanted) - 0.5).clamp_(min=0)
    below = place.long().clamp_(max=height - 1)
    above = (below + 1).clamp_(max=height - 1)
    return below, above, place - below, above.tolist()
