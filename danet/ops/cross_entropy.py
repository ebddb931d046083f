"""Cross entropy of coarse logits against a fine mask, without the fine logits of a whole batch.

At output stride 8 a mask has 64 times the pixels of the logits. Upsampled, the logits and their
gradient would be the largest tensors of a training step (19 classes, 8 crops of 768 x 768: 340 MiB
each, for every output of the network). Here images are upsampled a few at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from danet.ops.arithmetic import without_autocast
from danet.ops.resize import resize, resize_backward
from danet.types import IGNORE

ELEMENTS_PER_CHUNK = {"cpu": 2**23, "cuda": 2**26}
"""Largest number of fine logits in a chunk by type of device, unless one image has more: 32 MiB of
float32 on a CPU, whose caches they exceed anyway; 256 MiB on CUDA, where every chunk costs the
start of twenty kernels."""


@contextmanager
def chunks_as_on(device_type: str) -> Iterator[None]:
    """Cut the batches of a CPU as on another type of device, to predict the memory there."""
    kept = ELEMENTS_PER_CHUNK["cpu"]
    ELEMENTS_PER_CHUNK["cpu"] = ELEMENTS_PER_CHUNK[device_type]
    try:
        yield
    finally:
        ELEMENTS_PER_CHUNK["cpu"] = kept


def pixel_losses(logits: Tensor, target: Tensor, *, align_corners: bool = True) -> Tensor:
    """Return -log p[y] of every pixel, (B, H, W), without gradient; 0 where the target is IGNORE.

    Logits (B, K, h, w) are upsampled to the target, int64 (B, H, W), and computed in float32, or in
    float64 for float64 logits.
    """
    with torch.no_grad():
        parts = [
            _nll(resize(coarse, y.shape[1:], align_corners=align_corners).log_softmax(dim=1), y)
            for coarse, y in _chunks(logits, target)
        ]
    return torch.cat(parts)  # (B, H, W)


def cross_entropy_sum(
    logits: Tensor, target: Tensor, weights: Tensor, *, align_corners: bool = True
) -> Tensor:
    """Return ``sum(weights * pixel_losses(logits, target))``, differentiable in the logits.

    The forward pass computes the gradient as well, so that nothing of the size of the mask is kept
    for backward. The weights get no gradient.

    Weights are (B, H, W), finite, and 0 where the target is IGNORE.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CrossEntropySum.apply(logits, target, weights, align_corners)
    return (pixel_losses(logits, target, align_corners=align_corners) * weights).sum()


class _CrossEntropySum(torch.autograd.Function):
    """Weighted sum and its gradient, (softmax - onehot) * weights, resized to the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weights: Tensor, align_corners: bool
    ) -> Tensor:
        sums: list[Tensor] = []
        gradients: list[Tensor] = []
        for coarse, y, w in _chunks(logits, target, weights):
            fine = resize(coarse, y.shape[1:], align_corners=align_corners)  # (b, K, H, W)
            log_p = fine.log_softmax(dim=1)  # (b, K, H, W)
            sums.append((_nll(log_p, y) * w).sum())
            gradient = _softmax_minus_onehot(log_p, y).mul_(w.unsqueeze(1))  # (b, K, H, W)
            # Its matrix products would run in half precision under autocast.
            with without_autocast(logits.device.type):
                gradients.append(
                    resize_backward(gradient, coarse.shape[2:], align_corners=align_corners)
                )
        ctx.save_for_backward(torch.cat(gradients))  # (B, K, h, w)
        ctx.dtype = logits.dtype
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # Rounded to half precision only here, since upstream divides by the number of pixels.
        return (gradient * upstream).to(ctx.dtype), None, None, None


def _chunks(logits: Tensor, *maps: Tensor) -> list[tuple[Tensor, ...]]:
    """Return a few images at a time: logits in float32 (or float64), and of each map (B, H, W)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Softmax is fast in plain NCHW order; converting the coarse logits is cheaper than the fine.
    wide = logits.to(dtype, memory_format=torch.contiguous_format)
    per_image = logits.shape[1] * maps[0][0].numel()  # K * H * W
    limit = ELEMENTS_PER_CHUNK["cuda" if logits.is_cuda else "cpu"]
    size = max(1, limit // per_image)
    return list(zip(*[x.split(size) for x in (wide, *maps)], strict=True))


def _nll(log_p: Tensor, target: Tensor) -> Tensor:
    """Maps log-probabilities (b, K, H, W) to -log p[y], (b, H, W); 0 where ignored."""
    return F.nll_loss(log_p, target, ignore_index=IGNORE, reduction="none")


def _softmax_minus_onehot(log_p: Tensor, target: Tensor) -> Tensor:
    """Overwrite log-probabilities (b, K, H, W) with the gradient of -log p[y]."""
    # Ignored pixels are treated as class 0; their weight of 0 cancels that.
    truth = target.masked_fill(target == IGNORE, 0).unsqueeze(1)  # (b, 1, H, W)
    p = log_p.exp_()
    return p.scatter_(1, truth, p.gather(1, truth) - 1)
