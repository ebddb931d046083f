"""The network in operations that exporters support: every size, attention in tiles."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from danet.ops.attention import PositionAttention
from danet.ops.tiles import QUERIES_PER_TILE

SMALLEST = 9
"""Smallest side for an exported program: maps of one cell would be resized otherwise."""


class Exportable(nn.Module):
    """A copy of a Segmentor that maps an image, uint8 (B, 3, H, W) RGB, to logits (B, K, H, W).

    In training and evaluation position attention is a custom operator, which other runtimes lack.
    Here it is a ``scan`` over tiles of queries: ONNX has that as the operator Scan, and
    torch.export as a higher-order operator. So a program runs elsewhere, takes every size, and
    holds 512 x N weights at a time and never N x N.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        for module in list(self.network.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, PositionAttention):
                    setattr(module, name, _ScannedAttention(child))

    def forward(self, image: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to (B, K, H, W)."""
        logits: Tensor = self.network(image).logits
        return logits


class _ScannedAttention(nn.Module):
    """A PositionAttention in operations that exporters support."""

    def __init__(self, attention: PositionAttention) -> None:
        super().__init__()
        self.query, self.key = attention.query, attention.key
        self.value, self.gamma = attention.value, attention.gamma

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, H, W)."""
        query = self.query(x).flatten(2).transpose(1, 2)  # (B, N, D)
        context = attend_by_scan(query, self.key(x).flatten(2), self.value(x).flatten(2))
        return x + self.gamma * context.unflatten(2, x.shape[2:])


def attend_by_scan(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute softmax(query key) value, one tile of queries after another.

    Args:
        query: (B, N, D).
        key: (B, D, N).
        value: (B, C, N).

    Returns:
        (B, C, N).
    """
    batch, count, width = query.shape
    # A scan needs tiles of one size; the result of the padding is cut off. Two tiles more than are
    # full, so that there is never one alone and always some padding: exporters specialise on both.
    tiles = count // QUERIES_PER_TILE + 2
    padded = F.pad(query, (0, 0, 0, tiles * QUERIES_PER_TILE - count))
    tokens = value.transpose(1, 2)  # (B, N, C)

    def step(carry: Tensor, tile: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.bmm(tile, key).softmax(dim=-1)  # (B, tile, N)
        return carry.clone(), torch.bmm(weights, tokens)  # a carry must not alias its input

    # (tiles, B, tile, D)
    by_tile = padded.view(batch, tiles, QUERIES_PER_TILE, width).transpose(0, 1)
    _, found = scan(step, query.new_zeros(1), by_tile, dim=0)  # (tiles, B, tile, C)
    return found.permute(1, 3, 0, 2).flatten(2)[:, :, :count]
