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


def _attention_input(model: nn.Module, part: AttentionBranch, image: Tensor) -> Tensor:
    """Return the features that enter the attention of a branch, (B, C, h, w)."""
    shared = getattr(model.head, "shared", None)
    features = model.features(image)  # type: ignore[operator]
    return part.reduce(shared(features) if isinstance(shared, nn.Module) else features)


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
    part = attention_branch(model, "position")
    assert part is not None
    x = _attention_input(model, part, image)
    rows, columns = x.shape[-2:]
    height, width = image.shape[-2:]
    # Only the rows asked for: the whole map has N x N weights.
    index = [p.y * rows // height * columns + p.x * columns // width for p in points]
    return part.attention.rows(x, torch.tensor(index, device=x.device))[0]  # type: ignore[operator]


@torch.inference_mode()
def channel_maps(model: nn.Module, image: Tensor) -> Tensor:
    """Return the output of the channel attention, (C, h, w), for one image (1, 3, H, W)."""
    part = attention_branch(model, "channel")
    assert part is not None
    return part.attention(_attention_input(model, part, image))[0]


@torch.inference_mode()
def class_map(model: nn.Module, image: Tensor, prediction: np.ndarray, index: int) -> Tensor:
    """Return the mean of the position attention over the pixels of a class, (h, w) with sum 1.

    Args:
        model: A Segmentor whose head has position attention.
        image: (1, 3, H, W) RGB in 0..255.
        prediction: Classes (H, W).
        index: The class; it must occur.
    """
    part = attention_branch(model, "position")
    assert part is not None
    x = _attention_input(model, part, image)
    inside = torch.from_numpy((prediction == index).astype(np.float32))[None, None]
    share = F.adaptive_avg_pool2d(inside, (x.shape[-2], x.shape[-1]))[0, 0]
    # Cells mostly of the class; of a class too small for that, the cell with most of it.
    cells = (share >= min(0.5, share.max().item())).flatten().nonzero()[:, 0].to(x.device)
    total = sum(part.attention.rows(x, some)[0].sum(dim=0) for some in cells.split(_ROWS))  # type: ignore[operator]
    assert isinstance(total, Tensor)
    return total / len(cells)


@torch.inference_mode()
def queries_and_keys(model: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the queries and the keys of the position attention, each float32 (D, h, w).

    The weights of position i are the softmax over j of query_i . key_j.
    """
    part = attention_branch(model, "position")
    assert part is not None
    x = _attention_input(model, part, image)
    module: Any = part.attention
    return module.query(x)[0].float(), module.key(x)[0].float()


def rank_channels(maps: Tensor, prediction: np.ndarray, index: int) -> list[tuple[int, float]]:
    """Return all channels with how well each separates a class from the rest, the best first.

    The score is the difference of the means inside and outside of the class, in standard
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
    # Stable, so that equal channels keep their order from run to run.
    values, order = ((mean_inside - mean_outside) / spread).sort(descending=True, stable=True)
    return list(zip(order.tolist(), values.tolist(), strict=True))


def choose_points(
    prediction: np.ndarray, *, count: int = 3, wanted: Sequence[int] = ()
) -> list[Point]:
    """Choose pixels deep inside regions: of the wanted classes, else of the rarest ones.

    Args:
        prediction: Classes (H, W).
        count: How many at most.
        wanted: Classes; one point is put on each of those that occur.
    """
    chosen = choose_classes(prediction, count=count, wanted=wanted)
    return [_innermost(prediction == index) for index in chosen]


def choose_classes(
    prediction: np.ndarray, *, count: int = 3, wanted: Sequence[int] = ()
) -> list[int]:
    """Choose classes that occur: the wanted ones, else the rarest that fill 1/500 of the image."""
    sizes = {
        int(c): int(n) for c, n in zip(*np.unique(prediction, return_counts=True), strict=True)
    }
    if wanted:
        return [index for index in wanted if index in sizes]
    # A region of a few pixels is as likely a mistake as an object.
    visible = [index for index, size in sizes.items() if size >= prediction.size // 500]
    return sorted(visible, key=lambda index: sizes[index])[:count]


def _innermost(region: np.ndarray) -> Point:
    """Return the pixel of a region that is farthest from its border."""
    # Padded, since the distance transform does not count the edge of the image as a border.
    padded = np.pad(region.astype(np.uint8), 1)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), region.shape)
    return Point(int(x), int(y))


def has_attention(model: nn.Module) -> bool:
    """Return whether a network has position or channel attention."""
    return (
        attention_branch(model, "position") is not None
        or attention_branch(model, "channel") is not None
    )
