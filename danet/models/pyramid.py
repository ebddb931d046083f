"""The last map of a network, brought to another stride."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from danet.ops.resize import resize


class Pyramid(nn.Module):
    """Bring the last map of a network that cannot be dilated to the stride that a head expects.

    Where the network has finer maps, they are added from coarse to fine as in feature pyramid
    networks (Lin et al., CVPR 2017). What is still too coarse, as every map of a plain vision
    transformer is, is doubled by transposed convolutions as in ViTDet (Li et al., ECCV 2022).

    Args:
        channels, strides: Of the maps, finest first.
        output_stride: Pixels of the image per pixel of the result, which has as many channels as
            the last map.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], output_stride: int) -> None:
        super().__init__()
        width, stride = channels[-1], strides[-1]
        self.output_stride = output_stride
        self.norm = ChannelNorm(width)  # the maps of transformers come without their last norm
        self.sources, laterals = [], []
        for i in reversed(range(len(strides) - 1)):
            if output_stride <= strides[i] < stride:
                stride = strides[i]
                self.sources.append(i)
                laterals.append(
                    nn.Sequential(ChannelNorm(channels[i]), nn.Conv2d(channels[i], width, 1))
                )
        self.laterals = nn.ModuleList(laterals)
        doublings: list[nn.Module] = []
        times = round(math.log2(max(stride / output_stride, 1)))
        self.stride = stride / 2**times
        for _ in range(times):
            double = nn.ConvTranspose2d(width, width, 2, stride=2)
            doublings += [double, ChannelNorm(width), nn.GELU()]
        self.upsample = nn.Sequential(*doublings)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Maps the (B, C, H, W) of an image of ``size`` to (B, C, *size / output_stride)."""
        x = self.norm(maps[-1])
        for source, lateral in zip(self.sources, self.laterals, strict=True):
            finer = lateral(maps[source])
            x = resize(x, finer.shape[-2:], align_corners=False) + finer
        x = cut(self.upsample(x), size, self.stride)
        # Patches of 14 pixels, for one, are doubled to a stride of 7 and resized to 8.
        covering = tuple(-(-side // self.output_stride) for side in size)
        return resize(x, covering, align_corners=False)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every pixel."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def cut(x: Tensor, size: tuple[int, int], stride: float) -> Tensor:
    """Return the part of a map (B, C, H, W) that covers an image of ``size``, without padding."""
    p, q = stride.as_integer_ratio()  # torch.export cannot save math.ceil
    return x[:, :, : (size[0] * q + p - 1) // p, : (size[1] * q + p - 1) // p]
