"""Augmentation: albumentations as Sample -> Sample, and our own crop and color jitter."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import albumentations as A
import cv2
import numpy as np

from danet.types import IGNORE, Sample

IMAGE_FILL = (124, 116, 104)
"""RGB for padding images: ImageNet's mean, which normalisation maps to about zero."""


_REACH, _TOLERANCE = 128, 1 / 64
"""How far before a window, and how precisely, an aligned source pixel is searched."""


class Pipeline:
    """Applies albumentations transforms to a sample, in order, from one seed.

    The seed is set before every sample, so its augmentation depends on nothing else: not on the
    worker, not on previous samples (albumentations 2.0 by itself repeats draws across workers).

    Args:
        steps: Transforms by name; the names serve only to override them in a config.
    """

    def __init__(self, steps: Mapping[str, A.BasicTransform]) -> None:
        self.compose = A.Compose(list(steps.values()))

    def __call__(self, sample: Sample, seed: int) -> Sample:
        """Return the augmented sample; image and mask undergo the same geometry."""
        self.compose.set_random_seed(seed)
        result = self.compose(image=sample.image, mask=sample.mask)
        return Sample(result["image"], result["mask"], sample.name)


class ScaleCrop(A.DualTransform):
    """Scales by a random factor and crops a random window, in one step.

    The window is chosen in the scaled frame, cut from the source, and only that piece is resized:
    the windows are those of scaling the whole image first, at a fraction of the cost, and the rows
    of a memory-mapped file outside the window are never read. A scaled image smaller than the
    window is padded on the right and at the bottom, as in the released code, the image with the
    ImageNet mean and the mask with IGNORE.

    Image pixels are interpolated bilinearly at the same points as in scaling the whole image, to
    within 1/64 of a source pixel (see ``_Axis.aligned``). Mask pixels are exactly the nearest ones
    of the source.

    Args:
        size: Height and width of the window.
        scale: Range of the factor, uniform; [1, 1] only crops.
        base: Length of the short side of the image at factor 1, in pixels; None for its own.
    """

    def __init__(
        self,
        size: Sequence[int],
        scale: Sequence[float] = (0.5, 2.0),
        base: int | None = None,
    ) -> None:
        super().__init__(p=1.0)
        if len(size) != 2 or min(size) < 32:
            raise ValueError(f"size={list(size)} is not [height, width] of at least 32")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale={list(scale)} is not [low, high] with 0 < low <= high")
        self.size = (int(size[0]), int(size[1]))
        self.scale = (float(scale[0]), float(scale[1]))
        self.base = base

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw the factor and the window; return its rows and its columns."""
        height, width = params["shape"][:2]
        factor = self.py_random.uniform(*self.scale)
        if self.base is not None:
            factor *= self.base / min(height, width)
        rows, columns = max(1, round(height * factor)), max(1, round(width * factor))
        # randint includes its upper bound. A smaller image stays at the top left.
        top = self.py_random.randint(0, max(0, rows - self.size[0]))
        left = self.py_random.randint(0, max(0, columns - self.size[1]))
        return {
            "down": _Axis(height, rows, top, min(self.size[0], rows - top)),
            "across": _Axis(width, columns, left, min(self.size[1], columns - left)),
        }

    def apply(self, img: np.ndarray, down: "_Axis", across: "_Axis", **_: Any) -> np.ndarray:
        """Resample the image bilinearly: uint8 (H, W, 3) to (*size, 3)."""
        skip_y, skip_x = down.aligned(), across.aligned()
        if skip_y is None or skip_x is None:
            window = _warp(img, down, across)
        else:
            piece = img[down.needed(skip_y), across.needed(skip_x)]
            # With a size in place of factors OpenCV would scale by the ratio of rounded sizes.
            fx, fy = 1 / across.step, 1 / down.step
            scaled = cv2.resize(piece, None, None, fx, fy, cv2.INTER_LINEAR)
            window = scaled[skip_y : skip_y + down.length, skip_x : skip_x + across.length]
        if window.shape[:2] == self.size:
            return window
        below, right = self.size[0] - down.length, self.size[1] - across.length
        return cv2.copyMakeBorder(window, 0, below, 0, right, cv2.BORDER_CONSTANT, value=IMAGE_FILL)

    def apply_to_mask(
        self, mask: np.ndarray, down: "_Axis", across: "_Axis", **_: Any
    ) -> np.ndarray:
        """Resample the mask by nearest neighbour: uint8 (H, W) to the size of the window."""
        rows, columns = down.nearest(), across.nearest()  # (down.length,), (across.length,)
        # In two steps, which copy whole rows; one index for both axes would fetch single pixels.
        cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        window = cut.take(rows - rows[0], axis=0).take(columns - columns[0], axis=1)
        if window.shape == self.size:
            return window
        # IGNORE, not 0, which is a class.
        padded = np.full(self.size, IGNORE, mask.dtype)
        padded[: down.length, : across.length] = window
        return padded


class _Axis(NamedTuple):
    """One axis of a window: from its pixels to those of the source."""

    source: int
    """Pixels of the source."""
    scaled: int
    """Pixels of the source after scaling."""
    start: int
    """First pixel of the window, in the scaled frame."""
    length: int
    """Pixels of the window inside the image; the others are padding."""

    @property
    def step(self) -> float:
        """Source pixels per scaled pixel; scaled pixel i lies at (i + 0.5) * step - 0.5."""
        return self.source / self.scaled

    def nearest(self) -> np.ndarray:
        """Return the nearest source pixel of every window pixel, (length,)."""
        # Pixel i of the source covers i to i + 1, so truncation finds the one around a centre.
        centers = (np.arange(self.start, self.start + self.length) + 0.5) * self.step
        return np.minimum(centers.astype(np.intp), self.source - 1)

    def aligned(self) -> int | None:
        """Return the number of pixels before the window at which an aligned piece can start.

        A piece starts at a whole source pixel, so resizing it samples the right points only if the
        scaled pixel there starts at one. Some pixel shortly before the window nearly always does,
        to within 1/64: half of the 1/32 to which OpenCV rounds the coordinates of an affine map.

        Returns:
            The number of pixels; None if no pixel within reach is aligned.
        """
        back = np.arange(min(self.start, _REACH) + 1)
        origin = (self.start - back) * self.step
        whole = np.rint(origin)
        # Before the centre of the first pixel the piece would repeat its edge, which is right only
        # at the edge of the image.
        inside = (whole == 0) | ((back + 0.5) * self.step >= 0.5)
        fits = (abs(origin - whole) <= _TOLERANCE) & inside
        first = int(fits.argmax())  # 0 as well if none fits
        return first if fits[first] else None

    def needed(self, skip: int) -> slice:
        """Return the source pixels of a piece that starts ``skip`` pixels before the window."""
        first = round((self.start - skip) * self.step)
        # Two more, for the second pixel of the last interpolation and for rounding.
        last = first + math.ceil((skip + self.length) * self.step) + 2
        return slice(first, min(last, self.source))


def _warp(image: np.ndarray, down: _Axis, across: _Axis) -> np.ndarray:
    """Crop the window by an affine map: at any position, for several times the cost of resizing."""
    # Only the source pixels of the window, with a margin for the interpolation.
    first_row = max(math.floor(down.start * down.step) - 1, 0)
    first_column = max(math.floor(across.start * across.step) - 1, 0)
    piece = image[
        first_row : math.ceil((down.start + down.length) * down.step) + 2,
        first_column : math.ceil((across.start + across.length) * across.step) + 2,
    ]
    # From the window to the piece, in coordinates of pixel centres.
    matrix = np.array(
        [
            [across.step, 0.0, (across.start + 0.5) * across.step - 0.5 - first_column],
            [0.0, down.step, (down.start + 0.5) * down.step - 0.5 - first_row],
        ]
    )
    # Replicated, as in resizing; a constant border would be mixed into the outer pixels.
    return cv2.warpAffine(
        piece,
        matrix,
        (across.length, down.length),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


class ColorJitter(A.ImageOnlyTransform):
    """Changes brightness, contrast, saturation and hue by random factors, in one affine map.

    The factor of brightness scales RGB, that of contrast the distance to the mean luma of the
    image, that of saturation the distance to the luma of the pixel, as in torchvision and
    albumentations. Hue is rotated by the same angle as there, but at constant luma instead of HSV's
    constant value. So all four are affine in RGB and commute: no order is drawn, and one pass over
    the pixels with one rounding takes a seventh of the time of four.

    Args:
        brightness, contrast, saturation: Ranges of the factors, uniform; 1 changes nothing.
        hue: Range of the rotation in turns, uniform, within [-0.5, 0.5]; 0 changes nothing.
        p: Probability of any change.
    """

    def __init__(
        self,
        brightness: Sequence[float] = (0.7, 1.3),
        contrast: Sequence[float] = (0.7, 1.3),
        saturation: Sequence[float] = (0.7, 1.3),
        hue: Sequence[float] = (-0.05, 0.05),
        p: float = 0.5,
    ) -> None:
        super().__init__(p=p)
        self.brightness = _range("brightness", brightness, 0.0, math.inf)
        self.contrast = _range("contrast", contrast, 0.0, math.inf)
        self.saturation = _range("saturation", saturation, 0.0, math.inf)
        self.hue = _range("hue", hue, -0.5, 0.5)

    def get_params(self) -> dict[str, Any]:
        """Draw the four factors."""
        names = ("brightness", "contrast", "saturation", "hue")
        return {name: self.py_random.uniform(*getattr(self, name)) for name in names}

    def apply(
        self,
        img: np.ndarray,
        brightness: float = 1.0,
        contrast: float = 1.0,
        saturation: float = 1.0,
        hue: float = 0.0,
        **_: Any,
    ) -> np.ndarray:
        """Maps uint8 (H, W, 3) to the same shape."""
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


def _range(name: str, values: Sequence[float], low: float, high: float) -> tuple[float, float]:
    if len(values) != 2 or not low <= values[0] <= values[1] <= high:
        limits = f"{low:g} <= low <= high" + (f" <= {high:g}" if high < math.inf else "")
        raise ValueError(f"{name}={list(values)} is not [low, high] with {limits}")
    return float(values[0]), float(values[1])
