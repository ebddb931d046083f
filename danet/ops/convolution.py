"""Convolution with very many input channels, split along the output channels on a CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NUM_CHUNKS = 4
"""The fastest of 2, 4 and 8 for 2048 to 512 channels (AVX-512, bfloat16)."""

MIN_FAN_IN = 9 * 1024
"""Smallest fan-in that gains from splitting; a fan-in of 9 * 512 runs at the peak as it is."""


class WideConv2d(nn.Conv2d):
    """``nn.Conv2d`` with stride 1 and no bias, split by output channels in bfloat16 on a CPU.

    The two 3x3 convolutions from 2048 channels into the dual head take a quarter of a training
    step. In bfloat16 their weights exceed what oneDNN's forward kernel handles well at once: with a
    quarter of the output channels at a time it is up to 1.4 times as fast (docs/benchmarks.md).
    Gradients are torch's own. No sum is split, so there is no additional rounding.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, out_channels, H, W)."""
        if not self._gains_from_chunks(x):
            return super().forward(x)
        # Left to autocast, the casts would happen inside, and float32 would be kept for backward.
        return _ChunkedConv2d.apply(x.bfloat16(), self.weight.bfloat16())

    def _gains_from_chunks(self, x: Tensor) -> bool:
        """Return whether this is a wide convolution in bfloat16 on a CPU, in eager mode."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        is_wide = dtype == torch.bfloat16 and self.weight[0].numel() >= MIN_FAN_IN
        # It has a bias when a batch norm was folded into it.
        return is_wide and self.bias is None


class _ChunkedConv2d(torch.autograd.Function):
    """Convolution of a chunk of output channels at a time; backward of all at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        padding = weight.shape[-1] // 2
        chunks = weight.chunk(NUM_CHUNKS)  # (out / 4, in, k, k) each
        return torch.cat([F.conv2d(x, w, padding=padding) for w in chunks], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        padding = weight.shape[-1] // 2
        output_mask = (*ctx.needs_input_grad, False)  # input, weight, bias
        # After the padding: dilation, transposed, output padding, groups.
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, output_mask
        )
        return grad_x, grad_weight
