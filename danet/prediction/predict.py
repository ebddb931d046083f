"""Prediction of pictures: of a list by ``predict``, of a stream by ``predictions``."""

import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from danet.bands import Bands, as_input
from danet.datasets.band_io import read_bands
from danet.datasets.image_io import to_rgb
from danet.errors import InputError, first_line
from danet.evaluation.evaluate import Inference
from danet.evaluation.inference import Whole
from danet.evaluation.metrics import in_rows
from danet.evaluation.sliding_window import PIXELS_PER_PASS
from danet.plain import without_credentials
from danet.types import IGNORE

AnyImage = str | os.PathLike[str] | np.ndarray | Tensor | Image.Image
"""An image, or a batch of them in an array or a tensor; see ``predict``."""
Images = Iterable[AnyImage]
Mode = Inference | None
Names = Sequence[str]
MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "confidence": lambda p: p.amax(dim=1),
    "entropy": lambda p: torch.special.entr(p).sum(dim=1) / math.log(max(2, p.shape[1])),
    "probability": lambda p: p,
}
"""What is computed of probabilities (B, K, H, W)."""


class Prediction(NamedTuple):
    """The classes of an image and how sure they are, with p = softmax(logits / T).

    T is the temperature of the network. A map that was not asked for is None. Those of a batch have
    its axis in front.
    """

    classes: np.ndarray  # uint8 (H, W), or uint16 with more than 255 classes
    confidence: np.ndarray | None = None  # float32 (H, W), 1/K..1: the p of the class
    entropy: np.ndarray | None = None  # float32 (H, W), -sum(p log p) / log K: 1 if all are alike
    probability: np.ndarray | None = None  # float32 (K, H, W), p


@overload
def predict(  # type: ignore[overload-overlap]  # a str is an iterable of str, too
    model: nn.Module, images: AnyImage, *, infer: Mode = None, batch_size: int = 1
) -> np.ndarray: ...
@overload
def predict(
    model: nn.Module, images: Images, *, infer: Mode = None, batch_size: int = 1
) -> list[np.ndarray]: ...
@overload
def predict(  # type: ignore[overload-overlap]
    model: nn.Module, images: AnyImage, *, maps: Names, infer: Mode = None, batch_size: int = 1
) -> Prediction: ...
@overload
def predict(
    model: nn.Module, images: Images, *, maps: Names, infer: Mode = None, batch_size: int = 1
) -> list[Prediction]: ...
def predict(
    model: nn.Module,
    images: AnyImage | Images,
    *,
    maps: Names | None = None,
    infer: Mode = None,
    batch_size: int = 1,
) -> Any:
    """Return the class of every pixel: uint8 (H, W) of an image, (B, H, W) of a batch.

    With more than 255 classes they are uint16.
    A list, or another iterable, of images of any size gives a list. An image above 4 million
    pixels is done in windows (see ``Whole``). The network runs on the device it is on
    (``model.to("cuda")`` moves it) and is put into eval mode.

    Args:
        model: From ``danet.load_model``; its ``classes`` name the values of the result and its
            ``palette`` has their RGB colours.
        images: One or an iterable of: path; Pillow image; array (H, W) or (H, W, C); tensor (H, W)
            or (C, H, W). A batch is an array (B, H, W, C) or a tensor (B, C, H, W). C is 1 (grey),
            3 (RGB) or 4 (RGBA, whose alpha is dropped). White is 255, but 65535 in uint16, true in
            bool, and 1.0 in floats that do not exceed 1. An EXIF orientation is not applied. Of a
            network with ``bands`` C is their number N and the values are raw; files are read as
            they were in its training, and NaN becomes black.
        maps: Some of MAPS: the result is a ``Prediction`` with them, or a list of such.
        infer: The inference mode, one of ``danet.evaluation.inference``; None for ``Whole``.
        batch_size: The most consecutive images of one size that pass together.

    Raises:
        InputError: A file cannot be read, or an array has another shape, type or range. Floats
            with a maximum between 1 and 2 are refused, since either range may be meant.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: {type(model).__name__} is no network; use danet.load_model(path)")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: expected at least 1")
    if isinstance(infer, type) or (infer is not None and not hasattr(infer, "predict")):
        found = f"infer={infer!r}: expected an inference mode of danet.evaluation.inference"
        raise InputError(f"{found}: Whole(), Sliding(...) or MultiScale(scales=[0.75, 1.0, 1.25])")
    is_list = isinstance(maps or (), Collection) and not isinstance(maps, str)
    if not is_list or any(name not in [*MAPS] for name in maps or ()):
        raise InputError(f"maps={maps!r}: expected a list of some of {', '.join(MAPS)}")
    infer, model, wanted = infer or Whole(), model.eval(), maps or ()
    given: Any = itemgetter(0) if maps is None else Prediction._make  # the classes, or all
    bands: Bands | None = getattr(model, "bands", None)
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        batch = _as_array(images, "images", bands, axes=4)
        fields = zip(*predictions(model, batch, infer, wanted, batch_size=batch_size), strict=True)
        return given([None if field[0] is None else np.stack(field) for field in fields])
    if isinstance(images, (str, bytes, np.ndarray, Tensor)) or not isinstance(images, Iterable):
        return given(next(predictions(model, [_as_array(images, "image", bands)], infer, wanted)))
    arrays = (_as_array(image, f"image {i}", bands) for i, image in enumerate(images))
    return [*map(given, predictions(model, arrays, infer, wanted, batch_size=batch_size))]


@torch.inference_mode()
def predictions(
    model: nn.Module,
    images: Iterable[np.ndarray],
    infer: Inference,
    maps: Names = (),
    *,
    batch_size: int = 1,
) -> Iterator[Prediction]:
    """Yield the prediction of each image, in order.

    Images are uint8 (H, W, 3), RGB, or raw bands (H, W, N). The model is in eval mode. Up to
    ``batch_size`` consecutive images of one size pass together, with at most PIXELS_PER_PASS
    pixels; only so many are held at a time.
    """
    device = next(model.parameters()).device
    for (height, width, _), alike in groupby(images, key=np.shape):
        together = max(1, min(batch_size, PIXELS_PER_PASS // (height * width)))
        while group := list(islice(alike, together)):
            # One image is not copied: it may be as large as memory allows.
            array = np.stack(group) if len(group) > 1 else group[0][None]  # (B, H, W, N)
            tensor = torch.from_numpy(as_input(array)).permute(0, 3, 1, 2).to(device)
            if maps:
                found = predict_maps(model, tensor, infer, maps)
            else:
                classes = infer.predict(model, tensor).cpu().numpy()
                found = {"classes": classes.astype("uint8" if classes.itemsize == 1 else "uint16")}
            del group, array, tensor  # large; not held while the next are read
            for i in range(len(found["classes"])):
                yield Prediction(**{name: values[i] for name, values in found.items()})


@torch.no_grad()
def predict_maps(model: Any, image: Tensor, infer: Inference, maps: Names) -> dict[str, np.ndarray]:
    """Return the fields of a Prediction of a batch (B, 3, H, W)."""
    temperature, found = getattr(model, "temperature", 1.0), dict[str, np.ndarray]()
    for piece in infer.pieces(model, image):
        for rows, scores, logits in in_rows(piece.scores, are_logits=piece.are_logits):
            p = (logits / temperature).softmax(dim=1)
            values = {name: MAPS[name](p) for name in maps}
            # Not of p, in which other logits may be equal.
            dtype = torch.uint8 if scores.shape[1] <= IGNORE else torch.uint16
            values["classes"] = scores.max(dim=1).indices.to(dtype)
            down, across = piece._replace(scores=scores, top=piece.top + rows.start).place[1:]
            for name, value in values.items():
                part = value.cpu().numpy()
                if name not in found:
                    found[name] = np.empty((*part.shape[:-2], *image.shape[2:]), part.dtype)
                found[name][..., down, across] = part
    return found


def _as_array(image: Any, where: str, bands: Bands | None = None, *, axes: int = 3) -> np.ndarray:
    """Return an image, or with 4 axes a batch, as uint8 (..., H, W, 3), RGB, or (..., H, W, N)."""
    if isinstance(image, (str, os.PathLike)):
        if "://" in str(image):
            place = without_credentials(str(image))
            raise InputError(f"{where}: {place}: addresses are not read; download the file first")
        if (path := Path(image).expanduser()).is_dir():
            files = f"sorted(Path({str(image)!r}).glob('*.jpg'))"
            raise InputError(f"{where}: {image}: a folder; pass {files}")
        return read_bands(path, bands)[0]
    if isinstance(image, Image.Image) and not bands and image.mode not in ("I", "F"):
        try:
            return to_rgb(image, where)
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"{where}: not a readable picture ({first_line(error)})") from error
    advice = "np.moveaxis(image, -3, -1)"
    if is_tensor := isinstance(image, Tensor):
        advice = "image.movedim(-1, -3)"
        values = image.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # numpy has no bfloat16
        array = (values.movedim(-3, -1) if values.ndim > 2 else values).numpy()
    elif isinstance(image, (np.ndarray, Image.Image)):
        array = np.asarray(image)
    else:
        kind = type(image).__name__
        raise InputError(f"{where}: {kind} is no path, array, tensor or Pillow image")
    array = array[..., None] if array.ndim == 2 else array
    count = len(bands.channels) if bands else 3
    counts = (count,) if bands else (1, 3, 4)
    is_image = array.ndim == axes and array.shape[-1] in counts and array.size > 0
    if not is_image or array.dtype.kind not in "buif":
        is_swapped = image.ndim > 2 and image.shape[-1 if is_tensor else -3] in counts
        kind = f"the raw values of {count} band(s)" if bands else "RGB, or with 1 or 4 channels"
        raise InputError(
            f"{where}: found {image.dtype} {tuple(image.shape)}, expected an array (H, W, {count}) "
            f"or a tensor ({count}, H, W) of {kind}" + f"; use {advice}" * is_swapped
        )
    if bands:
        raw = np.array(as_input(array), order="C")  # a copy
        bands.fill(raw, ~np.isfinite(raw))
        return raw
    colors = array[..., :3]  # without alpha
    colors = colors if colors.dtype == np.uint8 else _as_uint8(colors, where)
    # Writable, since torch warns of a tensor that shares the memory of what is not.
    return np.require(np.broadcast_to(colors, (*colors.shape[:-1], 3)), requirements=["C", "W"])


def _as_uint8(values: np.ndarray, where: str) -> np.ndarray:
    """Return numbers as 0..255 by the rule of ``predict``."""
    low, high, is_float = values.min(), values.max(), values.dtype.kind == "f"
    if values.dtype == np.uint16:
        if 0 < high < 256:
            text = f"{where}: uint16, white is 65535, and the maximum is {high}: all becomes black"
            warnings.warn(f"{text}; use .astype(np.uint8) if white is 255", stacklevel=2)
        return (values // 257).astype(np.uint8)
    if 0 <= low <= high <= 255 and not (is_float and 1 < high < 2):
        is_unit = values.dtype == bool or (is_float and high <= 1)
        return np.rint(values * (255.0 if is_unit else 1.0)).astype(np.uint8)
    raise InputError(
        f"{where}: found {values.dtype} in {low:.4g}..{high:.4g}, expected numbers in 0..255, or "
        "floats in 0..1; the network does the normalisation"
    )
