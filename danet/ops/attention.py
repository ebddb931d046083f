"""The two attention modules of DANet, exact and without the (N, N) map.

Section 3 of the paper. Where the released code differs from it, this follows the code and names the
difference.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from danet.ops.channels import attend_to_channels
from danet.ops.fused import choose_kernel
from danet.ops.tiles import attend


def _positions(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) to (B, N, C)."""
    return x.flatten(2).transpose(1, 2)  # a view in NCHW and in channels_last order


def _add_scaled(x: Tensor, gamma: Tensor, context: Tensor) -> Tensor:
    """Maps (B, C, H, W) and (B, N, C) to ``gamma * context + x`` in the dtype of ``x``."""
    context = context.transpose(1, 2).unflatten(2, x.shape[2:])  # a view in channels_last order
    # gamma stays float32 under autocast and would promote the result.
    return torch.addcmul(x, gamma.to(x.dtype), context.to(x.dtype))  # one pass


class PositionAttention(nn.Module):
    """Position attention (PAM, eq. 1 and 2): every position gathers features from all positions.

    Position i receives ``gamma * sum_j softmax_j(q_i . k_j) v_j + x_i``. ``gamma`` starts
    at zero, so a fresh module is the identity and a pretrained backbone is not disturbed.
    The (N, N) attention map is never stored, forward or backward (see danet.ops.tiles), so memory
    is linear in N.

    Args:
        channels: C, of the input and the output.
        reduction: Keys and queries have ``channels // reduction`` channels. The paper gives them
            C channels; the released code, followed here, divides by 8.
    """

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        if reduction < 1 or channels % reduction:
            raise ValueError(f"channels={channels} is not divisible by reduction={reduction}")
        self.query = nn.Conv2d(channels, channels // reduction, kernel_size=1)
        # A bias of keys shifts whole rows of energies, which softmax ignores: its gradient is zero.
        # The released weights have it all the same.
        self.key = nn.Conv2d(channels, channels // reduction, kernel_size=1)
        self.value = nn.Conv2d(channels, channels, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))  # of shape (1,), as in the released weights

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, H, W)."""
        query, key = _positions(self.query(x)), _positions(self.key(x))  # (B, N, D)
        context = attend(query, key, _positions(self.value(x)))  # (B, N, C)
        return _add_scaled(x, self.gamma, context)

    def kernel(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return what computes the attention on a device, ``tiles`` or a fused kernel."""
        width, channels = self.key.out_channels, self.value.out_channels
        return str(choose_kernel(device, dtype, width, channels) or "tiles")


class ChannelAttention(nn.Module):
    """Channel attention (CAM, eq. 3 and 4): every channel gathers the maps of all channels.

    With E = A A^T of the (C, N) features A, channel i receives
    ``gamma * sum_j softmax_j(-E_ij) A_j + A_i``. ``gamma`` starts at zero. The (C, C) map is small
    enough to be kept: 1 MiB per image with 512 channels, at any crop size.

    Args:
        energy: ``distance`` is softmax(-E), as in the released code (which writes it
            softmax(max - E), the same function) and required by the released weights;
            ``similarity`` is softmax(+E), equation 3 as printed.
    """

    def __init__(self, energy: Literal["distance", "similarity"] = "distance") -> None:
        super().__init__()
        if energy not in ("distance", "similarity"):
            raise ValueError(f"energy={energy!r} is neither 'distance' nor 'similarity'")
        self.energy = energy
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, H, W)."""
        sign = -1.0 if self.energy == "distance" else 1.0
        return _add_scaled(x, self.gamma, attend_to_channels(_positions(x), sign))
