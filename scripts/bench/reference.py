"""The reference: DANet written from the paper's formulas, without any optimisation.

Dilated ResNet of torchvision, NCHW, float32, eager; N x N maps by ``torch.bmm`` and softmax; logits
at the size of the image and ``F.cross_entropy``; evaluation one window at a time. Parameters
have the names of our network's, so that its state dict loads.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50, resnet101
from torchvision.models._utils import IntermediateLayerGetter

IGNORE = 255


class PositionAttention(nn.Module):
    """``gamma * softmax(Q K^T) V + x`` with the map in memory (section 3.2, eq. 1 and 2)."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // reduction, 1)
        self.key = nn.Conv2d(channels, channels // reduction, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, H, W)."""
        query = self.query(x).flatten(2).transpose(1, 2)  # (B, N, D)
        key = self.key(x).flatten(2)  # (B, D, N)
        value = self.value(x).flatten(2)  # (B, C, N)
        weights = torch.bmm(query, key).softmax(dim=-1)  # (B, N, N)
        return self.gamma * torch.bmm(value, weights.transpose(1, 2)).view_as(x) + x


class ChannelAttention(nn.Module):
    """``gamma * softmax(-A A^T) A + x``, the released code's sign (section 3.3)."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, H, W)."""
        features = x.flatten(2)  # (B, C, N)
        energy = torch.bmm(features, features.transpose(1, 2))  # (B, C, C)
        weights = (energy.max(dim=-1, keepdim=True).values - energy).softmax(dim=-1)
        return self.gamma * torch.bmm(weights, features).view_as(x) + x


class Branch(nn.Module):
    """3x3 reduction, attention, 3x3 refinement."""

    def __init__(self, in_channels: int, channels: int, attention: nn.Module) -> None:
        super().__init__()
        self.reduce = _conv_norm_relu(in_channels, channels)
        self.attention = attention
        self.refine = _conv_norm_relu(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, channels, H, W)."""
        return self.refine(self.attention(self.reduce(x)))


class Head(nn.Module):
    """The dual head (section 3.4)."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        channels = in_channels // 4
        self.position = Branch(in_channels, channels, PositionAttention(channels))
        self.channel = Branch(in_channels, channels, ChannelAttention())
        self.classify = _classifier(channels, num_classes)
        self.classify_position = _classifier(channels, num_classes)
        self.classify_channel = _classifier(channels, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps (B, in_channels, H, W) to logits: fused, position, channel."""
        position, channel = self.position(x), self.channel(x)
        fused = self.classify(position + channel)
        return fused, self.classify_position(position), self.classify_channel(channel)


class PlainDANet(nn.Module):
    """The whole network; images are float RGB in 0..255.

    Args:
        depth: 50 or 101.
        num_classes: K.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        make = {50: resnet50, 101: resnet101}[depth]
        whole = make(weights=None, replace_stride_with_dilation=[False, True, True])
        self.backbone = IntermediateLayerGetter(whole, {"layer4": "out"})
        self.head = Head(2048, num_classes)
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps (B, 3, H, W) to three logits (B, K, H, W)."""
        features = self.backbone((image.float() - self.mean) / self.std)["out"]
        fused, position, channel = self.head(features)
        size = image.shape[-2:]
        return (_upsample(fused, size), _upsample(position, size), _upsample(channel, size))


def loss(logits: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return the sum of the outputs' cross entropies; mask is uint8 (B, H, W), 255 = ignored."""
    target = mask.long()
    return torch.stack([F.cross_entropy(x, target, ignore_index=IGNORE) for x in logits]).sum()


@torch.inference_mode()
def multi_scale(
    model: nn.Module, image: Tensor, *, scales: Sequence[float], crop: int, stride: int
) -> Tensor:
    """Average sliding windows with mirrored passes over scales; one window, one pass at a time.

    Every window's probabilities are padded to the whole picture and added. The last window of an
    axis ends at the border.

    Args:
        model: Returns three logits; the first is used.
        image: (1, 3, H, W).
        scales: Factors.
        crop: Side of the windows.
        stride: From one to the next.

    Returns:
        (1, K, H, W), probabilities.
    """
    size = image.shape[-2:]
    total = torch.zeros(())
    for scale in scales:
        wanted = [max(1, round(n * scale)) for n in size]
        total = total + _upsample(
            _slide(model, _upsample(image.float(), wanted), crop, stride), size
        )
    return total / len(scales)


def _slide(model: nn.Module, image: Tensor, crop: int, stride: int) -> Tensor:
    height, width = image.shape[-2:]
    total, count = torch.zeros(()), torch.zeros(())
    for top in _starts(height, crop, stride):
        for left in _starts(width, crop, stride):
            window = image[..., top : top + crop, left : left + crop]
            straight = model(window)[0].softmax(dim=1)
            mirrored = model(window.flip(-1))[0].softmax(dim=1).flip(-1)
            here = (straight + mirrored) / 2
            right, below = width - left - here.shape[-1], height - top - here.shape[-2]
            padding = (left, right, top, below)
            total = F.pad(here, padding) + total
            count = F.pad(torch.ones_like(here[:, :1]), padding) + count
    return total / count


def _starts(size: int, crop: int, stride: int) -> list[int]:
    last = max(size - crop, 0)
    return [*range(0, last, stride), last]


def _upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def _conv_norm_relu(in_channels: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def _classifier(channels: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))
