"""Sliding windows whose results are finished from top to bottom, in bands of rows.

No map of all classes exists at the size of the image unless it is requested: rows that no later
window covers are yielded, and what is kept is a band as high as a window.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import chain, product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from danet.ops.resize import resize

PIXELS_PER_PASS = 2**21  # of a forward pass, as of 1024 x 2048; a larger image passes by itself
MAX_PIXELS = 2**22  # of an image that passes whole: 2048 x 2048, twice an image of Cityscapes
STRIP = 4096
"""Width of the strips of columns that a wider image is cut into, each done from top to bottom, so
that a band of all classes does not grow with the width."""
TILE = 1024  # side of the windows of an image above ``max_pixels``; the stride is 3/4 of it
Infer = Callable[[Tensor], Tensor]  # maps images (B, 3, H, W) to probabilities (B, K, H, W)
Grid = tuple[Sequence[int], Sequence[int], int | None]
"""The windows of one image: height and width, step in each axis, windows of a pass."""
Bands = Iterable[Tensor]  # finished rows of a result from top to bottom, (B, K, rows, W) each


class Piece(NamedTuple):
    """A finished rectangle of a result."""

    scores: Tensor  # probabilities (B, K, rows, columns), perhaps times a factor; or logits
    top: int = 0
    left: int = 0
    are_logits: bool = False

    @property
    def place(self) -> tuple[slice, slice, slice]:
        """The index of the rectangle in a map (B, H, W)."""
        rows, columns = self.scores.shape[2:]
        below, right = self.top + rows, self.left + columns
        return slice(None), slice(self.top, below), slice(self.left, right)


@dataclass(eq=False)
class Windows:
    """Cuts images into overlapping windows of one size.

    Windows start every ``stride`` pixels; the last of an axis is moved back to end at the border,
    so every window is full. In an axis where the image is smaller than the window, it is whole.
    """

    crop: Sequence[int] | None = None  # height and width, at least 32; None passes images whole
    stride: Sequence[int] | None = None  # step in each axis, at most ``crop``; None without it
    per_batch: int | None = None  # windows of a pass; None for what PIXELS_PER_PASS allows
    _: KW_ONLY
    # Without ``crop``, a larger image is done in windows of TILE after all, which is noted on
    # stderr the first time.
    max_pixels: int = MAX_PIXELS
    mirrored: bool = False  # whether what is run on windows doubles them with mirror images

    def __post_init__(self) -> None:
        crop, stride, per_batch = self.crop, self.stride, self.per_batch
        if crop is None or stride is None:
            if crop is not stride:
                raise ValueError(f"crop={crop} and stride={stride}: give both, or neither")
        elif len(crop) != 2 or min(crop) < 32:
            raise ValueError(f"crop={list(crop)} is not [height, width] of at least 32")
        elif len(stride) != 2 or min(stride) < 1:
            raise ValueError(f"stride={list(stride)} is not two numbers of at least 1")
        elif stride[0] > crop[0] or stride[1] > crop[1]:
            larger = f"stride={list(stride)} is larger than crop={list(crop)}"
            raise ValueError(f"{larger}: pixels would be left out")
        if per_batch is not None and per_batch < 1:
            raise ValueError(f"windows_per_batch={per_batch} is not at least 1, or null")
        if self.max_pixels < 32 * 32:
            raise ValueError(f"max_pixels={self.max_pixels} is not at least 1024 (32 x 32)")
        self._is_noted = False

    def grid(self, image: Tensor) -> Grid:
        """Return the windows of an image (B, 3, H, W)."""
        height, width = image.shape[-2:]
        if self.crop is not None and self.stride is not None:
            crop = min(self.crop[0], height), min(self.crop[1], width)
            return crop, self.stride, self.per_batch
        if height * width <= self.max_pixels:
            return (height, width), (height, width), None
        side = min(TILE, math.isqrt(self.max_pixels))
        stride = side * 3 // 4
        if not self._is_noted:
            self._is_noted = True
            print(
                f"an image of {width} x {height} is larger than "
                f"evaluation.max_pixels={self.max_pixels}: it and others like it are done in "
                f"windows of {side} x {side}, one every {stride} pixels",
                file=sys.stderr,
            )
        # One window per pass: memory is short for an image this large.
        return (min(side, height), min(side, width)), (stride, stride), 1

    def bands(self, infer: Infer, image: Tensor, grid: Grid | None = None) -> Iterator[Tensor]:
        """Yield the mean over the windows that cover a pixel of (B, 3, H, W), as ``Bands``.

        ``infer`` is run on windows, concatenated along B: those of ``grid``, or of the image.
        """
        (tall, wide), stride, per_batch = grid or self.grid(image)
        batch, _, height, width = image.shape
        tops = window_starts(height, tall, stride[0])
        lefts = window_starts(width, wide, stride[1])
        corners = list(product(tops, lefts))
        if len(corners) == 1:
            yield infer(image)  # (B, K, H, W)
            return
        # Windows form a grid, so those that cover a pixel are the product of its two axes.
        row_counts = _coverage(tops, tall, height, image)[:, None]  # (H, 1)
        column_counts = _coverage(lefts, wide, width, image)  # (W,)
        pixels = batch * tall * wide * (2 if self.mirrored else 1)
        per_batch = per_batch or max(1, PIXELS_PER_PASS // pixels)
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
                    yield sums[:, :, :done].div_(row_counts[top:row] * column_counts)
                    sums, top = F.pad(sums[:, :, done:], (0, 0, 0, done)), row
                sums[:, :, :, left : left + wide] += part
        yield sums.div_(row_counts[top:] * column_counts)

    def pieces(self, infer: Infer, image: Tensor) -> Iterator[Piece]:
        """Yield what ``bands`` does; wide images in strips of columns, one after the other.

        The windows are the same; those at the seams of strips pass twice.
        """
        grid = (_, wide), (_, stride), _ = self.grid(image)
        width = image.shape[3]
        lefts = window_starts(width, wide, stride)
        per_strip = max(1, (STRIP - wide) // stride)
        for first in range(0, len(lefts), per_strip):
            begin, end = lefts[first], [*lefts, width][min(first + per_strip, len(lefts))]
            # All windows that cover a column of the strip.
            seen = [left for left in lefts if left < end and left + wide > begin]
            bands = self.bands(infer, image[:, :, :, seen[0] : seen[-1] + wide], grid)
            kept = slice(begin - seen[0], end - seen[0])
            yield from as_pieces((band[..., kept] for band in bands), begin)


def window_starts(size: int, crop: int, stride: int) -> list[int]:
    """Return where windows start along an axis: they cover it, and the last one ends with it."""
    last = max(size - crop, 0)
    return [*range(0, last, stride), last]


def _coverage(begins: list[int], crop: int, size: int, like: Tensor) -> Tensor:
    """Return how many windows cover each position of an axis, float32 (size,)."""
    counts = torch.zeros(size, device=like.device)
    for begin in begins:
        counts[begin : begin + crop] += 1
    return counts


def as_pieces(bands: Bands, left: int = 0) -> Iterator[Piece]:
    """Yield bands with their places; ``left`` is the column where they begin."""
    top = 0
    for band in bands:
        yield Piece(band, top, left)
        top += band.shape[2]


def sum_maps(maps: Iterable[Bands], height: int) -> Tensor:
    """Return the sum (B, K, H, W) of maps with ``height`` rows that come in bands."""
    total: Tensor | None = None
    for part, top, *_ in chain.from_iterable(map(as_pieces, maps)):
        if total is None:
            total = part.new_zeros(*part.shape[:2], height, part.shape[3])  # (B, K, H, W)
        total[:, :, top : top + part.shape[2]] += part
    assert total is not None
    return total


def sum_bands(maps: Sequence[Bands], height: int) -> Iterator[Tensor]:
    """Yield the sum of maps: a single one as it comes, several as one band of all rows."""
    yield from maps[0] if len(maps) == 1 else [sum_maps(maps, height)]


def resize_bands(
    bands: Bands, height: int, size: tuple[int, int], *, align_corners: bool = True
) -> Iterator[Tensor]:
    """Yield in bands what ``resize`` makes of the first ``height`` rows of a map in bands."""
    below, above, weight = _row_weights(height, size[0], align_corners)
    seen, done, kept = 0, 0, None
    for band in bands:
        part = band[:, :, : height - seen]
        if part.shape[2] == height:
            yield resize(part, size, align_corners=align_corners)
            return
        # Rows of the result lie between two rows, the first of which may end the previous band.
        rows = part.permute(0, 2, 3, 1)  # (B, rows, w, K)
        if kept is not None:
            rows = torch.cat((kept, rows), dim=1)
        seen += part.shape[2]
        start, kept = seen - rows.shape[1], rows[:, -1:].clone()
        ready = int((above < seen).sum())
        if ready > done:
            here = slice(done, ready)
            lower, upper, share = (
                values.to(part.device)
                for values in (below[here] - start, above[here] - start, weight[here])
            )
            mixed = rows[:, lower].lerp_(rows[:, upper], share[:, None, None])
            narrow = mixed.permute(0, 3, 1, 2)  # (B, K, ready - done, w)
            # Bilinear weights are separable: the rows are interpolated, the columns remain.
            yield resize(narrow, (ready - done, size[1]), align_corners=align_corners)
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
