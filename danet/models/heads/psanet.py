"""The head of PSANet: attention with weights predicted for relative positions."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from danet.models.heads.layers import classifier, conv_norm_relu
from danet.ops.resize import resize


class PointwiseAttention(nn.Module):
    """Features collected from and distributed to all positions, with predicted weights.

    Zhao, Zhang, Liu, Shi, Loy, Lin, Jia, "PSANet", ECCV 2018, section 3. From the features of a
    position i two 1x1 convolutions predict a map h_i over offsets to other positions (the
    over-complete map of section 3.2), once for each direction:

        collect      z_i = sum_j softmax_j(h_i[j - i]) x_j      weights predicted at i
        distribute   z_i = sum_j softmax_j(h_j[i - j]) x_j      weights predicted at j

    The paper divides by the number of positions; its released code, followed here, takes the
    softmax. Offsets beyond the predicted map have no weight, so that maps of any size are possible.
    Memory is quadratic in the number of positions.

    Args:
        channels: C, of the input.
        mask_size: Height h and width w of the range of offsets: less than h rows and w columns in
            either direction, (2h - 1)(2w - 1) numbers per position.
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
        """Maps (B, C, H, W) to (B, 2C, H, W): collected, then distributed features."""
        batch, _, height, width = x.shape
        index, is_predicted = self._offsets(height, width, x.device)  # (N, N), both
        index = index.expand(batch, -1, -1)  # a view
        features = x.flatten(2)  # (B, C, N)
        # (B, N, N) each: h_i[j - i] at [j, i], and h_j[i - j] at [i, j]
        collect, distribute = (
            # No softmax is over -inf alone, since the offset 0 is always predicted.
            predict(x).flatten(2).gather(1, index).masked_fill(~is_predicted, -torch.inf).softmax(i)
            for i, predict in enumerate((self.collect, self.distribute), start=1)
        )
        both = torch.cat((features @ collect, features @ distribute.transpose(1, 2)), dim=1)
        return both.unflatten(2, (height, width))  # (B, 2C, H, W)

    def _offsets(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the index of the offset a - b in a predicted map, at [a, b], and if it exists."""
        h, w = self.mask_size
        rows = torch.arange(height, device=device).repeat_interleave(width)  # (N,)
        columns = torch.arange(width, device=device).repeat(height)  # (N,)
        down, across = (n[:, None] - n[None, :] for n in (rows, columns))  # (N, N)
        is_predicted = (down.abs() < h) & (across.abs() < w)
        # Row-major in a map of 2h - 1 by 2w - 1, with the offset 0 in the middle.
        index = (down + h - 1) * (2 * w - 1) + across + w - 1
        return index.masked_fill(~is_predicted, 0), is_predicted  # any valid index where masked


class PSAHead(nn.Module):
    """Point-wise spatial attention on a smaller map, concatenated to the feature map (figure 2).

    Args:
        mask_size: As in PointwiseAttention, for the smaller map: crop / (8 * shrink) covers all
            offsets at output stride 8.
        shrink: Factor by which the map is downsampled for the attention.
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
        # H / shrink and W / shrink, rounded up
        small = ((size[0] - 1) // self.shrink + 1, (size[1] - 1) // self.shrink + 1)
        # (B, in_channels, H / shrink, W / shrink)
        context = self.widen(self.attention(resize(self.reduce(x), small)))
        return {"main": self.classify(self.join(torch.cat((x, resize(context, size)), dim=1)))}
