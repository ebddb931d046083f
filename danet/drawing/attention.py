"""What the network attends to: the columns of the paper's figure 6."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danet.drawing.overlay import Palette, arrange, legend, overlay, titled
from danet.models.heads import AttentionBranch
from danet.types import IGNORE

_MARKS = ((255, 40, 40), (40, 220, 40), (60, 120, 255), (255, 200, 0), (255, 0, 255), (0, 220, 220))


class Point(NamedTuple):
    """A pixel of the image."""

    x: int
    y: int


def branch(model: nn.Module, name: str) -> AttentionBranch | None:
    """Returns the branch "position" or "channel" of a network's head, None where it has none."""
    found = getattr(model.head, name, None)
    return found if isinstance(found, AttentionBranch) else None


def _input_of(model: nn.Module, part: AttentionBranch, image: Tensor) -> Tensor:
    """Returns what enters the attention of a branch, (B, C, h, w)."""
    shared = getattr(model.head, "shared", None)
    features = model.features(image)  # type: ignore[operator]
    return part.reduce(shared(features) if isinstance(shared, nn.Module) else features)


@torch.inference_mode()
def position_maps(model: nn.Module, image: Tensor, points: Sequence[Point]) -> Tensor:
    """Returns what chosen pixels attend to: their rows of the position attention.

    Args:
        model: A Segmentor whose head has position attention.
        image: (1, 3, H, W) RGB in 0..255.
        points: P pixels of it.

    Returns:
        (P, h, w) at the resolution of the head, each map with sum 1.
    """
    part = branch(model, "position")
    assert part is not None
    x = _input_of(model, part, image)
    rows, columns = x.shape[-2:]
    height, width = image.shape[-2:]
    index = [p.y * rows // height * columns + p.x * columns // width for p in points]
    return part.attention.rows(x, torch.tensor(index, device=x.device))[0]  # type: ignore[operator]


@torch.inference_mode()
def channel_maps(model: nn.Module, image: Tensor) -> Tensor:
    """Returns the output of the channel attention, (C, h, w), for one image (1, 3, H, W)."""
    part = branch(model, "channel")
    assert part is not None
    return part.attention(_input_of(model, part, image))[0]


def telling_channel(maps: Tensor, prediction: np.ndarray, index: int) -> int:
    """Returns the channel that singles out a class best.

    Best is the largest difference of the means inside and outside of the class, in standard
    deviations of the channel.

    Args:
        maps: (C, h, w).
        prediction: Classes (H, W).
        index: The class; it must occur and not fill the picture.
    """
    inside = torch.from_numpy((prediction == index).astype(np.float32))[None, None]
    inside = F.adaptive_avg_pool2d(inside, (maps.shape[-2], maps.shape[-1]))[0, 0].to(maps.device)
    maps = maps.float()
    mean_inside = (maps * inside).sum(dim=(1, 2)) / inside.sum().clamp(min=1e-6)
    mean_outside = (maps * (1 - inside)).sum(dim=(1, 2)) / (1 - inside).sum().clamp(min=1e-6)
    spread = maps.flatten(1).std(dim=1).clamp(min=1e-6)
    return int(((mean_inside - mean_outside) / spread).argmax())


def choose_points(
    prediction: np.ndarray, *, count: int = 3, wanted: Sequence[int] = ()
) -> list[Point]:
    """Chooses pixels deep inside regions: of the wanted classes, else of the rarest ones.

    Args:
        prediction: Classes (H, W).
        count: How many at most.
        wanted: Classes; one point is put on each of those that occur.
    """
    sizes = {
        int(c): int(n) for c, n in zip(*np.unique(prediction, return_counts=True), strict=True)
    }
    if wanted:
        chosen = [index for index in wanted if index in sizes]
    else:
        # A region of a few pixels is as likely a mistake as an object.
        visible = [index for index, size in sizes.items() if size >= prediction.size // 500]
        chosen = sorted(visible, key=lambda index: sizes[index])[:count]
    return [_deepest(prediction == index) for index in chosen]


def _deepest(region: np.ndarray) -> Point:
    """Returns the pixel of a region that is farthest from its border."""
    padded = np.pad(region.astype(np.uint8), 1)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), region.shape)
    return Point(int(x), int(y))


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


def has_attention(model: nn.Module) -> bool:
    """Tells whether a network has anything that ``figure`` could show."""
    return branch(model, "position") is not None or branch(model, "channel") is not None


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
) -> np.ndarray:
    """Draws the paper's figure 6 for one image.

    Image with marked points, what each point attends to (grey levels), the two channels that tell
    the first two classes under the points best (jet), prediction, truth.

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
    """
    size = (image.shape[0], image.shape[1])
    points = list(points) or choose_points(prediction, wanted=wanted)
    labels = [classes[prediction[p.y, p.x]] for p in points]
    panels = [titled(mark(image, points), "image and points")]
    if branch(model, "position") is not None and points:
        for number, values in enumerate(position_maps(model, tensor, points)):
            title = f"{number + 1} ({labels[number]}) attends to"
            panels.append(titled(heatmap(values, size, color=False), title))
    if branch(model, "channel") is not None:
        maps = channel_maps(model, tensor)
        for index in list(dict.fromkeys(int(prediction[p.y, p.x]) for p in points))[:2]:
            channel = telling_channel(maps, prediction, index)
            title = f"channel {channel} tells {classes[index]}"
            panels.append(titled(heatmap(maps[channel], size, color=True), title))
    panels.append(titled(overlay(image, prediction, palette), "prediction"))
    present = set(np.unique(prediction).tolist())
    if truth is not None:
        panels.append(titled(overlay(image, truth, palette), "truth"))
        present |= set(np.unique(truth).tolist()) - {IGNORE}
    body = arrange(panels)
    return np.vstack((body, legend(classes, palette, sorted(present), body.shape[1])))
