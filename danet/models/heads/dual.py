"""Heads: the dual attention head, its two branches alone, and the FCN head."""

from collections import OrderedDict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from danet.models.heads.layers import MainHead, classifier, conv_norm_relu
from danet.ops.attention import (
    ChannelAttention,
    Energy,
    PositionAttention,
    Scale,
    Similarity,
)


def position_attention(channels: int, reduction: int | None, **variant: Any) -> PositionAttention:
    """Return a position attention; without a reduction, that of ``key_reduction``."""
    return PositionAttention(channels, reduction or key_reduction(channels), **variant)


def key_reduction(channels: int) -> int:
    """Return the largest divisor of ``channels`` up to 8 that leaves 24 channels or more."""
    # 8 at the paper's 512 channels; narrow networks would have keys of a few channels only.
    return max(r for r in range(1, 9) if r == 1 or (channels % r == 0 and channels // r >= 24))


class AttentionBranch(nn.Module):
    """One branch of the head: a 3x3 convolution ``reduce``, attention, a 3x3 ``refine``.

    Args:
        in_channels: Of the input; 0 if the input is already reduced (a shared one).
        channels: Within the branch and of its output.
        attention: Maps (B, channels, H, W) to the same shape.
    """

    def __init__(self, in_channels: int, channels: int, attention: nn.Module) -> None:
        super().__init__()
        self.reduce = conv_norm_relu(in_channels, channels, 3) if in_channels else nn.Identity()
        self.attention = attention
        self.refine = conv_norm_relu(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, channels, H, W)."""
        return self.refine(self.attention(self.reduce(x)))


class DualAttentionHead(nn.Module):
    """Position and channel attention in parallel, fused (section 3.4, figure 2).

    The defaults are the released code. ``shared_input=True`` with ``fusion="concat"`` is the other
    published reading: one reduced map is the input of both modules, their outputs are concatenated
    and joined by a 1x1 convolution, and the input of the modules is added to the result.

    Args:
        reduction: Keys and queries of the position attention have ``channels // reduction``; None
            is 8, as in the released code, or less where they would have under 24 channels.
        energy: Of the channel attention, see ChannelAttention.
        similarity, scale, unary, registers: Of the position attention, see PositionAttention.
        gamma: Start of gamma, of both.
        fusion: ``sum`` of the two branches, or ``concat``.
        shared_input: One reduction for both branches instead of one for each.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int | None = None,
        reduction: int | None = None,
        energy: Energy = "distance",
        similarity: Similarity = "dot",
        scale: Scale = "none",
        unary: bool = False,
        registers: int = 0,
        gamma: float = 0.0,
        fusion: Literal["sum", "concat"] = "sum",
        shared_input: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        channels = channels or in_channels // 4
        self.shared = conv_norm_relu(in_channels, channels, 3) if shared_input else nn.Identity()
        branch_input = 0 if shared_input else in_channels
        attention = position_attention(
            channels,
            reduction,
            similarity=similarity,
            scale=scale,
            unary=unary,
            registers=registers,
            gamma=gamma,
        )
        self.position = AttentionBranch(branch_input, channels, attention)
        to_channels = ChannelAttention(energy, gamma=gamma)
        self.channel = AttentionBranch(branch_input, channels, to_channels)
        self.join = conv_norm_relu(2 * channels, channels, 1) if fusion == "concat" else None
        self.classify = classifier(channels, num_classes, dropout)
        self.classify_position = classifier(channels, num_classes, dropout)
        self.classify_channel = classifier(channels, num_classes, dropout)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (B, in_channels, H, W) to "main" and, in training, "position" and "channel"."""
        x = self.shared(x)
        # (B, channels, H, W) from here to the classifiers
        inputs = self.position.reduce(x), self.channel.reduce(x)
        position = self.position.refine(self.position.attention(inputs[0]))
        channel = self.channel.refine(self.channel.attention(inputs[1]))
        if self.join is None:
            fused = position + channel
        else:
            # The outer residual is the input of the modules, a single map if it is shared.
            is_shared = isinstance(self.position.reduce, nn.Identity)
            outer = inputs[0] if is_shared else inputs[0] + inputs[1]
            fused = self.join(torch.cat((position, channel), dim=1)) + outer
        logits = {"main": self.classify(fused)}
        # In eval mode only the fused prediction counts, as in the released code.
        if self.training:
            logits["position"] = self.classify_position(position)
            logits["channel"] = self.classify_channel(channel)
        return logits


class SingleAttentionHead(MainHead):
    """One of the two modules alone: the rows "PAM" and "CAM" of the paper's table 1.

    All other arguments are those of DualAttentionHead.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        attention: Literal["position", "channel"],
        channels: int | None = None,
        reduction: int | None = None,
        energy: Energy = "distance",
        similarity: Similarity = "dot",
        scale: Scale = "none",
        unary: bool = False,
        registers: int = 0,
        gamma: float = 0.0,
        dropout: float = 0.1,
    ) -> None:
        channels = channels or in_channels // 4
        if attention == "position":
            module: nn.Module = position_attention(
                channels,
                reduction,
                similarity=similarity,
                scale=scale,
                unary=unary,
                registers=registers,
                gamma=gamma,
            )
        elif attention == "channel":
            module = ChannelAttention(energy, gamma=gamma)
        else:
            raise ValueError(f"attention={attention!r} is neither 'position' nor 'channel'")
        # Under its name in the dual head, for weights and visualization.
        branch = {attention: AttentionBranch(in_channels, channels, module)}
        classify = classifier(channels, num_classes, dropout)
        super().__init__(OrderedDict(**branch, classify=classify))


class FCNHead(MainHead):
    """A 3x3 convolution and a classifier: the paper's baseline, and the auxiliary head."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        channels = channels or in_channels // 4
        reduce = conv_norm_relu(in_channels, channels, 3)
        classify = classifier(channels, num_classes, dropout)
        super().__init__(OrderedDict(reduce=reduce, classify=classify))
