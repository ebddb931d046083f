"""The procedures behind published numbers: the authors' test script, and mmsegmentation's.

They differ from the plain ways of ``danet.evaluation.inference`` in how an image is scaled, where
windows lie and what is averaged; on one network that moves the mean IoU by more than many a paper
claims. Both have the interface of ``Inference``.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danet.errors import InputError
from danet.evaluation.inference import LARGEST_SCALE
from danet.evaluation.sliding_window import (
    PIXELS_PER_PASS,
    Band,
    PixelBudget,
    Windows,
    classes,
    empty_map,
    joined,
    resized,
)
from danet.ops.resize import resize

_LONGEST = 1 << 15
"""Pixels of the long side of a picture, scaled, and of a window."""
_LARGEST = math.log(torch.finfo(torch.float32).max)
"""exp of more is infinite in float32."""
_CLASSES = 256
"""There are no more, see ``danet.types``."""


class AuthorsProtocol:
    """What the test script of the released DANet does (its ``MultiEvalModule``).

    Each scale makes the long side ``ceil(base_size * scale)`` pixels, whatever the image has.
    Windows start every ``int(crop * stride_rate)`` pixels from the top left corner; those that
    reach over the border are filled up with black and count where there is a picture. Where
    windows overlap, the mean is taken of exp(logits), not of probabilities; with ``flip`` of
    exp(logits + logits of the mirror image, mirrored). These scores are resized to the image and
    added up over the scales, so that a scale weighs as much as its network is sure.

    Args:
        base_size: Length of the long side at scale 1.
        crop: Side of the square windows.
        scales: Factors of ``base_size``.
        stride_rate: Step of the windows as a part of ``crop``.
        flip: Whether to look at the mirror image, too; the script always does.
    """

    def __init__(
        self,
        *,
        base_size: int,
        crop: int,
        scales: Sequence[float],
        stride_rate: float,
        flip: bool = True,
    ) -> None:
        if base_size < 32 or crop < 32:
            raise ValueError(f"base_size={base_size} and crop={crop} must be at least 32")
        if max(base_size, crop) > _LONGEST:
            raise ValueError(f"base_size={base_size} and crop={crop} must be at most {_LONGEST}")
        if not scales or not 0 < min(scales) <= max(scales) <= _LONGEST / base_size:
            raise ValueError(
                f"scales={list(scales)} is not a list of positive numbers up to "
                f"{_LONGEST / base_size:g}, by which base_size={base_size} has {_LONGEST} pixels"
            )
        if not 0 < stride_rate <= 1 or int(crop * stride_rate) < 1:
            low = math.ceil(10_000 / crop) / 10_000  # of which a step has a pixel
            raise ValueError(
                f"stride_rate={stride_rate} of crop={crop} is not in 1..crop pixels; expected a "
                f"rate of {low:g} to 1"
            )
        self.base_size, self.crop, self.flip = base_size, crop, flip
        self.scales = tuple(float(scale) for scale in scales)
        self.stride = int(crop * stride_rate)
        windows_per_pixel = math.ceil(crop / self.stride) ** 2
        # Below it, what is added up over windows, scales and classes is finite, too.
        terms = windows_per_pixel * len(self.scales) * _CLASSES
        self.largest = math.floor(_LARGEST - math.log(terms))

    def bands(self, model: nn.Module, image: Tensor) -> Iterator[Band]:
        """Yields the sums of exp(logits) from top to bottom; they have no sum of 1."""
        size = (image.shape[2], image.shape[3])
        maps = (resized(*self._scores(model, image, s), size) for s in self.scales)
        if len(self.scales) == 1:
            return next(maps)
        return iter([Band(0, _sum(maps, size[0]))])

    @torch.no_grad()
    def __call__(self, model: nn.Module, image: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to probabilities (B, K, H, W): the sums, made to add up to 1."""
        scores = joined(self.bands(model, image), image.shape[2])
        return scores / scores.sum(dim=1, keepdim=True)

    @torch.no_grad()
    def predict(self, model: nn.Module, image: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to the classes of the highest score, uint8 (B, H, W)."""
        return classes(self.bands(model, image), image.shape[2])

    def _scores(self, model: nn.Module, image: Tensor, scale: float) -> tuple[Iterator[Band], int]:
        """Returns the scores of the image at one scale, and how many rows they have."""
        height, width = image.shape[-2:]
        long = math.ceil(self.base_size * scale)
        rows, columns = (max(1, int(n * long / max(height, width) + 0.5)) for n in (height, width))
        # Filled up so far that every window is whole: the same pixels as of windows cut short.
        below, right = (self._covered(n) - n for n in (rows, columns))
        filled = F.pad(resize(image.float(), (rows, columns)), (0, right, 0, below))
        windows = Windows((self.crop, self.crop), (self.stride, self.stride))
        bands = windows.bands(lambda part: self._exp(model, part), filled, mirrored=self.flip)
        inside = (
            Band(top, part[:, :, : rows - top, :columns]) for top, part in bands if top < rows
        )
        return inside, rows

    def _covered(self, length: int) -> int:
        """Returns what the windows cover of an axis with ``length`` pixels of picture."""
        beyond = max(length - self.crop, 0)
        return self.crop + math.ceil(beyond / self.stride) * self.stride

    def _exp(self, model: nn.Module, image: Tensor) -> Tensor:
        """Maps windows (B, 3, h, w) to exp(logits), (B, K, h, w).

        Raises:
            InputError: They or their sums could be infinite, which the script does not look at.
        """
        logits = _logits(model, image)
        if self.flip:
            logits = logits + _logits(model, image.flip(-1)).flip(-1)
        if (largest := float(logits.max())) > self.largest:
            raise InputError(
                f"evaluation: a sum of logits is {largest:.0f}, and the authors' script adds up "
                f"its exponentials, which can be infinite above {self.largest} in float32; take "
                "evaluation=multi_scale, which averages probabilities"
            )
        return logits.exp_()


class MMSegProtocol:
    """What mmsegmentation's test loop and its test-time augmentation do (release 1.2).

    An image is resized as bytes, without aligned corners. Logits are averaged where windows
    overlap, and resized to the image; with several ratios or mirror images the softmax of each
    pass is taken there, and their mean.

    Args:
        scale: Longest and shortest side (2048, 512) that an image is made to fit, keeping its
            aspect; None leaves its size.
        ratios: Factors of that.
        flip: Whether every ratio has a pass of the mirror image, too.
        crop, stride: Height and width of windows and their step; None passes images whole.
        align_corners: How logits are resized; None as the network has it.
        max_pixels: As in Whole, of a resized image that passes whole.
    """

    def __init__(
        self,
        *,
        scale: Sequence[int] | None = None,
        ratios: Sequence[float] = (1.0,),
        flip: bool = False,
        crop: Sequence[int] | None = None,
        stride: Sequence[int] | None = None,
        align_corners: bool | None = None,
        max_pixels: int = 2**23,
    ) -> None:
        if scale is not None and (len(scale) != 2 or min(scale) < 32):
            raise ValueError(f"scale={list(scale)} is not [long, short] of at least 32")
        most = _LONGEST / max(scale) if scale else LARGEST_SCALE
        if not ratios or not 0 < min(ratios) <= max(ratios) <= most:
            raise ValueError(
                f"ratios={list(ratios)} is not a list of positive numbers up to {most:g}"
            )
        if (crop is None) != (stride is None):
            raise ValueError(f"crop={crop} and stride={stride}: give both, or neither")
        if crop is not None and (len(crop) != 2 or min(crop) < 32):
            raise ValueError(f"crop={list(crop)} is not [height, width] of at least 32")
        if crop and stride and not all(1 <= s <= c for s, c in zip(stride, crop, strict=True)):
            raise ValueError(f"stride={list(stride)} is not in 1..crop={list(crop)}")
        self.box = (max(scale), min(scale)) if scale else None
        self.ratios = tuple(float(ratio) for ratio in ratios)
        self.mirrored = (False, True) if flip else (False,)
        self.align_corners = align_corners
        self._budget = PixelBudget(max_pixels)
        self._windows = None
        if crop and stride:
            self._windows = Windows((crop[0], crop[1]), (stride[0], stride[1]))

    def bands(self, model: nn.Module, image: Tensor) -> Iterator[Band]:
        """Yields the probabilities from top to bottom."""
        maps = (self._pass(model, image, r, m) for r in self.ratios for m in self.mirrored)
        count = len(self.ratios) * len(self.mirrored)
        if count == 1:
            return next(maps)
        return iter([Band(0, _sum(maps, image.shape[2]).div_(count))])

    @torch.no_grad()
    def __call__(self, model: nn.Module, image: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to probabilities (B, K, H, W)."""
        return joined(self.bands(model, image), image.shape[2])

    @torch.no_grad()
    def predict(self, model: nn.Module, image: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to the most probable classes, uint8 (B, H, W)."""
        return classes(self.bands(model, image), image.shape[2])

    def _pass(
        self, model: nn.Module, image: Tensor, ratio: float, mirrored: bool
    ) -> Iterator[Band]:
        """Yields the probabilities that one ratio gives, at the size of the image."""
        size = (image.shape[2], image.shape[3])
        rows, columns = self._scaled(*size, ratio)
        scaled = image
        if (rows, columns) != size:
            scaled = resize(image.float(), (rows, columns), align_corners=False).round_()
        scaled = scaled.flip(-1) if mirrored else scaled
        windows = self._windows or self._budget.windows(scaled)
        if windows is None:
            logits = iter([Band(0, _logits(model, scaled))])
        else:
            logits = windows.bands(lambda part: _logits(model, part), scaled)
        is_aligned = self.align_corners
        if is_aligned is None:
            is_aligned = bool(model.align_corners)
        for top, part in resized(logits, rows, size, align_corners=is_aligned):
            yield Band(top, (part.flip(-1) if mirrored else part).softmax(dim=1))

    def _scaled(self, height: int, width: int, ratio: float) -> tuple[int, int]:
        """Returns the size of an image at a ratio, rounded as that toolbox rounds."""
        factor = ratio
        if self.box is not None:
            long, short = (int(side * ratio) for side in self.box)
            factor = min(long / max(height, width), short / min(height, width))
        return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def _logits(model: nn.Module, image: Tensor) -> Tensor:
    """Returns float32 logits (B, K, h, w) of images that pass together as far as they may."""
    pixels = image.shape[0] * image.shape[2] * image.shape[3]
    if image.shape[0] > 1 and pixels > PIXELS_PER_PASS:
        return torch.cat([_logits(model, one) for one in image.split(1)])
    logits: Tensor = model(image).logits.float()
    return logits


def _sum(maps: Iterator[Iterator[Band]], height: int) -> Tensor:
    """Adds up maps of the size of an image that come in bands."""
    total: Tensor | None = None
    for bands in maps:
        for top, part in bands:
            if total is None:
                total = empty_map(part, height, part.shape[3]).zero_()
            total[:, :, top : top + part.shape[2]] += part
    assert total is not None
    return total
