"""The head of PSPNet: context from average pooling at several scales."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from danet.models.heads.layers import classifier, conv_norm_relu
from danet.ops.resize import resize


class PyramidPoolingHead(nn.Module):
    """Pyramid pooling: averages over b x b cells for each b of ``bins``, beside the map itself.

    Zhao, Shi, Qi, Wang, Jia, "Pyramid Scene Parsing Network", CVPR 2017, section 3.2: each pooled
    map gets a 1x1 convolution to an equal share of the channels and is resized to the feature map;
    all are concatenated with it and joined by a 3x3 convolution. With ``bins=[1, ...]`` a batch
    norm gets one value per channel and image, so training needs two images.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        bins: Sequence[int] = (1, 2, 3, 6),
        channels: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not bins or min(bins) < 1:
            raise ValueError(f"bins={list(bins)} must hold numbers of cells of at least 1")
        # Together the levels have as many channels as the map, up to rounding.
        share, channels = in_channels // len(bins), channels or in_channels // 4
        self.levels = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), conv_norm_relu(in_channels, share, 1))
            for size in bins
        )
        self.join = conv_norm_relu(in_channels + share * len(bins), channels, 3)
        self.classify = classifier(channels, num_classes, dropout)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (B, in_channels, H, W) to "main", (B, K, H, W)."""
        levels = [resize(level(x), x.shape[2:]) for level in self.levels]  # (B, share, H, W) each
        return {"main": self.classify(self.join(torch.cat([x, *levels], dim=1)))}
