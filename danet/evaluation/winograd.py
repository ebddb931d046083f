"""A 3x3 convolution with a quarter of the multiplications: Winograd's F(4x4, 3x3), for CPUs.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016: a tile of 4 x 4 outputs
takes 36 products per pair of channels instead of 144, computed as 36 matrix products.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_OUT = 4
"""Outputs of a tile per axis."""
_IN = _OUT + 2
"""Input pixels of a tile per axis."""
_TILES = 256
"""Tiles at a time: 75 MB of transformed input with 2048 channels; more are not faster."""
_POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)
"""Where the polynomials are evaluated, with infinity. The largest rounding error is about 2e-5 of a
map's standard deviation: a third of that with the usual (0, 1, -1, 2, -2), and two to five times
that of a direct convolution."""


def _transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Return A' (4, 6), G (6, 3), B' (6, 6) with y = A' ((G w) * (B' x)), by Cook and Toom."""
    points = torch.tensor(_POINTS, dtype=torch.float64)  # (5,)
    powers = points[:, None] ** torch.arange(_IN - 1)  # (5, 5)
    outputs, weights, inputs = (torch.zeros(n, _IN).double() for n in (_OUT, 3, _IN))
    # At infinity a polynomial has the value of its leading coefficient: the last column.
    outputs[:, :-1], outputs[-1, -1] = powers[:, :_OUT].T, 1
    weights[:, :-1], weights[-1, -1] = powers[:, :3].T, 1
    for i, point in enumerate(points):
        others = torch.cat((points[:i], points[i + 1 :]))
        inputs[:-1, i] = _polynomial(others)
        weights[:, i] /= (point - others).prod()
    inputs[:, -1] = _polynomial(points)
    return outputs, weights.T, inputs.T


def _polynomial(roots: Tensor) -> Tensor:
    """Return the coefficients of prod_i (x - r_i), the lowest power first."""
    coefficients = torch.ones(1, dtype=roots.dtype)
    for root in roots:
        coefficients = F.pad(coefficients, (1, 0)) - root * F.pad(coefficients, (0, 1))
    return coefficients


class WinogradConv2d(nn.Module):
    """Computes a 3x3 convolution for evaluation: its weights take no gradient.

    With dilation d it is d x d plain convolutions, each on every d-th pixel (a phase). A map that
    its tiles would cover badly, or one that is not float32, takes the direct convolution.

    Args:
        conv: 3x3, stride 1, one group, padded with zeros by its dilation.
    """

    kernels: Tensor
    to_tiles: Tensor
    from_tiles: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.direct = conv
        outputs, weights, inputs = _transforms()
        kernels = conv.weight.new_empty(_IN**2, conv.in_channels, conv.out_channels)
        for part, into in zip(conv.weight.split(64), kernels.split(64, dim=2), strict=True):
            # In parts, since float64 takes twice the memory.
            made = torch.einsum("ia,jb,ocab->ijco", weights, weights, part.detach().double())
            into.copy_(made.flatten(0, 1))  # (36, C, 64)
        self.register_buffer("kernels", kernels)  # (36, C, out)
        # Both axes at once: a tile is a vector of 36 pixels.
        self.register_buffer("to_tiles", torch.kron(inputs, inputs).float())  # (36, 36)
        self.register_buffer("from_tiles", torch.kron(outputs, outputs).float())  # (16, 36)

    @staticmethod
    def supports(conv: nn.Conv2d) -> bool:
        """Return whether a convolution can be computed so, and is faster by it."""
        return (
            conv.kernel_size == (3, 3)
            and conv.stride == (1, 1)
            and conv.groups == 1
            and conv.dilation[0] == conv.dilation[1]
            and conv.padding == conv.dilation
            and conv.padding_mode == "zeros"
            and conv.weight.dtype == torch.float32
            # With fewer channels the transforms cost more than the matrix products save.
            and min(conv.in_channels, conv.out_channels) >= 128
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, out, H, W), in channels_last order."""
        height, width = x.shape[2:]
        step = _OUT * self.direct.dilation[0]  # tiles of all phases together
        rows, columns = -(-height // step), -(-width // step)  # rounded up
        # Nothing is gained where the tiles have 1.75 times the pixels of the map.
        if x.dtype != torch.float32 or rows * columns * step**2 > 1.75 * height * width:
            return self.direct(x)
        out = self._convolve(x, rows, columns)[:, :, :height, :width]
        return out if self.direct.bias is None else out + self.direct.bias[:, None, None]

    def _convolve(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Return the convolution of all tiles, (B, out, rows * 4d, columns * 4d)."""
        d, out_channels = self.direct.dilation[0], self.direct.out_channels
        step, tiles_per_row = _OUT * d, d * d * columns  # tiles of all phases
        rows_at_once = max(1, _TILES // tiles_per_row)
        # Small images go together: otherwise each would read all the kernels for a few tiles.
        images_at_once = max(1, _TILES // (rows * tiles_per_row))
        out = x.new_empty(x.shape[0], rows * step, columns * step, out_channels)
        parts = zip(x.split(images_at_once), out.split(images_at_once), strict=True)
        for images, results in parts:
            for first in range(0, rows, rows_at_once):
                count = min(rows_at_once, rows - first)
                tiles = self._tiles(images, first, count, columns)  # (36, T, C)
                products = tiles @ self.kernels  # (36, T, out), the 36 matrix products
                products = products.view(_IN**2, len(images) * count, -1)  # by row of tiles
                places = product(results, range(first, first + count))
                for number, (result, row) in enumerate(places):
                    values = self.from_tiles @ products[:, number]  # (16, tiles * out)
                    values = values.view(_OUT, _OUT, d, columns, d, out_channels)
                    into = result[row * step : (row + 1) * step]  # (4d, columns * 4d, out)
                    into = into.view(_OUT, d, columns, _OUT, d, out_channels)
                    # Pixels of a tile are d apart, so phases lie inside of them.
                    into.copy_(values.permute(0, 2, 3, 1, 4, 5))
        return out.permute(0, 3, 1, 2)

    def _tiles(self, images: Tensor, first: int, count: int, columns: int) -> Tensor:
        """Return ``count`` rows of transformed tiles of (B, C, H, W), (36, B x tiles, C)."""
        d, (batch, channels) = self.direct.dilation[0], images.shape[:2]
        step = _OUT * d
        above, below = first * step - d, (first + count) * step + d
        inside = images[:, :, max(above, 0) : below]  # rows of the map; the others are padding
        height, width = inside.shape[2:]
        top = max(-above, 0)
        border = (d, columns * step + d - width, top, below - above - top - height)
        padded = F.pad(inside, border).permute(0, 2, 3, 1).contiguous()  # (B, Y, X, C)
        each, down, right, _ = padded.stride()
        # Tiles overlap by 2d pixels, so they are a view until they are gathered.
        tiles = padded.as_strided(
            (batch, count, _IN, _IN, d, columns, d, channels),
            (each, down * step, down * d, right * d, down, right * step, right, 1),
        )
        transformed = padded.new_empty(_IN**2, batch * count, d * columns * d * channels)
        # One row of tiles at a time, so that it is multiplied while it is in the cache.
        for number, (image, row) in enumerate(product(range(batch), range(count))):
            gathered = tiles[image, row].reshape(_IN**2, -1)  # (36, d * columns * d * C)
            torch.mm(self.to_tiles, gathered, out=transformed[:, number])
        return transformed.view(_IN**2, -1, channels)
