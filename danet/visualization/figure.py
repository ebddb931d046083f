"""The attention figure: the columns of the paper's figure 6."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from danet.datasets.base import SegmentationDataset
from danet.evaluation.inference import Inference
from danet.types import IGNORE
from danet.visualization.attention import (
    Point,
    branch,
    channel_maps,
    choose_classes,
    choose_points,
    class_map,
    has_attention,
    position_maps,
    ranked_channels,
)
from danet.visualization.overlay import (
    Palette,
    arrange,
    as_tensor,
    legend,
    overlay,
    predict,
    sheet,
    titled,
)

_MARKS = ((255, 40, 40), (40, 220, 40), (60, 120, 255), (255, 200, 0), (255, 0, 255), (0, 220, 220))


def heatmap(values: Tensor, size: tuple[int, int], *, color: bool) -> np.ndarray:
    """Draws a map (h, w) at ``size`` (H, W): grey levels or a jet-like scale, from min to max."""
    small = values.float().cpu().numpy()
    array = cv2.resize(small, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    array = array - array.min()
    shown = np.rint(255 * array / max(float(array.max()), 1e-12)).astype(np.uint8)
    if color:
        return cv2.cvtColor(cv2.applyColorMap(shown, cv2.COLORMAP_JET), cv2.COLOR_BGR2RGB)
    return cv2.cvtColor(shown, cv2.COLOR_GRAY2RGB)


def mark(image: np.ndarray, points: Sequence[Point]) -> np.ndarray:
    """Draws numbered crosses on a copy of the image."""
    image = image.copy()
    for number, point in enumerate(points):
        color = _MARKS[number % len(_MARKS)]
        cv2.drawMarker(image, tuple(point), (255, 255, 255), cv2.MARKER_CROSS, 13, 3)
        cv2.drawMarker(image, tuple(point), color, cv2.MARKER_CROSS, 11, 1)
        place = (min(point.x + 5, image.shape[1] - 9), max(point.y - 5, 9))
        cv2.putText(image, str(number + 1), place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, color, 1)
    return image


def figure(
    model: nn.Module,
    tensor: Tensor,
    image: np.ndarray,
    prediction: np.ndarray,
    truth: np.ndarray | None,
    classes: Sequence[str],
    palette: Palette,
    *,
    points: Sequence[Point] = (),
    wanted: Sequence[int] = (),
    by_class: bool = False,
    channels: int = 1,
) -> np.ndarray:
    """Draws the paper's figure 6 for one image.

    Image with marked points, what each point attends to (grey levels), the channels that tell the
    first two classes under the points best (jet), prediction, truth. With ``by_class`` the mean
    over all pixels of a class is in the place of a point.

    Args:
        model: In eval mode.
        tensor: The image, (1, 3, H, W), on the model's device.
        image: The same as uint8 (H, W, 3).
        prediction: Classes (H, W).
        truth: Classes or IGNORE (H, W), or None.
        classes: Their names.
        palette: Their RGB colours.
        points: Pixels to ask; chosen where none are given, see choose_points.
        wanted: Classes on which to choose points.
        by_class: Whether to show means of classes.
        channels: How many to show for a class.
    """
    size = (image.shape[0], image.shape[1])
    has_positions = branch(model, "position") is not None
    panels = []
    if by_class:
        asked = choose_classes(prediction, wanted=wanted)
        panels.append(titled(image, "image"))
        for index in asked if has_positions else ():
            values = class_map(model, tensor, prediction, index)
            panels.append(
                titled(heatmap(values, size, color=False), f"{classes[index]} attends to")
            )
    else:
        points = list(points) or choose_points(prediction, wanted=wanted)
        asked = [int(prediction[p.y, p.x]) for p in points]
        panels.append(titled(mark(image, points), "image and points"))
        maps = position_maps(model, tensor, points) if has_positions and points else ()
        for number, values in enumerate(maps):
            title = f"{number + 1} ({classes[asked[number]]}) attends to"
            panels.append(titled(heatmap(values, size, color=False), title))
    if branch(model, "channel") is not None:
        maps = channel_maps(model, tensor)
        told = [index for index in dict.fromkeys(asked) if not (prediction == index).all()]
        for index in told[:2]:
            for channel, value in ranked_channels(maps, prediction, index)[:channels]:
                title = f"channel {channel} tells {classes[index]} ({value:.1f} sd)"
                panels.append(titled(heatmap(maps[channel], size, color=True), title))
    panels.append(titled(overlay(image, prediction, palette), "prediction"))
    present = set(np.unique(prediction).tolist())
    if truth is not None:
        panels.append(titled(overlay(image, truth, palette), "truth"))
        present |= set(np.unique(truth).tolist()) - {IGNORE}
    body = arrange(panels)
    return np.vstack((body, legend(classes, palette, sorted(present), body.shape[1])))


def validation_pictures(
    model: nn.Module,
    dataset: SegmentationDataset,
    infer: Inference,
    *,
    device: torch.device,
    max_pixels: int,
    count: int = 4,
) -> dict[str, np.ndarray]:
    """Draws evenly spaced samples, and the attention figure of every other one, by name.

    Args:
        model: Is put into eval mode.
        dataset: With labels.
        infer: How images pass the network.
        device: Of the model.
        max_pixels: Attention is drawn of a whole image, made smaller if it has more.
        count: How many samples.
    """
    model.eval()
    drawn = {}
    for place, index in enumerate(np.linspace(0, len(dataset) - 1, min(count, len(dataset)))):
        sample = dataset[round(index)]
        prediction = predict(model, sample.image, device, infer)
        named = dataset.classes, dataset.palette
        drawn[sample.name] = sheet(sample.image, prediction, sample.mask, *named)
        if place % 2 == 0 and has_attention(model):
            image, small, mask = _shrunk((sample.image, prediction, sample.mask), max_pixels)
            tensor = as_tensor(image, device)
            told = small, mask, *named
            drawn[f"{sample.name}_attention"] = figure(model, tensor, image, *told)
    return drawn


def _shrunk(arrays: Sequence[np.ndarray], max_pixels: int) -> list[np.ndarray]:
    """Returns an image and maps of its size, made smaller alike where they have more pixels."""
    height, width = arrays[0].shape[:2]
    factor = min(1.0, math.sqrt(max_pixels / (height * width)))
    if factor == 1.0:
        return list(arrays)
    size = max(1, int(width * factor)), max(1, int(height * factor))
    ways = [cv2.INTER_AREA if array.ndim == 3 else cv2.INTER_NEAREST for array in arrays]
    return [cv2.resize(a, size, interpolation=w) for a, w in zip(arrays, ways, strict=True)]
