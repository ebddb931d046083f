"""The head of PSANet: attention whose weights are predicted for places relative to a position."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from danet.models.heads.layers import classifier, conv_norm_relu
from danet.ops.resize import resize


class PointwiseAttention(nn.Module):
    """Collects from and distributes to all positions, by weights that a convolution predicts.

    Zhao, Zhang, Liu, Shi, Loy, Lin, Jia, "PSANet", ECCV 2018, section 3. From the features of a
    position i a stack of two 1x1 convolutions predicts a map h_i over offsets to other positions
    (the over-complete map of section 3.2), once for each direction:

        collect      z_i = sum_j softmax_j(h_i[j - i]) x_j      i decides whom it listens to
        distribute   z_i = sum_j softmax_j(h_j[i - j]) x_j      j decides whom it speaks to

    The paper divides by the number of positions; its released code takes the softmax, which is
    followed. Offsets beyond the predicted map have no weight, so that maps of any size are taken.
    Memory grows with the square of the number of positions.

    Args:
        channels: C, of the input.
        mask_size: Height and width up to which offsets are predicted: below h rows and w columns,
            in either direction; (2h - 1)(2w - 1) numbers per position.
    """

    def __init__(self, channels: int, mask_size: Sequence[int]) -> None:
        super().__init__()
        if len(mask_size) != 2 or min(mask_size) < 1:
            raise ValueError(f"mask_size={list(mask_size)} is not [height, width] of at least 1")
        self.mask_size = (int(mask_size[0]), int(mask_size[1]))
        offsets = (2 * self.mask_size[0] - 1) * (2 * self.mask_size[1] - 1)
        self.collect, self.distribute = (
            nn.Sequential(conv_norm_relu(channels, channels, 1), nn.Conv2d(channels, offsets, 1))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, 2C, H, W): what was collected, and what was distributed."""
        batch, _, height, width = x.shape
        place, is_known = self._offsets(height, width, x.device)  # (N, N), both
        place = place.expand(batch, -1, -1)
        features = x.flatten(2)  # (B, C, N)
        heard = self.collect(x).flatten(2).gather(1, place)  # (B, N, N): h_i[j - i] at [j, i]
        heard = heard.masked_fill(~is_known, -torch.inf).softmax(dim=1)
        spoken = self.distribute(x).flatten(2).gather(1, place)  # (B, N, N): h_j[i - j] at [i, j]
        spoken = spoken.masked_fill(~is_known, -torch.inf).softmax(dim=2)
        both = torch.cat((features @ heard, features @ spoken.transpose(1, 2)), dim=1)
        return both.unflatten(2, (height, width))

    def _offsets(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns where a predicted map has the offset a - b, at [a, b], and whether it has it."""
        tall, wide = self.mask_size
        rows = torch.arange(height, device=device).repeat_interleave(width)
        columns = torch.arange(width, device=device).repeat(height)
        down, across = (n[:, None] - n[None, :] for n in (rows, columns))
        is_known = (down.abs() < tall) & (across.abs() < wide)
        place = (down + tall - 1) * (2 * wide - 1) + across + wide - 1
        return place.masked_fill(~is_known, 0), is_known


class PSAHead(nn.Module):
    """Point-wise spatial attention on a smaller map, beside the feature map itself (figure 2).

    Args:
        in_channels: Of the feature map.
        num_classes: K.
        mask_size: As in PointwiseAttention, of the smaller map: the crop / (8 * shrink) reaches
            everywhere at output stride 8.
        shrink: Factor by which the map is made smaller for the attention.
        channels: Of the attention; ``in_channels // 4`` when None (512 behind a ResNet-50).
        dropout: Of whole channels, before the classifier.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        mask_size: Sequence[int],
        shrink: int = 2,
        channels: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if shrink < 1:
            raise ValueError(f"shrink={shrink} is not at least 1")
        channels = channels or in_channels // 4
        self.shrink = shrink
        self.reduce = conv_norm_relu(in_channels, channels, 1)
        self.attention = PointwiseAttention(channels, mask_size)
        self.widen = conv_norm_relu(2 * channels, in_channels, 1)
        self.join = conv_norm_relu(2 * in_channels, channels, 3)
        self.classify = classifier(channels, num_classes, dropout)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (B, in_channels, H, W) to "main", (B, K, H, W)."""
        size = (x.shape[2], x.shape[3])
        small = ((size[0] - 1) // self.shrink + 1, (size[1] - 1) // self.shrink + 1)
        context = self.widen(self.attention(resize(self.reduce(x), small)))
        return {"main": self.classify(self.join(torch.cat((x, resize(context, size)), dim=1)))}
