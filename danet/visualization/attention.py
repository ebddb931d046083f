"""Attention maps of a network, as numbers; images are uint8 (H, W, 3), RGB."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danet.models.heads.dual import AttentionBranch


class Point(NamedTuple):
    """A pixel of the image."""

    x: int
    y: int


def attention_branches(model: nn.Module) -> dict[str, AttentionBranch]:
    """Return the branches of a network's head: "position", "channel", both, or none."""
    found = {name: getattr(model.head, name, None) for name in ("position", "channel")}
    return {name: part for name, part in found.items() if isinstance(part, AttentionBranch)}


def as_tensor(image: np.ndarray, model: nn.Module) -> Tensor:
    """Return an image, uint8 (H, W, 3), as uint8 (1, 3, H, W) on the device of a network."""
    device = next(model.parameters()).device
    return torch.from_numpy(image).permute(2, 0, 1)[None].to(device)


def _attention_and_input(model: Any, name: str, image: np.ndarray) -> tuple[Any, Tensor]:
    """Return the attention of a branch and the features that enter it, (1, C, h, w)."""
    branch, shared = attention_branches(model)[name], getattr(model.head, "shared", nn.Identity())
    features = model.backbone(model.normalise(as_tensor(image, model)))[-1]
    return branch.attention, branch.reduce(shared(features))


@torch.inference_mode()
def position_maps(model: nn.Module, image: np.ndarray, points: Sequence[Point]) -> Tensor:
    """Return the rows of the position attention of chosen pixels.

    Args:
        model: A Segmentor whose head has position attention, in eval mode.
        image: One that passes the network as a whole.
        points: P pixels of it.

    Returns:
        (P, h, w) at the resolution of the head, each map with sum 1.
    """
    attention, x = _attention_and_input(model, "position", image)
    (rows, columns), (height, width) = x.shape[-2:], image.shape[:2]
    # Only the rows asked for: the whole map has N x N weights.
    index = [p.y * rows // height * columns + p.x * columns // width for p in points]
    return attention.rows(x, torch.tensor(index, device=x.device))[0]


@torch.inference_mode()
def channel_maps(model: nn.Module, image: np.ndarray) -> Tensor:
    """Return the output of the channel attention for an image, (C, h, w)."""
    attention, x = _attention_and_input(model, "channel", image)
    return attention(x)[0]


@torch.inference_mode()
def queries_and_keys(model: nn.Module, image: np.ndarray) -> tuple[Tensor, Tensor]:
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
    """Choose pixels deep inside regions of classes, one of each.

    Args:
        prediction: Classes (H, W).
        count: Without ``wanted``, the most points: the rarest classes that fill 1/500 of the image.
        wanted: Classes; those of them that occur are chosen.
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
