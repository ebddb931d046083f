"""The procedures behind published numbers: the authors' test script, and mmsegmentation's.

They differ from the modes of ``danet.evaluation.inference`` in how an image is scaled, where
windows lie and what is averaged; on one network that changes the mean IoU by more than many a paper
claims. Both are modes, too; arguments that are not described here are those of ``inference``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from danet.errors import InputError
from danet.evaluation.evaluate import Inference
from danet.evaluation.inference import LARGEST_SCALE, require_factors
from danet.evaluation.sliding_window import Windows, resize_bands, sum_bands
from danet.ops.resize import resize

_MAX_SIDE = 1 << 15  # pixels of the long side of a scaled image, and of a window


@dataclass(kw_only=True, eq=False)
class AuthorsProtocol(Inference):
    """The procedure of the released DANet's test script (its ``MultiEvalModule``).

    Each scale makes the long side ``ceil(base_size * scale)`` pixels, whatever the image has.
    Windows start every ``int(crop * stride_rate)`` pixels from the top left corner; those that
    reach over the border are padded with black, and the padding is not counted. Where windows
    overlap, the mean is taken of exp(logits), not of probabilities; with ``flip`` of
    exp(logits + logits of the mirror image, mirrored). These scores are resized to the image and
    summed over the scales, so that a scale weighs more where the logits are larger.
    """

    base_size: int  # length of the long side at scale 1
    crop: int  # side of the square windows
    scales: Sequence[float]  # factors of ``base_size``
    stride_rate: float  # step of the windows as a part of ``crop``
    flip: bool = True  # run the mirror image, too; the script always does

    def __post_init__(self) -> None:
        super().__post_init__()
        crop, rate = self.crop, self.stride_rate
        for name, side in (("base_size", self.base_size), ("crop", crop)):
            if not 32 <= side <= _MAX_SIDE:
                raise ValueError(f"{name}={side} is not in 32..{_MAX_SIDE}")
        require_factors("scales", self.scales, _MAX_SIDE / self.base_size)
        if not 0 < rate <= 1 or int(crop * rate) < 1:
            low = math.ceil(10_000 / crop) / 10_000  # a stride of one pixel, rounded up
            raise ValueError(f"stride_rate={rate}: expected a rate of {low:g} to 1")
        self.stride = int(crop * rate)
        self.windows = Windows((crop, crop), (self.stride, self.stride), mirrored=self.flip)

    def bands(self, model: nn.Module, image: Tensor) -> Iterator[Tensor]:
        """Yield the sums of exp(logits) from top to bottom, which do not add up to 1.

        Raises InputError if a sum is infinite, which the script does not check.
        """
        maps = [self._at_scale(model, image, scale) for scale in self.scales]
        for part in sum_bands(maps, image.shape[2]):
            if not part.max().isfinite():  # a wait for the device
                raise InputError(
                    "evaluation: sums of exp(logits), as in the authors' script, are not finite in "
                    "float32; take evaluation=multi_scale, which averages probabilities"
                )
            yield part

    def __call__(self, model: nn.Module, image: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to probabilities (B, K, H, W): the sums, divided by their total."""
        scores = super().__call__(model, image)
        return scores / scores.sum(dim=1, keepdim=True)  # (B, K, H, W)

    def _at_scale(self, model: nn.Module, image: Tensor, scale: float) -> Iterator[Tensor]:
        """Yield the scores at one scale, at the size of the image."""
        height, width = image.shape[-2:]
        long = math.ceil(self.base_size * scale)
        rows, columns = (max(1, int(n * long / max(height, width) + 0.5)) for n in (height, width))
        # One padding for all windows: the script pads each, which gives the same pixels.
        below, right = (
            self.crop + math.ceil(max(n - self.crop, 0) / self.stride) * self.stride - n
            for n in (rows, columns)
        )
        padded = F.pad(resize(image.float(), (rows, columns)), (0, right, 0, below))
        bands = self.windows.bands(partial(self._exp_logits, model), padded)
        inside = (part[..., :columns] for part in bands)  # rows of padding are cut off below
        yield from resize_bands(inside, rows, (height, width))

    def _exp_logits(self, model: nn.Module, image: Tensor) -> Tensor:
        """Compute exp(logits), (B, K, h, w), of windows (B, 3, h, w)."""
        logits = self.logits(model, image)
        if self.flip:
            # Summed before exp: the product of both scores, not their mean.
            logits = logits + self.logits(model, image.flip(-1)).flip(-1)
        return logits.exp_()


@dataclass(kw_only=True, eq=False)
class MMSegProtocol(Inference):
    """The procedure of mmsegmentation's test loop and test-time augmentation (release 1.2).

    An image is resized as bytes, without aligned corners. Logits are averaged where windows
    overlap, and resized to the image; with several ratios or mirror images the softmax of each
    pass is taken there, and their mean.
    """

    # Longest and shortest side, (2048, 512), that an image is resized to fit, keeping its aspect
    # ratio; None leaves its size.
    scale: Sequence[int] | None = None
    ratios: Sequence[float] = (1.0,)  # factors of that
    flip: bool = False  # every ratio has a pass of the mirror image, too
    crop: Sequence[int] | None = None  # without it and ``stride`` images pass whole
    stride: Sequence[int] | None = None
    align_corners: bool | None = None  # how logits are resized; None follows the network
    max_pixels: int = 2**23  # of a resized image that passes whole

    def __post_init__(self) -> None:
        super().__post_init__()
        scale = self.scale
        if scale is not None and (len(scale) != 2 or min(scale) < 32):
            raise ValueError(f"scale={list(scale)} is not [long, short] of at least 32")
        largest = _MAX_SIDE / max(scale) if scale else LARGEST_SCALE
        require_factors("ratios", self.ratios, largest)
        self.box = (max(scale), min(scale)) if scale else None
        self.mirrored = (False, True) if self.flip else (False,)
        self.windows = Windows(self.crop, self.stride, max_pixels=self.max_pixels)

    def bands(self, model: nn.Module, image: Tensor) -> Iterator[Tensor]:
        """Yield the probabilities from top to bottom, (B, K, rows, W) each."""
        maps = [self._pass(model, image, r, m) for r in self.ratios for m in self.mirrored]
        for part in sum_bands(maps, image.shape[2]):
            yield part.div_(len(maps))

    def _pass(
        self, model: nn.Module, image: Tensor, ratio: float, mirrored: bool
    ) -> Iterator[Tensor]:
        """Yield the probabilities of one ratio at the size of the image."""
        size = (image.shape[2], image.shape[3])
        rows, columns = self._scaled_size(*size, ratio)
        scaled = image
        if (rows, columns) != size:
            # The toolbox resizes with OpenCV, whose results are bytes.
            scaled = resize(image.float(), (rows, columns), align_corners=False).round_()
        scaled = scaled.flip(-1) if mirrored else scaled
        logits = self.windows.bands(partial(self.logits, model), scaled)
        given = self.align_corners
        is_aligned = bool(model.align_corners if given is None else given)
        for part in resize_bands(logits, rows, size, align_corners=is_aligned):
            yield (part.flip(-1) if mirrored else part).softmax(dim=1)

    def _scaled_size(self, height: int, width: int, ratio: float) -> tuple[int, int]:
        """Return the size of an image at a ratio, rounded as by the toolbox."""
        factor = ratio
        if self.box is not None:
            # Cut to whole pixels first, so the factor may be a little below the ratio.
            long, short = (int(side * ratio) for side in self.box)
            factor = min(long / max(height, width), short / min(height, width))
        return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
