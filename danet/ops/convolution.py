"""A convolution of very many channels, in pieces that fit the caches of a CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PIECES = 4
"""Of 2, 4 and 8, what was fastest for 2048 to 512 channels (AVX-512, bfloat16)."""

WIDE = 9 * 1024
"""Weights of an output channel from which on it pays: 9 * 512 run at the peak as they are."""


class WideConv2d(nn.Conv2d):
    """``nn.Conv2d`` with stride 1 and no bias; in bfloat16 on a CPU, a wide one is done in pieces.

    The two 3x3 convolutions that lead 2048 channels into the dual head are a quarter of a training
    step, and in bfloat16 their weights are too much at once for oneDNN's forward kernel: for a
    quarter of the output channels at a time it is up to 1.4 times as fast (docs/benchmarks.md).
    Gradients are torch's own. No sum is split, so nothing is rounded more often than otherwise.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, out_channels, H, W)."""
        if not self._is_slow_at_once(x):
            return super().forward(x)
        return _InPieces.apply(x.bfloat16(), self.weight.bfloat16())

    def _is_slow_at_once(self, x: Tensor) -> bool:
        """Tells whether this is a wide convolution in bfloat16 on a CPU, run by torch itself."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        # It has a bias when a batch norm was folded into it.
        return dtype == torch.bfloat16 and self.weight[0].numel() >= WIDE and self.bias is None


class _InPieces(torch.autograd.Function):
    """Forward for some of the output channels at a time, backward for all at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        padding = weight.shape[-1] // 2
        return torch.cat([F.conv2d(x, w, padding=padding) for w in weight.chunk(PIECES)], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        padding = weight.shape[-1] // 2
        wanted = (*ctx.needs_input_grad, False)  # input, weight, bias
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, wanted
        )
        return of_x, of_weight
