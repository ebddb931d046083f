"""Batch norm over the batches of all processes, on any device, without a wait for the device.

torch's own runs on CUDA alone, and in each forward pass it asks the device how many processes have
an empty batch. Here all processes have batches of one size, as they have in training.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from danet.distributed.collectives import rank, world_size


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm whose mean and variance in training are those of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, ...) to the same shape."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        out, mean, variance = _Normalise.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._track(mean, variance, x.numel() // x.shape[1] * world_size())
        return out

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Update the running statistics by those of ``count`` values per channel."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(variance * (count / (count - 1)), factor)  # unbiased, as in torch

    def _check_input_dim(self, x: Tensor) -> None:
        """Accept images, sequences and vectors."""


class SyncBatchNormAct(SyncBatchNorm):
    """The same for timm's batch norms, which include dropout and an activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape."""
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Make all batch norms of a network, in place, compute statistics over all processes."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # With the class alone nothing is lost of parameters, buffers and settings.
            module.__class__ = SyncBatchNormAct if hasattr(module, "act") else SyncBatchNorm
    return model


class _Normalise(torch.autograd.Function):
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` with statistics of all processes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if x.is_cuda and not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()  # the kernels take no other order
        # The statistics of each process, not sums of squares, which would cancel.
        means, variances = _gather(torch.stack(_statistics(x, eps))).unbind(1)  # (processes, C)
        mean = means.mean(dim=0)
        variance = (variances + (means - mean).square()).mean(dim=0)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, scale = ctx.saved_tensors  # scale is 1 / standard deviation
        processes, count = world_size(), x.numel() // x.shape[1]
        if x.is_cuda:
            order = torch.contiguous_format if x.is_contiguous() else torch.channels_last
            gradient = gradient.contiguous(memory_format=order)
            by_shift, by_product, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
                gradient, x, mean, scale, weight, True, True, True
            )
            sums = torch.stack([by_shift, by_product])
            dist.all_reduce(sums)
            counts = torch.full((1,), count * processes, dtype=torch.int32, device=x.device)
            grad_x = torch.batch_norm_backward_elemt(
                gradient, x, mean, scale, weight, sums[0], sums[1], counts
            )
        else:
            axes = [axis for axis in range(x.ndim) if axis != 1]
            shape = (1, -1) + (1,) * (x.ndim - 2)
            wide = gradient.to(mean.dtype)
            normal = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
            grad_bias, grad_weight = wide.sum(axes), (wide * normal).sum(axes)
            sums = torch.stack([grad_bias, grad_weight])
            dist.all_reduce(sums)
            shift, slope = (row.view(shape) for row in sums / (count * processes))
            factor = scale if weight is None else scale * weight
            grad_x = ((wide - shift - normal * slope) * factor.view(shape)).to(x.dtype)
        if weight is None:
            return grad_x, None, None, None
        return grad_x, grad_weight, grad_bias, None


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of the channels, (C,) each, at least float32."""
    if x.is_cuda:
        mean, scale = torch.batch_norm_stats(x, eps)
        return mean, scale.pow(-2) - eps
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    axes = [axis for axis in range(x.ndim) if axis != 1]
    variance, mean = torch.var_mean(wide, dim=axes, correction=0)
    return mean, variance


def _gather(values: Tensor) -> Tensor:
    """Return the values of all processes, stacked along a new first axis."""
    if dist.get_backend() == "gloo":
        # It lacks the other. As sums they differ in size from those of a process out of step, which
        # gloo notices; gathering would wait for ever.
        found = values.new_zeros(world_size(), *values.shape)
        found[rank()] = values
        dist.all_reduce(found)
    else:
        found = values.new_empty(world_size(), *values.shape)
        dist.all_gather_into_tensor(found, values)
    return found
