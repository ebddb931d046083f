"""The two attention modules of DANet, exact and without the (N, N) map.

Section 3 of the paper. Where the released code differs from it, this follows the code and names the
difference.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danet.ops.arithmetic import sum_dtype
from danet.ops.channels import attend_to_channels
from danet.ops.fused import choose_kernel
from danet.ops.tiles import attend

Energy = Literal["distance", "similarity"]
Scale = Literal["none", "sqrt", "learned"]
Similarity = Literal["dot", "cosine", "whitened"]


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

    All arguments but the first two are variants that the paper does not have.

    Args:
        channels: C, of the input and the output.
        reduction: Keys and queries have ``channels // reduction`` channels. The paper gives them
            C channels; the released code, followed here, divides by 8.
        similarity: Of a query and a key: their ``dot`` product; their ``cosine``; or ``whitened``,
            the product after the mean over the positions of the image is subtracted from both
            (Yin et al., "Disentangled Non-Local Neural Networks", ECCV 2020).
        scale: Of the similarities: ``none``; ``sqrt`` divides them by the root of the channels of
            a key; ``learned`` multiplies them by a positive parameter, which starts at the same
            value, or at 10 for ``cosine``.
        unary: Whether a second softmax, of energies that depend on j alone, is added to the first:
            the unary term of Yin et al.
        registers: Number of learned keys and values beside the N of the image, which can take the
            attention that no position should have. Their values start at zero.
        gamma: Start of gamma.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 8,
        *,
        similarity: Similarity = "dot",
        scale: Scale = "none",
        unary: bool = False,
        registers: int = 0,
        gamma: float = 0.0,
    ) -> None:
        super().__init__()
        if reduction < 1 or channels % reduction:
            raise ValueError(f"channels={channels} is not divisible by reduction={reduction}")
        _require("similarity", similarity, get_args(Similarity))
        _require("scale", scale, get_args(Scale))
        if registers < 0:
            raise ValueError(f"registers={registers} is not at least 0")
        width = channels // reduction
        self.similarity, self.scale = similarity, scale
        self.query = nn.Conv2d(channels, width, kernel_size=1)
        # A bias of keys shifts whole rows of energies, which softmax ignores: its gradient is zero.
        # The released weights have it all the same.
        self.key = nn.Conv2d(channels, width, kernel_size=1)
        self.value = nn.Conv2d(channels, channels, kernel_size=1)
        self.gamma = nn.Parameter(torch.full((1,), float(gamma)))  # as in the released weights
        self.log_scale: nn.Parameter | None = None
        if scale == "learned":
            start = 10.0 if similarity == "cosine" else width**-0.5
            self.log_scale = nn.Parameter(torch.tensor([math.log(start)]))
        self.unary = nn.Conv2d(channels, 1, kernel_size=1) if unary else None
        self.register_keys: nn.Parameter | None = None
        self.register_values: nn.Parameter | None = None
        if registers:
            self.register_keys = nn.Parameter(torch.randn(registers, width) * width**-0.5)
            self.register_values = nn.Parameter(torch.zeros(registers, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, H, W)."""
        return _add_scaled(x, self.gamma, self.context(x))

    def context(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to what is multiplied by gamma and added to it, (B, N, C)."""
        query, key = self.project(x)
        value = _positions(self.value(x))
        context = self.attend(query, key, _append(value, self.register_values))
        if self.unary is not None:
            weights = self.unary(x).flatten(2).softmax(dim=-1)  # (B, 1, N)
            context = context + weights.to(value.dtype) @ value
        return context

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, C, H, W) to queries (B, N, D) and keys (B, N + registers, D).

        The attention map is the softmax of their products, to which a unary term is not added.
        """
        query, key = _positions(self.query(x)), _positions(self.key(x))
        dtype = query.dtype  # which statistics and scales in float32 must not change
        if self.similarity == "cosine":
            query, key = (F.normalize(part.to(sum_dtype(part)), dim=-1) for part in (query, key))
        elif self.similarity == "whitened":
            query, key = (part - part.mean(dim=1, keepdim=True) for part in (query, key))
        if self.scale == "sqrt":
            query = query * self.key.out_channels**-0.5
        elif self.log_scale is not None:
            query = query * self.log_scale.exp()
        return query.to(dtype), _append(key.to(dtype), self.register_keys)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Maps (B, N, D), (B, M, D) and (B, M, C) to softmax(query key^T) value, (B, N, C)."""
        return attend(query, key, value)

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
        gamma: Start of gamma.
    """

    def __init__(self, energy: Energy = "distance", *, gamma: float = 0.0) -> None:
        super().__init__()
        _require("energy", energy, get_args(Energy))
        self.energy = energy
        self.gamma = nn.Parameter(torch.full((1,), float(gamma)))

    @property
    def sign(self) -> float:
        """The sign of the energies in the softmax."""
        return -1.0 if self.energy == "distance" else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, H, W)."""
        return _add_scaled(x, self.gamma, self.context(x))

    def context(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to what is multiplied by gamma and added to it, (B, N, C)."""
        return attend_to_channels(_positions(x), self.sign)


def _require(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")


def _append(positions: Tensor, registers: Tensor | None) -> Tensor:
    """Maps (B, N, D) to (B, N + M, D), with the M registers (M, D) behind the N of each image."""
    if registers is None:
        return positions
    more = registers.to(positions.dtype).expand(positions.shape[0], -1, -1)
    return torch.cat((positions, more), dim=1)
