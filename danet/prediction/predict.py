"""Prediction of pictures: of a list by ``predict``, of a stream by ``predictions``."""

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from danet.datasets.image_io import read_image, to_rgb
from danet.errors import InputError
from danet.evaluation.evaluate import Inference
from danet.evaluation.inference import Whole
from danet.evaluation.sliding_window import PIXELS_PER_PASS

AnyImage = str | Path | np.ndarray | Tensor | Image.Image
"""A path; uint8 (H, W, 3) RGB or (H, W) grey; a uint8 tensor (3, H, W) RGB; a Pillow image."""
Images = list[AnyImage] | tuple[AnyImage, ...]


@overload
def predict(
    model: nn.Module, images: AnyImage, *, infer: Inference | None = None, batch_size: int = 1
) -> np.ndarray: ...
@overload
def predict(
    model: nn.Module, images: Images, *, infer: Inference | None = None, batch_size: int = 1
) -> list[np.ndarray]: ...
def predict(
    model: nn.Module,
    images: AnyImage | Images,
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
    arrays = (_as_array(image, number) for number, image in enumerate(wanted))
    results = list(predictions(model.eval(), arrays, infer or Whole(), batch_size=batch_size))
    return results if wanted is images else results[0]


@torch.inference_mode()
def predictions(
    model: nn.Module, images: Iterable[np.ndarray], infer: Inference, *, batch_size: int = 1
) -> Iterator[np.ndarray]:
    """Yield the classes, uint8 (H, W), of each image, uint8 (H, W, 3) RGB, in order.

    The model is in eval mode. Up to ``batch_size`` consecutive images of one size pass together,
    with at most PIXELS_PER_PASS pixels; only so many are held at a time.
    """
    device = next(model.parameters()).device
    for (height, width, _), alike in groupby(images, key=np.shape):
        together = max(1, min(batch_size, PIXELS_PER_PASS // (height * width)))
        while group := list(islice(alike, together)):
            # One image is not copied: it may be as large as memory allows.
            array = np.stack(group) if len(group) > 1 else group[0][None]  # (B, H, W, 3)
            tensor = torch.from_numpy(array).permute(0, 3, 1, 2).to(device)
            classes = infer.predict(model, tensor).cpu().numpy()
            del group, array, tensor  # large; not held while the next are read
            yield from classes


def _as_array(image: AnyImage, number: int) -> np.ndarray:
    """Return an image of any accepted type as uint8 (H, W, 3), RGB."""
    if isinstance(image, (str, Path)):
        return read_image(Path(image).expanduser())
    if isinstance(image, Image.Image):
        return to_rgb(image, f"image {number}")
    if isinstance(image, Tensor):
        array = image.detach().cpu().numpy()
        array = array.transpose(1, 2, 0) if array.ndim == 3 else array
    elif isinstance(image, np.ndarray):
        array = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image
    else:
        raise InputError(
            f"image {number}: {type(image).__name__} is no path, array, tensor or Pillow image"
        )
    if array.shape[2:] != (3,) or not array.size or array.dtype != np.uint8:
        raise InputError(
            f"image {number}: found {image.dtype} {tuple(image.shape)}, expected uint8 in 0..255: "
            "an array (H, W, 3) or (H, W), or a tensor (3, H, W); RGB"
        )
    return np.ascontiguousarray(array)
