"""The heads of DeepLab: context from parallel atrous convolutions of several rates."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from danet.models.heads.layers import MainHead, classifier, conv_norm_relu


class DeepLabV2Head(nn.Module):
    """Atrous spatial pyramid pooling: the sum of dilated classifiers.

    Chen, Papandreou, Kokkinos, Murphy, Yuille, "DeepLab", TPAMI 2018, section 3.2 and the
    ResNet-101 of section 4.1: each rate has a 3x3 convolution from the features to the classes, and
    the logits are added. ``rates=[6, 12, 18, 24]`` is ASPP-L, a single rate of 12 is LargeFOV.
    """

    def __init__(
        self, in_channels: int, num_classes: int, *, rates: Sequence[int] = (6, 12, 18, 24)
    ) -> None:
        super().__init__()
        _check(rates)
        self.classify = nn.ModuleList(
            nn.Conv2d(in_channels, num_classes, 3, padding=rate, dilation=rate) for rate in rates
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (B, in_channels, H, W) to "main", (B, K, H, W)."""
        # Not sum(): it starts from 0, one more addition over the whole map.
        return {"main": reduce(torch.add, (classify(x) for classify in self.classify))}


class DeepLabV3Head(MainHead):
    """torchvision's ASPP, with batch norm and image pooling, then a 3x3 convolution.

    Chen, Papandreou, Schroff, Adam, "Rethinking Atrous Convolution for Semantic Image
    Segmentation", 2017, section 3.3. The last 3x3 convolution is torchvision's, not the paper's; so
    its trained heads have the same shapes. Image pooling leaves one value per channel, so its batch
    norm needs two images in training.

    Args:
        rates: Dilations; (12, 24, 36) at output stride 8, half of it at 16.
        channels: Of every branch; ``in_channels // 8`` if None (256 after a ResNet-50).
        dropout: Before the classifier; ASPP has one of 0.5 inside.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        rates: Sequence[int] = (12, 24, 36),
        channels: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        _check(rates)
        # Imported late: it takes seconds, and checking a config needs no layers.
        from torchvision.models.segmentation.deeplabv3 import ASPP

        channels = channels or in_channels // 8
        pyramid = ASPP(in_channels, list(rates), channels)  # keeps H and W
        refine = conv_norm_relu(channels, channels, 3)
        classify = classifier(channels, num_classes, dropout)
        super().__init__(OrderedDict(pyramid=pyramid, refine=refine, classify=classify))


def _check(rates: Sequence[int]) -> None:
    if not rates or min(rates) < 1:
        raise ValueError(f"rates={list(rates)} must hold dilations of at least 1")
