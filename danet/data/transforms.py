"""Augmentation: albumentations behind Sample -> Sample, and our own scale-and-crop."""

from collections.abc import Mapping, Sequence
from typing import Any

import albumentations as A
import cv2
import numpy as np

from danet.types import IGNORE, Sample

IMAGE_FILL = (124, 116, 104)
"""RGB that is put around images: ImageNet's mean, so that the network sees about zero."""


class Pipeline:
    """Runs albumentations transforms over a sample, in order, from one seed.

    The seed is set before every sample, so what happens to a sample depends on nothing else: not on
    the worker, not on what came before (albumentations 2.0 alone repeats draws across workers).

    Args:
        steps: Transforms by name; the names serve only to override them in a config.
    """

    def __init__(self, steps: Mapping[str, A.BasicTransform]) -> None:
        self.compose = A.Compose(list(steps.values()))

    def __call__(self, sample: Sample, seed: int) -> Sample:
        """Returns a sample whose image and mask went through the same geometry."""
        self.compose.set_random_seed(seed)
        result = self.compose(image=sample.image, mask=sample.mask)
        return Sample(result["image"], result["mask"], sample.name)


class ScaleCrop(A.DualTransform):
    """Scales by a random factor and cuts a random window, in one move.

    The window is chosen in the scaled frame and only its pixels are computed, which gives the same
    windows as scaling the whole picture first at a fraction of the cost. Where the scaled picture
    is smaller than the window it is padded on the right and at the bottom, the image with the
    ImageNet mean and the mask with IGNORE (the released code pads there too).

    Args:
        size: Height and width of the window.
        scale: Range of the factor, uniform; [1, 1] only crops.
        base: Length of the short side of the picture at factor 1, in pixels; None for its own.
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

    def get_transform_init_args_names(self) -> tuple[str, ...]:
        """Returns the arguments that albumentations prints."""
        return ("size", "scale", "base")

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draws the factor and the window; returns them as one affine map."""
        height, width = params["shape"][:2]
        factor = self.py_random.uniform(*self.scale)
        if self.base is not None:
            factor *= self.base / min(height, width)
        rows, columns = max(1, round(height * factor)), max(1, round(width * factor))
        top = self.py_random.randint(0, max(0, rows - self.size[0]))
        left = self.py_random.randint(0, max(0, columns - self.size[1]))
        return {
            "matrix": _window(height / rows, width / columns, top, left),
            "covered": (rows - top, columns - left),
        }

    def apply(
        self, img: np.ndarray, matrix: np.ndarray, covered: tuple[int, int], **_: Any
    ) -> np.ndarray:
        """Resamples the image bilinearly."""
        return self._warp(img, matrix, covered, cv2.INTER_LINEAR, IMAGE_FILL)

    def apply_to_mask(
        self, mask: np.ndarray, matrix: np.ndarray, covered: tuple[int, int], **_: Any
    ) -> np.ndarray:
        """Resamples the mask by nearest neighbour."""
        return self._warp(mask, matrix, covered, cv2.INTER_NEAREST, (IGNORE,))

    def _warp(
        self,
        array: np.ndarray,
        matrix: np.ndarray,
        covered: tuple[int, int],
        how: int,
        fill: tuple[int, ...],
    ) -> np.ndarray:
        """Cuts the window; ``covered`` is the height and width of it that has a picture."""
        # The border is repeated, as in resizing; a constant would be mixed into the outer pixels.
        window = cv2.warpAffine(
            array,
            matrix,
            (self.size[1], self.size[0]),
            flags=how | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        window[covered[0] :] = fill
        window[:, covered[1] :] = fill
        return window


def _window(step_y: float, step_x: float, top: int, left: int) -> np.ndarray:
    """Returns the map from window pixels to source pixels, (2, 3), for half-pixel centres."""
    return np.array(
        [
            [step_x, 0.0, (left + 0.5) * step_x - 0.5],
            [0.0, step_y, (top + 0.5) * step_y - 0.5],
        ]
    )
