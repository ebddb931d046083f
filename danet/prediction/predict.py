"""Prediction of pictures: of a list by ``predict``, of a stream by ``predictions``."""

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from danet.datasets.image_io import read_image, to_rgb
from danet.errors import InputError
from danet.evaluation.base import Inference
from danet.evaluation.inference import Whole
from danet.evaluation.sliding_window import PIXELS_PER_PASS

AnyImage = str | Path | np.ndarray | Tensor | Image.Image
"""A path; uint8 (H, W, 3) RGB or (H, W) grey; a uint8 tensor (3, H, W) RGB; a Pillow image."""


class HasImage(Protocol):
    """The interface of the pictures of ``predictions``."""

    @property
    def image(self) -> np.ndarray:
        """The picture, uint8 (H, W, 3), RGB."""


T = TypeVar("T", bound=HasImage)


class _ArrayImage(NamedTuple):
    image: np.ndarray


@overload
def predict(
    model: nn.Module, images: AnyImage, *, infer: Inference | None = None, batch_size: int = 1
) -> np.ndarray: ...
@overload
def predict(
    model: nn.Module,
    images: list[AnyImage] | tuple[AnyImage, ...],
    *,
    infer: Inference | None = None,
    batch_size: int = 1,
) -> list[np.ndarray]: ...
def predict(
    model: nn.Module,
    images: AnyImage | list[AnyImage] | tuple[AnyImage, ...],
    *,
    infer: Inference | None = None,
    batch_size: int = 1,
) -> np.ndarray | list[np.ndarray]:
    """Return the class of every pixel: uint8 (H, W) for an image, a list of them for a list.

    Images may have any size; one above 4 million pixels is done in windows (see ``Whole``). The
    network runs on the device it is on (``model.to("cuda")`` moves it) and is put into eval mode.

    Args:
        model: From ``danet.load_model``; its ``classes`` name the values of the result and its
            ``palette`` has their RGB colours.
        images: One or a list of: path; uint8 array (H, W, 3) RGB or (H, W) grey; uint8 tensor
            (3, H, W) RGB; Pillow image.
        infer: The inference mode, one of ``danet.evaluation.inference``; None for ``Whole``.
        batch_size: The most consecutive images of one size that pass together.

    Raises:
        InputError: A file cannot be read, or an array has another shape or type.
    """
    wanted = images if isinstance(images, (list, tuple)) else [images]
    if not wanted:
        return []
    arrays = (_ArrayImage(_as_array(image, number)) for number, image in enumerate(wanted))
    found = predictions(model.eval(), arrays, infer or Whole(), batch_size=batch_size)
    results = [classes for _, classes in found]
    return results if wanted is images else results[0]


@torch.inference_mode()
def predictions(
    model: nn.Module,
    pictures: Iterable[T],
    infer: Inference,
    *,
    batch_size: int = 1,
) -> Iterator[tuple[T, np.ndarray]]:
    """Yield each picture with its classes, uint8 (H, W), in order.

    Args:
        model: In eval mode.
        pictures: Read one group at a time, so they need not fit into memory together.
        infer: The inference mode.
        batch_size: The most consecutive pictures of one size that pass together, with at most
            PIXELS_PER_PASS pixels in total.
    """
    device = next(model.parameters()).device
    for group in _groups(pictures, batch_size):
        first, *others = (picture.image[None] for picture in group)
        # One picture is not copied: it may be as large as memory allows.
        array = np.concatenate((first, *others)) if others else first  # (B, H, W, 3)
        tensor = torch.from_numpy(array).permute(0, 3, 1, 2).to(device)
        classes = infer.predict(model, tensor).cpu().numpy()
        del first, others, array, tensor  # large; not held while the next are read
        yield from zip(group, classes, strict=True)


def _groups(pictures: Iterable[T], batch_size: int) -> Iterator[list[T]]:
    """Yield groups of consecutive pictures of one size."""
    for (height, width, _), alike in groupby(pictures, key=lambda picture: picture.image.shape):
        together = max(1, min(batch_size, PIXELS_PER_PASS // (height * width)))
        while group := list(islice(alike, together)):  # no picture is read ahead
            yield group


def _as_array(image: AnyImage, number: int) -> np.ndarray:
    """Return an image of any accepted type as uint8 (H, W, 3), RGB."""
    if isinstance(image, (str, Path)):
        return read_image(Path(image).expanduser())
    if isinstance(image, Image.Image):
        return to_rgb(image, f"image {number}")
    array = image
    if isinstance(array, Tensor):
        array = array.detach().cpu().numpy()
        array = array.transpose(1, 2, 0) if array.ndim == 3 else array
    elif isinstance(array, np.ndarray) and array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if not isinstance(array, np.ndarray):
        raise InputError(
            f"image {number}: {type(image).__name__} is no path, array, tensor or Pillow image"
        )
    is_right = array.ndim == 3 and array.shape[2] == 3 and array.size and array.dtype == np.uint8
    if not is_right:
        raise InputError(
            f"image {number}: found {image.dtype} {tuple(image.shape)}, expected uint8 in 0..255: "
            "an array (H, W, 3) or (H, W), or a tensor (3, H, W); RGB"
        )
    return np.ascontiguousarray(array)
