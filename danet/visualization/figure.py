"""The attention figure: the columns of the paper's figure 6."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from danet.datasets.base import SegmentationDataset
from danet.evaluation.base import Inference
from danet.visualization import attention
from danet.visualization.attention import Point, attention_branches
from danet.visualization.overlay import Legend, SegmentedImage, compose, sheet, shrink

_MARK = (255, 0, 255)


def heatmap(values: Tensor, size: Sequence[int], *, color: bool) -> np.ndarray:
    """Draw a map (h, w) at ``size`` (H, W): grey levels or a jet scale, from min to max."""
    small = values.float().cpu().numpy()
    array = cv2.resize(small, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    array -= array.min()
    # A constant map has the maximum 0 here and is drawn black.
    shown = np.rint(255 * array / max(float(array.max()), 1e-12)).astype(np.uint8)
    drawn = cv2.applyColorMap(shown, cv2.COLORMAP_JET) if color else shown
    return cv2.cvtColor(drawn, cv2.COLOR_BGR2RGB if color else cv2.COLOR_GRAY2RGB)


def mark_points(image: np.ndarray, points: Sequence[Point]) -> np.ndarray:
    """Return a copy of the image with numbered crosses."""
    image = image.copy()
    for number, point in enumerate(points, 1):
        cv2.drawMarker(image, tuple(point), (255, 255, 255), cv2.MARKER_CROSS, 13, 3)
        cv2.drawMarker(image, tuple(point), _MARK, cv2.MARKER_CROSS, 11, 1)
        place = (min(point.x + 5, image.shape[1] - 9), max(point.y - 5, 9))
        cv2.putText(image, str(number), place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, _MARK, 1)
    return image


def figure(
    model: nn.Module,
    picture: SegmentedImage,
    legend: Legend,
    *,
    points: Sequence[Point] | None = None,
    channels: int = 1,
) -> np.ndarray:
    """Draw the paper's figure 6 for one image.

    Image with marked points, the position attention of each (grey levels), the channels that best
    separate the first two classes under the points (jet), prediction, truth.

    Args:
        model: In eval mode.
        picture: The image and its classes.
        legend: Of the classes.
        points: Pixels whose attention is drawn; by default those of choose_points.
        channels: Number of channels for a class.
    """
    _, image, prediction, truth = picture
    size, names, branches = image.shape[:2], legend.classes, attention_branches(model)
    points = attention.choose_points(prediction) if points is None else points
    shown = [int(prediction[p.y, p.x]) for p in points]
    panels = [("image and points", mark_points(image, points))]
    if points and "position" in branches:
        for number, values in enumerate(attention.position_maps(model, image, points)):
            title = f"{number + 1} ({names[shown[number]]}) attends to"
            panels.append((title, heatmap(values, size, color=False)))
    if "channel" in branches:
        maps = attention.channel_maps(model, image)  # (C, h, w)
        # A class that fills the picture has no outside for a channel to differ in.
        separable = [index for index in dict.fromkeys(shown) if not (prediction == index).all()]
        for index in separable[:2]:
            for channel, value in attention.rank_channels(maps, prediction, index)[:channels]:
                title = f"channel {channel} separates {names[index]} ({value:.1f} sd)"
                panels.append((title, heatmap(maps[channel], size, color=True)))
    panels.append(("prediction", legend.over(image, prediction)))
    if truth is not None:
        panels.append(("truth", legend.over(image, truth)))
    return compose(panels, legend, (prediction, truth))


@torch.inference_mode()
def validation_pictures(
    model: nn.Module,
    dataset: SegmentationDataset,
    infer: Inference,
    *,
    max_pixels: int,
) -> dict[str, np.ndarray]:
    """Draw four evenly spaced samples, and the attention figure of every other one, by name.

    Args:
        model: Is put into eval mode.
        dataset: With labels.
        infer: The inference mode.
        max_pixels: Attention is drawn of a whole image, made smaller if it has more.
    """
    model.eval()
    drawn, legend = {}, Legend(dataset.classes, dataset.palette)
    for place, index in enumerate(spread(len(dataset), 4)):
        image, mask, name = dataset[index]
        prediction = infer.predict(model, attention.as_tensor(image, model))[0].cpu().numpy()
        picture = SegmentedImage(name, image, prediction, mask)
        drawn[name] = sheet(legend, picture)
        if place % 2 == 0 and attention_branches(model):
            small = shrink(picture, math.sqrt(max_pixels / mask.size))
            drawn[f"{name}_attention"] = figure(model, small, legend)
    return drawn


def spread(length: int, count: int) -> list[int]:
    """Return evenly spaced indices."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()
