"""Augmentation: albumentations as Sample -> Sample, and our own crop and color jitter."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import albumentations as A
import cv2
import numpy as np

from danet.seeds import mix
from danet.types import Sample, ignore_of

IMAGE_FILL = (124, 116, 104)
"""RGB for padding images: ImageNet's mean, which normalisation maps to about zero."""


def is_rgb(image: np.ndarray) -> bool:
    """Return whether an image (H, W, N) has three bands of 8 bits."""
    return image.dtype == np.uint8 and image.shape[2] == 3


class Pipeline:
    """Applies albumentations transforms to a sample, in order, from one seed.

    The seed is set before every sample, so its augmentation depends on nothing else: not on the
    worker, not on previous samples (albumentations 2.0 by itself repeats draws across workers). The
    names of ``steps`` serve only to override them in a config. For steps after a first ScaleCrop
    images of more than 8 bits are floats in 0.25..0.75.
    """

    def __init__(self, steps: Mapping[str, A.BasicTransform]) -> None:
        every = list(steps.values())
        self.compose = A.Compose(every)
        has_crop = bool(every) and isinstance(every[0], ScaleCrop)
        self._crop, self._others = A.Compose(every[:has_crop]), A.Compose(every[has_crop:])

    def __call__(self, sample: Sample, seed: int, focus: int | None = None) -> Sample:
        """Return the augmented sample; image and mask undergo the same geometry.

        ``focus`` is the class that centred crops show; without one they draw it.
        """
        if sample.image.dtype == np.uint8:
            return _apply(self.compose, sample, seed, focus)
        # Albumentations clips floats to 0..1: meanwhile what was cut lies in the middle half of it.
        cut = _apply(self._crop, sample, seed, focus)
        low = cut.image.min(axis=(0, 1)).astype(np.float32)
        unit = 2 * np.maximum(cut.image.max(axis=(0, 1)) - low, np.finfo(np.float32).tiny)
        scaled = cut._replace(image=(cut.image - low) / unit + 0.25)
        done = _apply(self._others, scaled, mix(seed, 9), focus)
        return done._replace(image=(done.image - 0.25) * unit + low)


def _apply(compose: A.Compose, sample: Sample, seed: int, focus: int | None) -> Sample:
    compose.set_random_seed(seed)
    result = compose(image=sample.image, mask=sample.mask, focus=focus)
    return Sample(result["image"], result["mask"], sample.name)


class ScaleCrop(A.DualTransform):
    """Scales by a random factor and crops a random window, in one step.

    The window is cut from the source and only that piece is resized, at a fraction of the cost of
    scaling the whole image first; the rows of a memory-mapped file outside it are never read. It
    starts at a whole pixel of the source, so all its pixels are interpolated at exact positions.
    A scaled image smaller than the window is padded on the right and at the bottom, as in the
    released code, the image with the ImageNet mean, or the mean of the window of each band if it
    is not RGB of 8 bits; the padding is ignored in the mask.

    Args:
        size: Height and width of the window.
        scale: Range of the factor, uniform; [1, 1] only crops.
        base: Length of the short side of the image at factor 1, in pixels; None for its own.
        centred: Probability that the window is uniform among those that show one random pixel of
            a class: of ``focus``, else of one of the classes in the mask, all equally likely. This
            reads the whole mask. Otherwise, and where the class is not in the mask, the window is
            uniform among all. None for 0.
    """

    def __init__(
        self,
        size: Sequence[int],
        scale: Sequence[float] = (0.5, 2.0),
        base: int | None = None,
        centred: float | None = None,
    ) -> None:
        super().__init__(p=1.0)
        if len(size) != 2 or min(size) < 32:
            raise ValueError(f"size={list(size)} is not [height, width] of at least 32")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale={list(scale)} is not [low, high] with 0 < low <= high")
        if centred is not None and not 0 < centred <= 1:
            raise ValueError(f"centred={centred}: expected a share above 0, at most 1, or null")
        self.size = (int(size[0]), int(size[1]))
        self.scale = (float(scale[0]), float(scale[1]))
        self.base = base
        self.centred = centred

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw the factor and the window; return its rows and its columns."""
        height, width = params["shape"][:2]
        factor = self.py_random.uniform(*self.scale)
        if self.base is not None:
            factor *= self.base / min(height, width)
        row = column = None
        if self.centred and self.py_random.random() < self.centred:
            row, column = self._draw_pixel(data["mask"], data.get("focus"))
        return {
            "down": self._draw_axis(height, factor, self.size[0], row),
            "across": self._draw_axis(width, factor, self.size[1], column),
        }

    def _draw_pixel(self, mask: np.ndarray, focus: int | None) -> tuple[int | None, int | None]:
        """Return row and column of a random pixel of a class; None where there is no such class."""
        ignored = ignore_of(mask)
        if focus is None:
            counts = np.bincount(mask.ravel(), minlength=ignored + 1)[:ignored]
            present = np.flatnonzero(counts).tolist()
            focus = self.py_random.choice(present) if present else ignored
        places = np.flatnonzero(mask == focus) if focus != ignored else ()
        if not len(places):
            return None, None
        row, column = divmod(int(places[self.py_random.randrange(len(places))]), mask.shape[1])
        return row, column

    def _draw_axis(self, source: int, factor: float, length: int, pixel: int | None) -> "_Axis":
        """Draw where the window starts, among the places at which it holds ``pixel`` if given."""
        scaled = max(1, round(source * factor))
        step, length = source / scaled, min(length, scaled)
        low, high = 0, int(source - length * step)
        if pixel is not None:
            high = min(high, pixel)
            # Not above high, since the last window may end within the last pixel.
            low = min(high, max(0, math.ceil(pixel + 1 - length * step)))
        # randint includes its upper bound.
        return _Axis(self.py_random.randint(low, high), step, length)

    def apply(self, img: np.ndarray, down: "_Axis", across: "_Axis", **_: Any) -> np.ndarray:
        """Resample the image bilinearly: (H, W, N) to (*size, N)."""
        piece = img[down.needed(), across.needed()]
        # With a size in place of factors OpenCV would scale by the ratio of rounded sizes.
        scaled = cv2.resize(piece, None, None, 1 / across.step, 1 / down.step, cv2.INTER_LINEAR)
        # OpenCV drops the axis of a single band.
        window = scaled.reshape(*scaled.shape[:2], -1)[: down.length, : across.length]
        if window.shape[:2] == self.size:
            return window
        fill = IMAGE_FILL if is_rgb(img) else window.mean(axis=(0, 1))
        padded = np.full((*self.size, window.shape[2]), fill, window.dtype)
        padded[: down.length, : across.length] = window
        return padded

    def apply_to_mask(
        self, mask: np.ndarray, down: "_Axis", across: "_Axis", **_: Any
    ) -> np.ndarray:
        """Resample the mask by nearest neighbour: (H, W) to the size of the window."""
        window = np.full(self.size, ignore_of(mask), mask.dtype)  # not 0, which is a class
        # In two steps, which copy whole rows; one index for both axes would fetch single pixels.
        rows = mask[down.needed(), across.needed()].take(down.nearest(), axis=0)
        window[: down.length, : across.length] = rows.take(across.nearest(), axis=1)
        return window


class _Axis(NamedTuple):
    """One axis of a window: from its pixels to those of the source."""

    start: int  # source pixel at which the window starts
    step: float  # source pixels per pixel: that of number i lies at start + (i + 0.5) * step - 0.5
    length: int  # pixels of the window inside the image; the others are padding

    def needed(self) -> slice:
        """Return the source pixels of the window, and two more for its last interpolation."""
        return slice(self.start, self.start + math.ceil(self.length * self.step) + 2)

    def nearest(self) -> np.ndarray:
        """Return the nearest pixel of the needed ones for every window pixel, (length,)."""
        # Pixel i of the source covers i to i + 1, so truncation finds the one around a centre.
        return ((np.arange(self.length) + 0.5) * self.step).astype(np.intp)


class ColorJitter(A.ColorJitter):
    """Changes brightness, contrast, saturation and hue by random factors, in one affine map.

    The factors are those of albumentations, but hue is rotated at constant luma instead of HSV's
    constant value. So all four are affine in RGB and commute: their order does not matter, and one
    pass over the pixels with one rounding takes a twentieth of the time of four.

    If it is not RGB of 8 bits, each band's contrast changes around its mean, to which (brightness -
    1) times its standard deviation is added, and nothing else.

    Args:
        brightness, contrast, saturation: Ranges of the factors, uniform; 1 changes nothing.
        hue: Range of the rotation in turns, uniform, within [-0.5, 0.5]; 0 changes nothing.
        p: Probability of any change.
    """

    def apply(
        self,
        img: np.ndarray,
        brightness: float,
        contrast: float,
        saturation: float,
        hue: float,
        order: list[int],
        **_: Any,
    ) -> np.ndarray:
        """Map (H, W, N) to the same shape and type."""
        if not is_rgb(img):
            mean, spread = (of(img, axis=(0, 1), dtype=np.float64) for of in (np.mean, np.std))
            changed = contrast * (img - mean) + mean + (brightness - 1) * spread
            if img.dtype == np.uint8:
                changed = np.rint(changed).clip(0, 255)
            return changed.astype(img.dtype)
        angle = 2 * math.pi * hue
        cosine, sine = saturation * math.cos(angle), saturation * math.sin(angle)
        # Rotates and scales the chroma plane; luma is constant.
        rotation = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
        to_chroma = _LUMA_AND_CHROMA
        matrix = brightness * contrast * (np.linalg.inv(to_chroma) @ rotation @ to_chroma)
        # The mean luma of the source: the rotation does not change it.
        mean = float(to_chroma[0] @ cv2.mean(img)[:3])
        offset = np.full((3, 1), (1 - contrast) * brightness * mean)
        return cv2.transform(img, np.hstack([matrix, offset]))  # rounds and saturates to 0..255


_LUMA_AND_CHROMA = np.array(
    [[0.299, 0.587, 0.114], [1.0, -0.5, -0.5], [0.0, math.sqrt(0.75), -math.sqrt(0.75)]]
)
"""RGB to luma and the chroma plane, with red, green and blue 120 degrees apart."""
