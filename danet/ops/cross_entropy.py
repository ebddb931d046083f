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
from danet.types import ignore_index

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
    """Return -log p[y] of every pixel, (B, H, W), without gradient; 0 where it is ignored.

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
    logits: Tensor,
    target: Tensor,
    weights: Tensor,
    *,
    gamma: float = 0.0,
    smoothing: Tensor | None = None,
    align_corners: bool = True,
) -> Tensor:
    """Return ``sum(weights * (1 - p[y]) ** gamma * pixel_losses(logits, target))``.

    It is differentiable in the logits alone. The forward pass computes the gradient as well, so
    that nothing of the size of the mask is kept for backward.

    Args:
        logits: (B, K, h, w), upsampled as in ``pixel_losses``.
        target: int64 (B, H, W).
        weights: (B, H, W), finite, and 0 where the target is ignored.
        gamma: Exponent of the focal loss, at least 0.
        smoothing: (K,); ``-sum_c smoothing[c] * log p[c]`` of every labelled pixel is added.
        align_corners: How the logits are upsampled.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CrossEntropySum.apply(logits, target, weights, gamma, smoothing, align_corners)
    sums = []
    for coarse, y, w in _chunks(logits, target, weights):
        log_p = resize(coarse, y.shape[1:], align_corners=align_corners).log_softmax(dim=1)
        sums.append(_sum(log_p, y, w, gamma, smoothing)[0])
    return torch.stack(sums).sum()


class _CrossEntropySum(torch.autograd.Function):
    """Weighted sum and its gradient, resized to the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weights: Tensor,
        gamma: float,
        smoothing: Tensor | None,
        align_corners: bool,
    ) -> Tensor:
        sums: list[Tensor] = []
        gradients: list[Tensor] = []
        for coarse, y, w in _chunks(logits, target, weights):
            fine = resize(coarse, y.shape[1:], align_corners=align_corners)  # (b, K, H, W)
            log_p = fine.log_softmax(dim=1)  # (b, K, H, W)
            total, slope = _sum(log_p, y, w, gamma, smoothing)
            sums.append(total)
            gradient = _gradient(log_p, y, slope, smoothing)  # (b, K, H, W)
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
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # Rounded to half precision only here, since upstream divides by the number of pixels.
        return (gradient * upstream).to(ctx.dtype), None, None, None, None, None


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
    return F.nll_loss(log_p, target, ignore_index=ignore_index(log_p.shape[1]), reduction="none")


def _sum(
    log_p: Tensor, target: Tensor, weights: Tensor, gamma: float, smoothing: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the sum of a chunk, and the derivative of its terms by -log p[y], (b, H, W).

    With ``smoothing`` the log-probabilities (b, K, H, W) of ignored pixels are overwritten with 0.
    """
    nll = _nll(log_p, target)
    if gamma:
        rest = -torch.expm1(-nll)  # 1 - p[y], exact where p[y] is nearly 1
        focus = weights * rest.pow(gamma)
        # Where p[y] is 1 both are 0, also for gamma < 1, whose power of gamma - 1 is infinite.
        ratio = nll / rest.clamp(min=torch.finfo(nll.dtype).tiny)
        total, slope = (focus * nll).sum(), focus * (1 + gamma * (1 - rest) * ratio)
    else:
        total, slope = (nll * weights).sum(), weights
    if smoothing is not None:
        log_p.masked_fill_((target == ignore_index(log_p.shape[1])).unsqueeze(1), 0.0)
        total = total - (log_p.sum(dim=(0, 2, 3)) * smoothing).sum()
    return total, slope


def _gradient(log_p: Tensor, target: Tensor, slope: Tensor, smoothing: Tensor | None) -> Tensor:
    """Overwrite log-probabilities (b, K, H, W) with the gradient of ``_sum``.

    That of -log p[c] is the softmax minus the one-hot vector of c.
    """
    valid = target != ignore_index(log_p.shape[1])
    # Ignored pixels are treated as class 0; their slope of 0 cancels that.
    truth = target.masked_fill(~valid, 0).unsqueeze(1)  # (b, 1, H, W)
    p = log_p.exp_()
    if smoothing is None:
        return _add_to_class(p, truth, -1.0).mul_(slope.unsqueeze(1))
    share = smoothing.sum() * valid
    gradient = p.mul_((slope + share).unsqueeze(1))
    gradient.addcmul_(
        smoothing.to(p.dtype).view(-1, 1, 1), valid.unsqueeze(1).to(p.dtype), value=-1
    )
    return _add_to_class(gradient, truth, -slope.unsqueeze(1))


def _add_to_class(x: Tensor, truth: Tensor, value: Tensor | float) -> Tensor:
    """Add a value to the true class of every pixel, in place."""
    return x.scatter_(1, truth, x.gather(1, truth) + value)
