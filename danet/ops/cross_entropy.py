"""Cross entropy of coarse logits against a fine mask, without the fine logits of a whole batch.

Logits of a head are 64 times smaller than its mask at output stride 8. Upsampled, they and their
gradient would be the largest tensors of a training step (19 classes, 8 crops of 768 x 768: 340 MiB
each, for every output of the network). Here images are upsampled a few at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from danet.ops.resize import resize, resize_backward
from danet.ops.tiles import without_autocast
from danet.types import IGNORE

ELEMENTS_PER_CHUNK = 2**23
"""Fine logits of a chunk (32 MiB of float32), unless a single image has more."""


def pixel_losses(logits: Tensor, target: Tensor, *, align_corners: bool = True) -> Tensor:
    """Returns -log p[y] of every pixel, without gradient.

    Args:
        logits: (B, K, h, w), of any floating type; upsampled and computed in float32, or in
            float64 if they are.
        target: int64 (B, H, W), class indices or IGNORE; h <= H and w <= W.
        align_corners: How logits are upsampled.

    Returns:
        (B, H, W), float32 or float64; 0 where the target is IGNORE.
    """
    with torch.no_grad():
        parts = [
            _nll(resize(coarse, _size(y), align_corners=align_corners).log_softmax(dim=1), y)
            for coarse, y in _chunks(logits, target)
        ]
    return torch.cat(parts)


def cross_entropy_sum(
    logits: Tensor, target: Tensor, weights: Tensor, *, align_corners: bool = True
) -> Tensor:
    """Returns ``sum(weights * pixel_losses(logits, target))``, with gradient to the logits.

    The gradient is computed on the way, so that nothing of the size of the mask is kept for
    backward. The weights get none.

    Logits, target and ``align_corners`` are those of ``pixel_losses``; ``weights`` are (B, H, W),
    finite, and 0 where the target is IGNORE.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CrossEntropySum.apply(logits, target, weights, align_corners)
    return (pixel_losses(logits, target, align_corners=align_corners) * weights).sum()


class _CrossEntropySum(torch.autograd.Function):
    """The sum, and with it its gradient: (softmax - onehot) * weights, sent back to the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weights: Tensor, align_corners: bool
    ) -> Tensor:
        sums: list[Tensor] = []
        gradients: list[Tensor] = []
        chunks = zip(_chunks(logits, target), _split(weights, logits, target), strict=True)
        for (coarse, y), w in chunks:
            fine = resize(coarse, _size(y), align_corners=align_corners)
            log_p = fine.log_softmax(dim=1)  # (b, K, H, W)
            sums.append((_nll(log_p, y) * w).sum())
            gradient = _softmax_minus_onehot(log_p, y).mul_(w.unsqueeze(1))
            size = (coarse.shape[2], coarse.shape[3])
            with without_autocast(logits.device.type):
                gradients.append(resize_backward(gradient, size, align_corners=align_corners))
        ctx.save_for_backward(torch.cat(gradients))  # (B, K, h, w)
        ctx.dtype = logits.dtype
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # Rounded to half precision only here: sums over many pixels are divided by their number.
        return (gradient * upstream).to(ctx.dtype), None, None, None


def _chunks(logits: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields a few images at a time: logits in float32 (or float64) and their targets."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # Softmax wants plain NCHW order; turning the coarse logits is cheaper than the fine ones.
    wide = logits.to(dtype, memory_format=torch.contiguous_format)
    yield from zip(_split(wide, logits, target), _split(target, logits, target), strict=True)


def _split(x: Tensor, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Splits along B so that the fine logits of a part stay within ELEMENTS_PER_CHUNK."""
    of_an_image = logits.shape[1] * target[0].numel()
    return x.split(max(1, ELEMENTS_PER_CHUNK // of_an_image))


def _size(target: Tensor) -> tuple[int, int]:
    return target.shape[1], target.shape[2]


def _nll(log_p: Tensor, target: Tensor) -> Tensor:
    """Maps log-probabilities (b, K, H, W) to -log p[y], (b, H, W); 0 where ignored."""
    return F.nll_loss(log_p, target, ignore_index=IGNORE, reduction="none")


def _softmax_minus_onehot(log_p: Tensor, target: Tensor) -> Tensor:
    """Turns log-probabilities (b, K, H, W) into the gradient of -log p[y], in their own memory."""
    truth = target.masked_fill(target == IGNORE, 0).unsqueeze(1)  # (b, 1, H, W)
    p = log_p.exp_()
    return p.scatter_(1, truth, p.gather(1, truth) - 1)
