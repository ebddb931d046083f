"""The attention figure: the columns of the paper's figure 6."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
from torch import Tensor, nn

from danet.datasets.base import SegmentationDataset
from danet.evaluation.base import Inference
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
    shrink,
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
    drawn = cv2.applyColorMap(shown, cv2.COLORMAP_JET) if color else shown
    return cv2.cvtColor(drawn, cv2.COLOR_BGR2RGB if color else cv2.COLOR_GRAY2RGB)


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


def figure(
    model: nn.Module,
    picture: SegmentedImage,
    classes: Sequence[str],
    palette: Palette,
    *,
    points: Sequence[Point] = (),
    wanted: Sequence[int] = (),
    by_class: bool = False,
    channels: int = 1,
) -> np.ndarray:
    """Draw the paper's figure 6 for one image.

    Image with marked points, the position attention of each (grey levels), the channels that best
    separate the first two classes under the points (jet), prediction, truth.

    Args:
        model: In eval mode.
        picture: The image and its classes.
        classes: Their names.
        palette: Their RGB colours.
        points: Pixels whose attention is drawn; chosen where none are given, see choose_points.
        wanted: Classes on which points are chosen.
        by_class: Whether to draw the mean over all pixels of a class in the place of a point.
        channels: Number of channels for a class.
    """
    _, image, prediction, truth = picture
    tensor, size = as_tensor(image, model), image.shape[:2]
    if by_class:
        shown = choose_classes(prediction, wanted=wanted)
        titles = [classes[index] for index in shown]
    else:
        points = points or choose_points(prediction, wanted=wanted)
        shown = [int(prediction[p.y, p.x]) for p in points]
        titles = [f"{number} ({classes[index]})" for number, index in enumerate(shown, 1)]
    panels = {"image": image} if by_class else {"image and points": mark_points(image, points)}
    if shown and attention_branch(model, "position") is not None:
        if by_class:
            maps = [class_map(model, tensor, prediction, index) for index in shown]
        else:
            maps = [*position_maps(model, tensor, points)]
        for title, values in zip(titles, maps, strict=True):
            panels[f"{title} attends to"] = heatmap(values, size, color=False)
    if attention_branch(model, "channel") is not None:
        features = channel_maps(model, tensor)  # (C, h, w)
        # A class that fills the picture has no outside for a channel to differ in.
        separable = [index for index in dict.fromkeys(shown) if not (prediction == index).all()]
        for index in separable[:2]:
            for channel, value in rank_channels(features, prediction, index)[:channels]:
                title = f"channel {channel} separates {classes[index]} ({value:.1f} sd)"
                panels[title] = heatmap(features[channel], size, color=True)
    panels["prediction"] = overlay(image, prediction, palette)
    if truth is not None:
        panels["truth"] = overlay(image, truth, palette)
    body = arrange([add_title(panel, title) for title, panel in panels.items()])
    return with_legend(body, classes, palette, classes_in(prediction, truth))


def validation_pictures(
    model: nn.Module,
    dataset: SegmentationDataset,
    infer: Inference,
    *,
    max_pixels: int,
    count: int = 4,
) -> dict[str, np.ndarray]:
    """Draw evenly spaced samples, and the attention figure of every other one, by name.

    Args:
        model: Is put into eval mode.
        dataset: With labels.
        infer: The inference mode.
        max_pixels: Attention is drawn of a whole image, made smaller if it has more.
        count: Number of samples.
    """
    model.eval()
    drawn = {}
    classes, palette = dataset.classes, dataset.palette
    for place, index in enumerate(spread(len(dataset), count)):
        image, mask, name = dataset[index]
        picture = SegmentedImage(name, image, predict(model, image, infer), mask)
        drawn[name] = sheet(picture, classes, palette)
        if place % 2 == 0 and has_attention(model):
            small = shrink(picture, math.sqrt(max_pixels / mask.size))
            drawn[f"{name}_attention"] = figure(model, small, classes, palette)
    return drawn


def spread(length: int, count: int) -> list[int]:
    """Return evenly spaced indices."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()
