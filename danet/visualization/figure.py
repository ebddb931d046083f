"""The attention figure: the columns of the paper's figure 6."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from danet.datasets.base import SegmentationDataset
from danet.evaluation.inference import Inference
from danet.visualization.attention import (
    Point,
    attention_branch,
    channel_maps,
    choose_classes,
    choose_points,
    class_map,
    has_attention,
    position_maps,
    rank_channels,
)
from danet.visualization.overlay import (
    Palette,
    SegmentedImage,
    add_title,
    arrange,
    as_tensor,
    classes_in,
    overlay,
    predict,
    sheet,
    with_legend,
)

_MARKS = ((255, 40, 40), (40, 220, 40), (60, 120, 255), (255, 200, 0), (255, 0, 255), (0, 220, 220))


def heatmap(values: Tensor, size: Sequence[int], *, color: bool) -> np.ndarray:
    """Draw a map (h, w) at ``size`` (H, W): grey levels or a jet scale, from min to max."""
    small = values.float().cpu().numpy()
    array = cv2.resize(small, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    array = array - array.min()
    # A constant map has the maximum 0 here and is drawn black.
    shown = np.rint(255 * array / max(float(array.max()), 1e-12)).astype(np.uint8)
    if color:
        return cv2.cvtColor(cv2.applyColorMap(shown, cv2.COLORMAP_JET), cv2.COLOR_BGR2RGB)
    return cv2.cvtColor(shown, cv2.COLOR_GRAY2RGB)


def mark_points(image: np.ndarray, points: Sequence[Point]) -> np.ndarray:
    """Return a copy of the image with numbered crosses."""
    image = image.copy()
    for number, point in enumerate(points):
        color = _MARKS[number % len(_MARKS)]
        cv2.drawMarker(image, tuple(point), (255, 255, 255), cv2.MARKER_CROSS, 13, 3)
        cv2.drawMarker(image, tuple(point), color, cv2.MARKER_CROSS, 11, 1)
        place = (min(point.x + 5, image.shape[1] - 9), max(point.y - 5, 9))
        cv2.putText(image, str(number + 1), place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, color, 1)
    return image


class FigureOptions(NamedTuple):
    """What the attention figure shows."""

    points: Sequence[Point] = ()
    """Pixels whose attention is drawn; chosen where none are given, see choose_points."""
    wanted: Sequence[int] = ()
    """Classes on which points are chosen."""
    by_class: bool = False
    """Whether to draw the mean over all pixels of a class in the place of a point."""
    channels: int = 1
    """Number of channels for a class."""


_DEFAULTS = FigureOptions()


def figure(
    model: nn.Module,
    picture: SegmentedImage,
    classes: Sequence[str],
    palette: Palette,
    options: FigureOptions = _DEFAULTS,
) -> np.ndarray:
    """Draw the paper's figure 6 for one image.

    Image with marked points, the position attention of each (grey levels), the channels that best
    separate the first two classes under the points (jet), prediction, truth.

    Args:
        model: In eval mode.
        picture: The image and its classes.
        classes: Their names.
        palette: Their RGB colours.
        options: What is drawn.
    """
    _, image, prediction, truth = picture
    tensor = as_tensor(image, next(model.parameters()).device)
    panels, shown = _position_panels(model, tensor, picture, classes, options)
    if attention_branch(model, "channel") is not None:
        maps = channel_maps(model, tensor)  # (C, h, w)
        # A class that fills the picture has no outside for a channel to differ in.
        separable = [index for index in dict.fromkeys(shown) if not (prediction == index).all()]
        for index in separable[:2]:
            for channel, value in rank_channels(maps, prediction, index)[: options.channels]:
                title = f"channel {channel} tells {classes[index]} ({value:.1f} sd)"
                drawn = heatmap(maps[channel], image.shape[:2], color=True)
                panels.append(add_title(drawn, title))
    panels.append(add_title(overlay(image, prediction, palette), "prediction"))
    if truth is not None:
        panels.append(add_title(overlay(image, truth, palette), "truth"))
    return with_legend(arrange(panels), classes, palette, classes_in(prediction, truth))


def _position_panels(
    model: nn.Module,
    tensor: Tensor,
    picture: SegmentedImage,
    classes: Sequence[str],
    options: FigureOptions,
) -> tuple[list[np.ndarray], list[int]]:
    """Draw the image and the position attention of classes or points; return their classes, too."""
    _, image, prediction, _ = picture
    has_positions = attention_branch(model, "position") is not None
    maps: Iterator[Tensor]
    if options.by_class:
        shown = choose_classes(prediction, wanted=options.wanted)
        panels = [add_title(image, "image")]
        titles = [classes[index] for index in shown]
        maps = (class_map(model, tensor, prediction, i) for i in shown if has_positions)
    else:
        points = list(options.points) or choose_points(prediction, wanted=options.wanted)
        shown = [int(prediction[p.y, p.x]) for p in points]
        panels = [add_title(mark_points(image, points), "image and points")]
        titles = [f"{number} ({classes[index]})" for number, index in enumerate(shown, 1)]
        maps = iter(position_maps(model, tensor, points) if has_positions and points else ())
    for title, values in zip(titles, maps, strict=False):  # no maps without position attention
        drawn = heatmap(values, image.shape[:2], color=False)
        panels.append(add_title(drawn, f"{title} attends to"))
    return panels, shown


def validation_pictures(
    model: nn.Module,
    dataset: SegmentationDataset,
    infer: Inference,
    *,
    device: torch.device,
    max_pixels: int,
    count: int = 4,
) -> dict[str, np.ndarray]:
    """Draw evenly spaced samples, and the attention figure of every other one, by name.

    Args:
        model: Is put into eval mode.
        dataset: With labels.
        infer: The inference mode.
        device: Of the model.
        max_pixels: Attention is drawn of a whole image, made smaller if it has more.
        count: Number of samples.
    """
    model.eval()
    drawn = {}
    classes, palette = dataset.classes, dataset.palette
    for place, index in enumerate(np.linspace(0, len(dataset) - 1, min(count, len(dataset)))):
        image, mask, name = dataset[round(index)]
        picture = SegmentedImage(name, image, predict(model, image, device, infer), mask)
        drawn[name] = sheet(picture, classes, palette)
        if place % 2 == 0 and has_attention(model):
            small = SegmentedImage(name, *_downscale((image, picture.prediction, mask), max_pixels))
            drawn[f"{name}_attention"] = figure(model, small, classes, palette)
    return drawn


def _downscale(arrays: Sequence[np.ndarray], max_pixels: int) -> list[np.ndarray]:
    """Return an image and maps of its size, made smaller alike where they have more pixels."""
    height, width = arrays[0].shape[:2]
    factor = min(1.0, math.sqrt(max_pixels / (height * width)))
    if factor == 1.0:
        return list(arrays)
    size = max(1, int(width * factor)), max(1, int(height * factor))
    # Class indices must not be averaged.
    ways = [cv2.INTER_AREA if array.ndim == 3 else cv2.INTER_NEAREST for array in arrays]
    return [cv2.resize(a, size, interpolation=w) for a, w in zip(arrays, ways, strict=True)]
