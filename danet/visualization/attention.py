"""Attention of a network: its maps, what they amount to, and the columns of the paper's figure 6.

Images are uint8 (H, W, 3), RGB, or raw bands (H, W, N).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danet.bands import as_input
from danet.datasets.base import SegmentationDataset
from danet.evaluation.evaluate import Inference
from danet.models.heads.dual import AttentionBranch
from danet.ops.attention import ChannelAttention, PositionAttention
from danet.ops.diagnostics import diagnose
from danet.visualization.overlay import Legend, SegmentedImage, compose, enlarge, resize, sheet

_MARK, _EDGE = (255, 255, 255), (0, 0, 0)
_DEGREES = ((1, "far stronger"), (0.25, "stronger"), (-math.inf, "not stronger"))
"""Least score of ``rank_channels``, and how a title says it."""

# What ``explain`` goes by; round numbers, no results of a study.
EVEN = 0.7  # of all columns: a row with the entropy of so many is nearly uniform
SAME, OWN = 0.8, 0.5  # mean cosine of two rows from which on they are alike; below, they differ
SLIGHT = 0.05  # of the norm of the features: what moves them by less hardly counts


class Point(NamedTuple):
    """A pixel of the image."""

    x: int
    y: int


def attention_branches(model: nn.Module) -> dict[str, AttentionBranch]:
    """Return the branches of a network's head: "position", "channel", both, or none."""
    found = {name: getattr(model.head, name, None) for name in ("position", "channel")}
    return {name: part for name, part in found.items() if isinstance(part, AttentionBranch)}


def as_tensor(image: np.ndarray, model: nn.Module) -> Tensor:
    """Return an image (H, W, N) as (1, N, H, W), uint8 or float, on the device of a network."""
    device = next(model.parameters()).device
    return torch.from_numpy(as_input(image)).permute(2, 0, 1)[None].to(device)


@torch.no_grad()
def features_of(model: Any, image: np.ndarray) -> Tensor:
    """Return what enters the branches of a head for an image, (1, C, h, w)."""
    shared = getattr(model.head, "shared", nn.Identity())
    features: Tensor = shared(model.backbone(model.normalise(as_tensor(image, model)))[-1])
    return features


@torch.no_grad()
def attention_and_input(model: nn.Module, name: str, features: Tensor) -> tuple[Any, Tensor]:
    """Return the attention of a branch and its input, (1, c, h, w), of ``features_of`` an image."""
    branch = attention_branches(model)[name]
    return branch.attention, branch.reduce(features)


@torch.inference_mode()
def channel_maps(model: nn.Module, image: np.ndarray) -> Tensor:
    """Return the output of the channel attention for an image, (C, h, w)."""
    attention, x = attention_and_input(model, "channel", features_of(model, image))
    return attention(x)[0]


@torch.inference_mode()
def queries_and_keys(model: nn.Module, image: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the queries and the keys of the position attention, each float32 (D, h, w).

    The weights of position i are the softmax over j of query_i . key_j. Registers are left out, so
    these are weights among the positions, with sum 1 whatever the registers take.
    """
    attention, x = attention_and_input(model, "position", features_of(model, image))
    query, key = attention.project(x)  # (1, N, D), (1, N + registers, D)
    query, key = (part[0, : query.shape[1]].T.float() for part in (query, key))
    return query.unflatten(1, x.shape[2:]), key.unflatten(1, x.shape[2:])


def diagnose_attention(
    model: nn.Module, images: Iterable[np.ndarray]
) -> dict[str, dict[str, float]]:
    """Return the figures of ``diagnose`` for each branch, their mean over some images.

    Each image passes the network whole, which is in eval mode. Branches with an attention that is
    neither of the two of DANet are left out.
    """
    known = PositionAttention, ChannelAttention
    names = [n for n, b in attention_branches(model).items() if isinstance(b.attention, known)]
    found = defaultdict(list)
    for image in images if names else ():
        features = features_of(model, image)
        for name in names:
            found[name].append(diagnose(*attention_and_input(model, name, features)))
    return {name: {key: fmean(x[key] for x in of) for key in of[0]} for name, of in found.items()}


def explain(name: str, found: Mapping[str, float]) -> str:
    """Say in two sentences what the figures of a branch, "position" or "channel", mean."""
    size, effective, cosine = found["size"], found["effective"], found["row_cosine"]
    figures = f"{effective:.3g} of {size:.0f}, mean cosine of two rows {cosine:.2f}"
    what = "vector to every position" if name == "position" else "map to every channel"
    if effective >= EVEN * size:
        text = f"Every {name} attends to nearly all others alike ({figures}): it adds an average."
    elif cosine >= SAME:
        share = f"{100 * found['on_strongest']:.0f} % of all attention on a single one"
        text = f"All {name}s attend to nearly the same {name}s ({figures}, {share}): the attention "
        text += f"adds nearly the same {what}."
    elif cosine >= OWN:
        text = f"The {name}s attend in part to the same {name}s ({figures})."
    else:
        text = f"The {name}s attend to {name}s of their own ({figures})."
    if "on_registers" in found:
        text += f" Registers take {100 * found['on_registers']:.0f} % of the attention."
    gamma, moved = found["gamma"], f"{100 * found['moved']:.2g} % of their norm"
    if gamma == 0:
        return f"{text} gamma is 0, so the attention adds nothing: the head is one without it."
    text += f" gamma is {gamma:.2g}, so the attention moves the features by {moved}"
    return text + (": the head is nearly one without it." if found["moved"] < SLIGHT else ".")


def position_maps(model: nn.Module, image: np.ndarray, points: Sequence[Point]) -> Tensor:
    """Return the position attention of P pixels of an image, which passes the network whole.

    Maps are (P, h, w) at the resolution of the head, each with sum 1.
    """
    queries, keys = queries_and_keys(model, image)
    (rows, columns), (height, width) = keys.shape[1:], image.shape[:2]
    # Only the rows asked for: the whole map has N x N weights.
    index = [p.y * rows // height * columns + p.x * columns // width for p in points]
    energies = queries.flatten(1)[:, index].T @ keys.flatten(1)  # (P, N)
    return energies.softmax(dim=-1).unflatten(1, (rows, columns))


def rank_channels(maps: Tensor, prediction: np.ndarray, index: int) -> list[tuple[int, float]]:
    """Return all channels with how well each separates a class from the rest, the best first.

    The score is the difference of the means of a map (C, h, w) inside and outside of the class, in
    standard deviations. The class must occur in the prediction (H, W) and not fill it.
    """
    maps, (_, rows, columns) = maps.float(), maps.shape
    region = torch.from_numpy(prediction == index).to(maps)
    inside = F.adaptive_avg_pool2d(region[None], (rows, columns))[0]  # share of each cell, (h, w)
    mean_inside = (maps * inside).sum(dim=(1, 2)) / inside.sum().clamp(min=1e-6)
    mean_outside = (maps * (1 - inside)).sum(dim=(1, 2)) / (1 - inside).sum().clamp(min=1e-6)
    spread = maps.flatten(1).std(dim=1).clamp(min=1e-6)
    # Stable, so that equal channels keep their order from run to run.
    values, order = ((mean_inside - mean_outside) / spread).sort(descending=True, stable=True)
    return list(zip(order.tolist(), values.tolist(), strict=True))


def choose_points(
    prediction: np.ndarray, *, count: int = 3, wanted: Sequence[int] = ()
) -> list[Point]:
    """Choose pixels of a prediction (H, W) deep inside regions of classes, one of each.

    The classes are those ``wanted`` that occur, else up to ``count``: the rarest that fill 1/500 of
    the image.
    """
    values, counts = np.unique(prediction, return_counts=True)
    # A region of a few pixels is as likely a mistake as an object.
    visible = values[np.argsort(counts, kind="stable")][np.sort(counts) >= prediction.size // 500]
    points = []
    for index in [c for c in wanted if c in values] if wanted else visible[:count]:
        # Padded, since the distance transform does not count the edge of the image as a border.
        region = np.pad((prediction == index).astype(np.uint8), 1)
        distance = cv2.distanceTransform(region, cv2.DIST_L2, 5)[1:-1, 1:-1]
        y, x = np.unravel_index(distance.argmax(), distance.shape)
        points.append(Point(int(x), int(y)))
    return points


def heatmap(values: Tensor, image: np.ndarray) -> np.ndarray:
    """Draw a map (h, w) over an image (H, W, 3), dimmed, in the colours of "inferno".

    Values up to the mean of the map show the image alone. Above it the strength is the root of the
    distance to the mean, so that small ones can be seen, and 1 at the maximum.
    """
    small = values.float().cpu().numpy()
    above = np.maximum(small - small.mean(), 0)
    # The maximum of a constant map is 0 here.
    root = np.sqrt(above / max(float(above.max()), 1e-12))
    strength = cv2.resize(root, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)[..., None]
    heat = cv2.applyColorMap(np.rint(255 * strength).astype(np.uint8), cv2.COLORMAP_INFERNO)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    dimmed = 0.35 * image + 0.35 * grey  # with half of its colour
    return np.minimum(heat[..., ::-1] + (1 - strength) * dimmed, 255).astype(np.uint8)


def main_class(values: Tensor, prediction: np.ndarray) -> tuple[int, float]:
    """Return the class of a prediction (H, W) that most of an attention map lies on, and its share.

    The map is (h, w), with sum 1; a cell belongs to the class in its middle.
    """
    weights = values.float().cpu().numpy()
    cells = cv2.resize(prediction, weights.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    shares = np.bincount(cells.ravel(), weights.ravel())
    return int(shares.argmax()), float(shares.max())


def mark_points(image: np.ndarray, points: Sequence[Point]) -> np.ndarray:
    """Return a copy of the image with numbered crosses."""
    image = image.copy()
    for number, point in enumerate(points, 1):
        cv2.drawMarker(image, tuple(point), _EDGE, cv2.MARKER_CROSS, 13, 3)
        cv2.drawMarker(image, tuple(point), _MARK, cv2.MARKER_CROSS, 11, 1)
        place = (min(point.x + 6, image.shape[1] - 12), max(point.y - 5, 12))
        for color, thickness in ((_EDGE, 3), (_MARK, 1)):
            font = cv2.FONT_HERSHEY_SIMPLEX, 0.5, color, thickness, cv2.LINE_AA
            cv2.putText(image, str(number), place, *font)
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

    Image with marked points (by default those of ``choose_points``), the position attention of each
    with the predicted class that most of it lies on, the channels that best separate the first two
    classes under the points (so many for a class), prediction, truth. A small picture is drawn at
    twice its size. The model is in eval mode.
    """
    _, image, prediction, truth = picture
    names, branches = legend.classes, attention_branches(model)
    points = choose_points(prediction) if points is None else points
    shown = [int(prediction[p.y, p.x]) for p in points]
    (large,) = enlarge([picture])
    factor, shown_image = len(large.image) // len(image), legend.show(large.image)
    marked = mark_points(shown_image, [Point(factor * p.x, factor * p.y) for p in points])
    panels = [("image and points", marked)]
    if points and "position" in branches:
        for number, values in enumerate(position_maps(model, image, points)):
            most, share = main_class(values, prediction)
            title = f"{number + 1} ({names[shown[number]]}) attends to {names[most]}"
            panels.append((f"{title} ({100 * share:.0f} %)", heatmap(values, shown_image)))
    if "channel" in branches:
        maps = channel_maps(model, image)  # (C, h, w)
        # A class that fills the picture has no outside for a channel to differ in.
        separable = [index for index in dict.fromkeys(shown) if not (prediction == index).all()]
        for index in separable[:2]:
            for channel, value in rank_channels(maps, prediction, index)[:channels]:
                words = next(text for least, text in _DEGREES if value >= least)
                title = f"channel {channel}, {words} on {names[index]}"
                panels.append((title, heatmap(maps[channel], shown_image)))
    panels.append(("prediction", legend.over(large.image, large.prediction)))
    if large.truth is not None:
        panels.append(("truth", legend.over(large.image, large.truth)))
    return compose(panels, legend, (prediction, truth))


@torch.inference_mode()
def validation_pictures(
    model: nn.Module, dataset: SegmentationDataset, infer: Inference, *, max_pixels: int
) -> dict[str, np.ndarray]:
    """Draw four evenly spaced samples, and the attention figure of every other one, by name.

    The model is put into eval mode. Attention is that of a whole image, made smaller if it has more
    than ``max_pixels``.
    """
    model.eval()
    bands = getattr(model, "bands", None)
    drawn, legend = {}, Legend(dataset.classes, dataset.palette, bands=bands)
    for place, index in enumerate(spread(len(dataset), 4)):
        image, mask, name = dataset[index]
        prediction = infer.predict(model, as_tensor(image, model))[0].cpu().numpy()
        picture = SegmentedImage(name, image, prediction, mask)
        drawn[name] = sheet(legend, picture)
        if place % 2 == 0 and attention_branches(model):
            small = for_one_pass(model, picture, max_pixels)
            drawn[f"{name}_attention"] = figure(model, small, legend)
    return drawn


def validation_diagnosis(
    model: nn.Module, dataset: SegmentationDataset, *, max_pixels: int
) -> dict[str, float]:
    """Diagnose the attention in four evenly spaced samples: "position/gamma" and the like.

    Empty without a branch of attention. The model and the sizes are as in ``validation_pictures``.
    """
    model.eval()
    samples = (dataset[index] for index in spread(len(dataset), 4))
    pictures = (SegmentedImage(name, image, mask) for image, mask, name in samples)
    images = (for_one_pass(model, picture, max_pixels).image for picture in pictures)
    found = diagnose_attention(model, images)
    return {f"{name}/{key}": value for name, of in found.items() for key, value in of.items()}


def for_one_pass(
    model: Any, picture: SegmentedImage, max_pixels: float = math.inf
) -> SegmentedImage:
    """Make a picture smaller if it has more pixels, or longer sides than the backbone computes."""
    shape = picture.prediction.shape
    sides = getattr(model.backbone, "size", None) or shape
    factors = (side / own for side, own in zip(sides, shape, strict=True))
    return resize(picture, min(1, math.sqrt(max_pixels / math.prod(shape)), *factors))


def spread(length: int, count: int) -> list[int]:
    """Return evenly spaced indices."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()
