"""The procedures behind published numbers: the authors' test script, and mmsegmentation's.

They differ from the modes of ``danet.evaluation.inference`` in how an image is scaled, where
windows lie and what is averaged; on one network that changes the mean IoU by more than many a paper
claims. Both have the interface of ``Inference``.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danet.errors import InputError
from danet.evaluation.base import BandInference, Precision
from danet.evaluation.inference import LARGEST_SCALE, require_factors
from danet.evaluation.sliding_window import (
    PIXELS_PER_PASS,
    Band,
    PixelBudget,
    Windows,
    optional_windows,
    resize_bands,
    sum_maps,
)
from danet.ops.resize import resize

_MAX_SIDE = 1 << 15
"""Pixels of the long side of a scaled image, and of a window."""
_MAX_EXPONENT = math.log(torch.finfo(torch.float32).max)
"""exp of more is infinite in float32."""
_CLASSES = 256
"""An upper bound, see ``danet.types``."""


class AuthorsProtocol(BandInference):
    """The procedure of the released DANet's test script (its ``MultiEvalModule``).

    Each scale makes the long side ``ceil(base_size * scale)`` pixels, whatever the image has.
    Windows start every ``int(crop * stride_rate)`` pixels from the top left corner; those that
    reach over the border are padded with black, and the padding is not counted. Where windows
    overlap, the mean is taken of exp(logits), not of probabilities; with ``flip`` of
    exp(logits + logits of the mirror image, mirrored). These scores are resized to the image and
    summed over the scales, so that a scale weighs more where the logits are larger.

    Args:
        base_size: Length of the long side at scale 1.
        crop: Side of the square windows.
        scales: Factors of ``base_size``.
        stride_rate: Step of the windows as a part of ``crop``.
        flip: Whether to run the mirror image, too; the script always does.
        precision: As in Whole.
    """

    def __init__(
        self,
        *,
        base_size: int,
        crop: int,
        scales: Sequence[float],
        stride_rate: float,
        flip: bool = True,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(precision)
        if base_size < 32 or crop < 32:
            raise ValueError(f"base_size={base_size} and crop={crop} must be at least 32")
        if max(base_size, crop) > _MAX_SIDE:
            raise ValueError(f"base_size={base_size} and crop={crop} must be at most {_MAX_SIDE}")
        why = f", by which base_size={base_size} has {_MAX_SIDE} pixels"
        require_factors("scales", scales, _MAX_SIDE / base_size, why)
        if not 0 < stride_rate <= 1 or int(crop * stride_rate) < 1:
            low = math.ceil(10_000 / crop) / 10_000  # a stride of one pixel, rounded up
            raise ValueError(
                f"stride_rate={stride_rate} of crop={crop} is not in 1..crop pixels; expected a "
                f"rate of {low:g} to 1"
            )
        self.base_size, self.crop, self.flip = base_size, crop, flip
        self.scales = tuple(float(scale) for scale in scales)
        self.stride = int(crop * stride_rate)
        windows_per_pixel = math.ceil(crop / self.stride) ** 2
        # Below it, the sum over windows, scales and classes is finite, too.
        terms = windows_per_pixel * len(self.scales) * _CLASSES
        self.largest = math.floor(_MAX_EXPONENT - math.log(terms))

    def bands(self, model: nn.Module, image: Tensor) -> Iterator[Band]:
        """Yield the sums of exp(logits) from top to bottom, which do not add up to 1."""
        size = (image.shape[2], image.shape[3])
        maps = (resize_bands(*self._scores(model, image, s), size) for s in self.scales)
        if len(self.scales) == 1:
            return next(maps)
        return iter([Band(0, sum_maps(maps, size[0]))])

    def __call__(self, model: nn.Module, image: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to probabilities (B, K, H, W): the sums, divided by their total."""
        scores = super().__call__(model, image)
        return scores / scores.sum(dim=1, keepdim=True)  # (B, K, H, W)

    def _scores(self, model: nn.Module, image: Tensor, scale: float) -> tuple[Iterator[Band], int]:
        """Return the scores of the image at one scale, and how many rows they have."""
        height, width = image.shape[-2:]
        long = math.ceil(self.base_size * scale)
        rows, columns = (max(1, int(n * long / max(height, width) + 0.5)) for n in (height, width))
        # One padding for all windows: the script pads each, which gives the same pixels.
        below, right = (
            self.crop + math.ceil(max(n - self.crop, 0) / self.stride) * self.stride - n
            for n in (rows, columns)
        )
        padded = F.pad(resize(image.float(), (rows, columns)), (0, right, 0, below))
        windows = Windows((self.crop, self.crop), (self.stride, self.stride), mirrored=self.flip)
        bands = windows.bands(lambda part: self._exp_logits(model, part), padded)
        inside = (  # (B, K, up to rows - top, columns) each
            Band(top, part[:, :, : rows - top, :columns]) for top, part in bands if top < rows
        )
        return inside, rows

    def _exp_logits(self, model: nn.Module, image: Tensor) -> Tensor:
        """Compute exp(logits), (B, K, h, w), of windows (B, 3, h, w).

        Raises:
            InputError: They or their sums could be infinite, which the script does not check.
        """
        logits = _logits(self, model, image)
        if self.flip:
            # Summed before exp: the product of both scores, not their mean.
            logits = logits + _logits(self, model, image.flip(-1)).flip(-1)  # (B, K, h, w)
        # The largest logit is read at every pass, at the cost of a wait for the device.
        if (largest := float(logits.max())) > self.largest:
            raise InputError(
                f"evaluation: a sum of logits is {largest:.0f}, and the authors' script adds up "
                f"its exponentials, which can be infinite above {self.largest} in float32; take "
                "evaluation=multi_scale, which averages probabilities"
            )
        return logits.exp_()


class MMSegProtocol(BandInference):
    """The procedure of mmsegmentation's test loop and test-time augmentation (release 1.2).

    An image is resized as bytes, without aligned corners. Logits are averaged where windows
    overlap, and resized to the image; with several ratios or mirror images the softmax of each
    pass is taken there, and their mean.

    Args:
        scale: Longest and shortest side (2048, 512) that an image is resized to fit, keeping its
            aspect ratio; None leaves its size.
        ratios: Factors of that.
        flip: Whether every ratio has a pass of the mirror image, too.
        crop, stride: Height and width of windows and their step; None passes images whole.
        align_corners: How logits are resized; None follows the network.
        max_pixels: As in Whole, of a resized image that passes whole.
        precision: As in Whole.
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
        precision: Precision = "float32",
    ) -> None:
        super().__init__(precision)
        if scale is not None and (len(scale) != 2 or min(scale) < 32):
            raise ValueError(f"scale={list(scale)} is not [long, short] of at least 32")
        require_factors("ratios", ratios, _MAX_SIDE / max(scale) if scale else LARGEST_SCALE)
        self.box = (max(scale), min(scale)) if scale else None
        self.ratios = tuple(float(ratio) for ratio in ratios)
        self.mirrored = (False, True) if flip else (False,)
        self.align_corners = align_corners
        self._budget = PixelBudget(max_pixels)
        self._windows = optional_windows(crop, stride)

    def bands(self, model: nn.Module, image: Tensor) -> Iterator[Band]:
        """Yield the probabilities from top to bottom."""
        maps = (self._pass(model, image, r, m) for r in self.ratios for m in self.mirrored)
        count = len(self.ratios) * len(self.mirrored)
        if count == 1:
            return next(maps)
        return iter([Band(0, sum_maps(maps, image.shape[2]).div_(count))])

    def _pass(
        self, model: nn.Module, image: Tensor, ratio: float, mirrored: bool
    ) -> Iterator[Band]:
        """Yield the probabilities of one ratio at the size of the image."""
        size = (image.shape[2], image.shape[3])
        rows, columns = self._scaled_size(*size, ratio)
        scaled = image
        if (rows, columns) != size:
            # The toolbox resizes with OpenCV, whose results are bytes.
            scaled = resize(image.float(), (rows, columns), align_corners=False).round_()
        scaled = scaled.flip(-1) if mirrored else scaled
        windows = self._windows or self._budget.windows(scaled)
        infer = partial(_logits, self, model)
        logits = windows.bands(infer, scaled) if windows else iter([Band(0, infer(scaled))])
        is_aligned = self.align_corners
        if is_aligned is None:
            is_aligned = bool(model.align_corners)
        for top, part in resize_bands(logits, rows, size, align_corners=is_aligned):
            yield Band(top, (part.flip(-1) if mirrored else part).softmax(dim=1))

    def _scaled_size(self, height: int, width: int, ratio: float) -> tuple[int, int]:
        """Return the size of an image at a ratio, rounded as by the toolbox."""
        factor = ratio
        if self.box is not None:
            # Cut to whole pixels first, so the factor may be a little below the ratio.
            long, short = (int(side * ratio) for side in self.box)
            factor = min(long / max(height, width), short / min(height, width))
        return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def _logits(mode: BandInference, model: nn.Module, image: Tensor) -> Tensor:
    """Compute ``mode.logits``, one by one for images with too many pixels for a pass together."""
    pixels = image.shape[0] * image.shape[2] * image.shape[3]
    parts = image.split(1 if pixels > PIXELS_PER_PASS else image.shape[0])
    return torch.cat([mode.logits(model, part) for part in parts])  # (B, K, h, w)
