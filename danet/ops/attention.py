"""The two attention modules of DANet, exact and without the (N, N) map.

Section 3 of the paper; where paper and released code differ, the code is followed and it is said.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from danet.ops.tiles import attend, without_autocast


def _positions(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) to (B, N, C)."""
    return x.flatten(2).transpose(1, 2)


def _as_map(tokens: Tensor, like: Tensor) -> Tensor:
    """Maps (B, N, C) to the (B, C, H, W) of ``like``, a view in channels_last order."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


def _add_scaled(x: Tensor, gamma: Tensor, context: Tensor) -> Tensor:
    """Returns ``gamma * context + x`` in the dtype of ``x``, in one pass."""
    return torch.addcmul(x, gamma.to(x.dtype), context.to(x.dtype))


class PositionAttention(nn.Module):
    """Lets every position gather features from all positions (PAM, eq. 1 and 2).

    Position i receives ``gamma * sum_j softmax_j(q_i . k_j) v_j + x_i``. ``gamma`` starts
    at zero, so a fresh module is the identity and a pretrained backbone is not disturbed.
    The map of N x N weights never exists, forward or backward (see danet.ops.tiles), so memory
    grows with N, not with its square.

    Args:
        channels: C, of the input and the output.
        reduction: Keys and queries have ``channels // reduction`` channels. The paper draws them
            with C channels, the released code (and this module) divides by 8.
    """

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        if reduction < 1 or channels % reduction:
            raise ValueError(f"channels={channels} is not divisible by reduction={reduction}")
        self.query = nn.Conv2d(channels, channels // reduction, kernel_size=1)
        self.key = nn.Conv2d(channels, channels // reduction, kernel_size=1)
        self.value = nn.Conv2d(channels, channels, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, H, W)."""
        query, key = _positions(self.query(x)), _positions(self.key(x))  # (B, N, D)
        context = attend(query, key, _positions(self.value(x)))  # (B, N, C)
        return _add_scaled(x, self.gamma, _as_map(context, x))

    def rows(self, x: Tensor, positions: Tensor) -> Tensor:
        """Returns what chosen positions attend to: the maps of the paper's figure 6.

        Args:
            x: (B, C, H, W), the input of the module.
            positions: (P,) int64 indices into 0..N-1, row by row.

        Returns:
            (B, P, H, W), each map non-negative with sum 1.
        """
        query = _positions(self.query(x))[:, positions]  # (B, P, D)
        key = _positions(self.key(x))  # (B, N, D)
        weights = (query.float() @ key.float().transpose(1, 2)).softmax(dim=-1)  # (B, P, N)
        return weights.view(x.shape[0], len(positions), *x.shape[2:])


class ChannelAttention(nn.Module):
    """Lets every channel gather the maps of all channels (CAM, eq. 3 and 4).

    With E = A A^T of the (C, N) features A, channel i receives
    ``gamma * sum_j softmax_j(-E_ij) A_j + A_i``. ``gamma`` starts at zero.

    Args:
        energy: ``distance`` is softmax(-E), what the released code computes (it writes
            softmax(max - E), the same function) and the released weights need;
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
        features = _positions(x)  # (B, N, C), a view in any memory order
        # A sum over all positions passes 65504, the end of fp16, at real crop sizes.
        with without_autocast(x.device.type):
            wide = features.float()
            energy = wide.transpose(1, 2) @ wide  # (B, C, C)
            sign = -1.0 if self.energy == "distance" else 1.0
            weights = (sign * energy).softmax(dim=-1)
            context = features @ weights.transpose(1, 2).to(features.dtype)  # (B, N, C)
        return _add_scaled(x, self.gamma, _as_map(context, x))
