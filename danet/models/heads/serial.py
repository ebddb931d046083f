"""Attention in series instead of in parallel: CBAM, and DANet's own two modules."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from danet.models.heads.dual import AttentionBranch, position_attention
from danet.models.heads.layers import MainHead, classifier
from danet.ops.attention import ChannelAttention, Energy


class ConvolutionalAttention(nn.Module):
    """Gates for channels, then for positions, from pooled features; no position attends to another.

    Woo, Park, Lee, Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018, equations 1 to
    3: ``x' = s(M(avg x) + M(max x)) x`` with pooling over positions and one shared perceptron M,
    then ``x'' = s(f([mean x'; max x'])) x'`` with pooling over channels and a 7x7 convolution f.
    The perceptron has ``channels // reduction`` hidden units, at least one.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        if reduction < 1:
            raise ValueError(f"reduction={reduction} is not at least 1")
        hidden = max(1, channels // reduction)
        self.perceptron = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1)
        )
        self.locate = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, H, W)."""
        # (B, C, 1, 1)
        mean, largest = x.mean(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
        x = torch.sigmoid(self.perceptron(mean) + self.perceptron(largest)) * x
        # (B, 2, H, W)
        pooled = torch.cat((x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)), dim=1)
        return torch.sigmoid(self.locate(pooled)) * x


class CBAMHead(MainHead):
    """A branch of DANet's head with ConvolutionalAttention and its ``reduction``."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int | None = None,
        reduction: int = 16,
        dropout: float = 0.1,
    ) -> None:
        channels = channels or in_channels // 4
        branch = AttentionBranch(in_channels, channels, ConvolutionalAttention(channels, reduction))
        classify = classifier(channels, num_classes, dropout)
        super().__init__(OrderedDict(branch=branch, classify=classify))


class SerialAttentionHead(MainHead):
    """DANet's channel attention, then its position attention on the result, in CBAM's order.

    An ablation of the parallel arrangement that the paper does not have; ``reduction`` and
    ``energy`` are those of DualAttentionHead.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int | None = None,
        reduction: int | None = None,
        energy: Energy = "distance",
        dropout: float = 0.1,
    ) -> None:
        channels = channels or in_channels // 4
        series = nn.Sequential(ChannelAttention(energy), position_attention(channels, reduction))
        branch = AttentionBranch(in_channels, channels, series)
        classify = classifier(channels, num_classes, dropout)
        super().__init__(OrderedDict(branch=branch, classify=classify))
