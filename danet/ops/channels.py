"""Softmax attention between channels: products in the dtype of the features, sums in float32."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from danet.ops.arithmetic import product_dtype, sum_dtype, without_autocast

LEAST_EXPONENT = -44.0  # weights are at least 2^-64 of the largest of a row; see danet.ops.tiles


def attend_to_channels(features: Tensor, sign: float) -> Tensor:
    """Maps (B, N, C) to ``features weights^T`` with weights softmax(sign * features^T features).

    The result has the dtype and shape of the features, the weights are (B, C, C). Half precision is
    accumulated in float32: a sum over all positions exceeds 65504, the largest number of float16,
    at real crop sizes, and bfloat16 would round an energy of 1000 by 4.
    """
    if torch.is_grad_enabled() and features.requires_grad:
        return _AttendToChannels.apply(features, sign)
    return _forward(features, sign)[0]


class _AttendToChannels(torch.autograd.Function):
    """Keeps the features and the weights, and nothing in float32 that has N positions."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, sign: float) -> Tensor:
        context, weights = _forward(features, sign)
        ctx.save_for_backward(features, weights)
        ctx.sign = sign
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        features, weights = ctx.saved_tensors
        with without_autocast(features.device.type):
            grad_weights = _sum_products(gradient.transpose(1, 2), features)  # (B, C, C)
            own = torch.linalg.vecdot(grad_weights, weights).unsqueeze(-1)  # of the softmax
            grad_energy = grad_weights.sub_(own).mul_(weights).mul_(ctx.sign)
            # Features are both factors of the energies.
            symmetric = grad_energy + grad_energy.transpose(1, 2)
            direct = _product(gradient, weights)
            if features.dtype != torch.float16:
                return direct.add_(_product(features, symmetric)), None
            # Sums over all positions of scaled gradients exceed 65504, though the result does not.
            size = symmetric.abs().amax(dim=(1, 2), keepdim=True).clamp_(min=1e-30)
            through = _product(features, symmetric / size).to(size.dtype).mul_(size)
            return through.add_(direct).to(features.dtype), None


def _forward(features: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """Return the context (B, N, C), and the weights (B, C, C) in the dtype of sums."""
    # Else its products would run, and be summed, in half precision.
    with without_autocast(features.device.type):
        energy = _sum_products(features.transpose(1, 2), features).mul_(sign)
        largest = energy.amax(dim=-1, keepdim=True)
        weights = energy.sub_(largest).clamp_(min=LEAST_EXPONENT).softmax(dim=-1)
        return _product(features, weights.transpose(1, 2)), weights


def _sum_products(left: Tensor, right: Tensor) -> Tensor:
    """Maps (B, C, N) and (B, N, C), of one dtype, to (B, C, C) in the dtype of sums."""
    dtype = sum_dtype(left)
    if left.is_cuda and left.dtype != dtype:
        # Operands of half precision multiply exactly into float32; a CPU has no such product.
        return torch.bmm(left, right, out_dtype=dtype)
    return torch.bmm(left.to(dtype), right.to(dtype))


def _product(features: Tensor, weights: Tensor) -> Tensor:
    """Maps (B, N, C) and (B, C, C) to (B, N, C) in the dtype of the features."""
    dtype = product_dtype(features)
    return torch.bmm(features.to(dtype), weights.to(dtype)).to(features.dtype)
