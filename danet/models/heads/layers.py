"""Layers shared by the heads."""

from torch import Tensor, nn


def conv_norm_relu(in_channels: int, channels: int, kernel_size: int) -> nn.Sequential:
    """Return a convolution without bias, batch norm and ReLU, at constant H and W."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


class MainHead(nn.Sequential):
    """A head that is a row of named modules, the last of which gives the logits "main"."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (B, in_channels, H, W) to "main", (B, K, H, W)."""
        return {"main": super().forward(x)}


def classifier(channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Return dropout of whole channels and a 1x1 convolution with bias."""
    return nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, kernel_size=1))
