"""Attention maps of a network, as numbers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danet.models.heads.dual import AttentionBranch

_ROWS = 512
"""Rows of the attention map (N, N) held in memory at a time."""


class Point(NamedTuple):
    """A pixel of the image."""

    x: int
    y: int


def attention_branch(model: nn.Module, name: str) -> AttentionBranch | None:
    """Return the branch "position" or "channel" of a network's head, None where it has none."""
    found = getattr(model.head, name, None)
    return found if isinstance(found, AttentionBranch) else None


def has_attention(model: nn.Module) -> bool:
    """Return whether a network has position or channel attention."""
    return any(attention_branch(model, name) for name in ("position", "channel"))


def _attention_and_input(model: Any, name: str, image: Tensor) -> tuple[Any, Tensor]:
    """Return the attention of a branch and the features that enter it, (B, C, h, w)."""
    branch = attention_branch(model, name)
    assert branch is not None
    shared = getattr(model.head, "shared", None)
    features = model.backbone(model.normalise(image))[-1]
    x = branch.reduce(shared(features) if isinstance(shared, nn.Module) else features)
    return branch.attention, x


@torch.inference_mode()
def position_maps(model: nn.Module, image: Tensor, points: Sequence[Point]) -> Tensor:
    """Return the rows of the position attention of chosen pixels.

    Args:
        model: A Segmentor whose head has position attention.
        image: (1, 3, H, W) RGB in 0..255.
        points: P pixels of it.

    Returns:
        (P, h, w) at the resolution of the head, each map with sum 1.
    """
    attention, x = _attention_and_input(model, "position", image)
    rows, columns = x.shape[-2:]
    height, width = image.shape[-2:]
    # Only the rows asked for: the whole map has N x N weights.
    index = [p.y * rows // height * columns + p.x * columns // width for p in points]
    return attention.rows(x, torch.tensor(index, device=x.device))[0]


@torch.inference_mode()
def channel_maps(model: nn.Module, image: Tensor) -> Tensor:
    """Return the output of the channel attention, (C, h, w), for one image (1, 3, H, W)."""
    attention, x = _attention_and_input(model, "channel", image)
    return attention(x)[0]


@torch.inference_mode()
def class_map(model: nn.Module, image: Tensor, prediction: np.ndarray, index: int) -> Tensor:
    """Return the mean of the position attention over the pixels of a class, (h, w) with sum 1.

    Args:
        model: A Segmentor whose head has position attention.
        image: (1, 3, H, W) RGB in 0..255.
        prediction: Classes (H, W).
        index: The class; it must occur.
    """
    attention, x = _attention_and_input(model, "position", image)
    share = _share_of(prediction == index, x)
    # Cells mostly of the class; of a class too small for that, the cell with most of it.
    cells = (share >= share.max().clamp(max=0.5)).flatten().nonzero()[:, 0]
    return sum(attention.rows(x, some)[0].sum(dim=0) for some in cells.split(_ROWS)) / len(cells)


def _share_of(region: np.ndarray, features: Tensor) -> Tensor:
    """Return the share, 0..1, of each cell of features (..., h, w) that is in a region (H, W)."""
    inside = torch.from_numpy(region.astype(np.float32))[None]
    size = (features.shape[-2], features.shape[-1])
    return F.adaptive_avg_pool2d(inside, size)[0].to(features.device)


@torch.inference_mode()
def queries_and_keys(model: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the queries and the keys of the position attention, each float32 (D, h, w).

    The weights of position i are the softmax over j of query_i . key_j.
    """
    attention, x = _attention_and_input(model, "position", image)
    return attention.query(x)[0].float(), attention.key(x)[0].float()


def rank_channels(maps: Tensor, prediction: np.ndarray, index: int) -> list[tuple[int, float]]:
    """Return all channels with how well each separates a class from the rest, the best first.

    The score is the difference of the means inside and outside of the class, in standard
    deviations of the channel.

    Args:
        maps: (C, h, w).
        prediction: Classes (H, W).
        index: The class; it must occur and not fill the picture.
    """
    inside, maps = _share_of(prediction == index, maps), maps.float()
    mean_inside = (maps * inside).sum(dim=(1, 2)) / inside.sum().clamp(min=1e-6)
    mean_outside = (maps * (1 - inside)).sum(dim=(1, 2)) / (1 - inside).sum().clamp(min=1e-6)
    spread = maps.flatten(1).std(dim=1).clamp(min=1e-6)
    # Stable, so that equal channels keep their order from run to run.
    values, order = ((mean_inside - mean_outside) / spread).sort(descending=True, stable=True)
    return list(zip(order.tolist(), values.tolist(), strict=True))


def choose_points(
    prediction: np.ndarray, *, count: int = 3, wanted: Sequence[int] = ()
) -> list[Point]:
    """Choose pixels deep inside regions of classes, one of each that choose_classes returns."""
    points = []
    for index in choose_classes(prediction, count=count, wanted=wanted):
        # Padded, since the distance transform does not count the edge of the image as a border.
        region = np.pad((prediction == index).astype(np.uint8), 1)
        distance = cv2.distanceTransform(region, cv2.DIST_L2, 5)[1:-1, 1:-1]
        y, x = np.unravel_index(distance.argmax(), distance.shape)
        points.append(Point(int(x), int(y)))
    return points


def choose_classes(
    prediction: np.ndarray, *, count: int = 3, wanted: Sequence[int] = ()
) -> list[int]:
    """Choose classes that occur: the wanted ones, else the rarest that fill 1/500 of the image.

    Args:
        prediction: Classes (H, W).
        count: How many of the rarest at most.
        wanted: Classes; those of them that occur are chosen.
    """
    values, counts = np.unique(prediction, return_counts=True)
    sizes = dict(zip(values.tolist(), counts.tolist(), strict=True))
    if wanted:
        return [index for index in wanted if index in sizes]
    # A region of a few pixels is as likely a mistake as an object.
    visible = [index for index, size in sizes.items() if size >= prediction.size // 500]
    return sorted(visible, key=lambda index: sizes[index])[:count]
