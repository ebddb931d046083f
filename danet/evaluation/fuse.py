"""The network as evaluation runs it: the same function in fewer operations.

On CPUs 3x3 convolutions take a quarter of the multiplications by Winograd's F(4x4, 3x3), Lavin and
Gray, "Fast Algorithms for Convolutional Neural Networks", 2016: a tile of 4 x 4 outputs takes 36
products per pair of channels instead of 144, computed as 36 matrix products. Whole evaluation of
DANet on a ResNet-50 is 1.4 to 1.5 times as fast by it (docs/benchmarks.md).
"""

import copy
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from danet.distributed.sync_batchnorm import SyncBatchNorm

_OUT = 4  # outputs of a tile per axis
_IN = _OUT + 2  # input pixels of a tile per axis
_TILES = 256  # tiles at a time: 75 MB of transformed input with 2048 channels; more are not faster

# y = A' ((G w) * (B' x)) by Cook and Toom, at five points and at infinity. The largest rounding
# error is about 2e-5 of a map's standard deviation: a third of that with the usual points 0, 1, -1,
# 2, -2, and two to five times that of a direct convolution.
_POINTS = np.array([0, 1, -1, 1 / 2, -2])
_POWERS = torch.from_numpy(_POINTS[:, None] ** np.arange(_OUT))  # (5, 4)
_OTHERS = [np.delete(_POINTS, i) for i in range(5)]
_PRODUCTS = torch.tensor([np.prod(x - others) for x, others in zip(_POINTS, _OTHERS, strict=True)])
_OUTPUTS = F.pad(_POWERS.T, (0, 1))  # A', (4, 6)
_WEIGHTS = F.pad(_POWERS[:, :3] / _PRODUCTS[:, None], (0, 0, 0, 1))  # G, (6, 3)
# At infinity a polynomial has the value of its leading coefficient.
_OUTPUTS[-1, -1] = _WEIGHTS[-1, -1] = 1
# Coefficients, from x^0 on, of the polynomials that are 0 at all other points: B', (6, 6).
_INPUTS = torch.tensor([[*np.poly(x)[::-1], 0][:_IN] for x in [*_OTHERS, _POINTS]])
# Both axes at once: a tile is a vector of 36 pixels.
_TO_TILES = torch.kron(_INPUTS, _INPUTS).float()  # (36, 36)
_FROM_TILES = torch.kron(_OUTPUTS, _OUTPUTS).float()  # (16, 36)


class WinogradConv2d(nn.Module):
    """Computes a 3x3 convolution for evaluation: its weights take no gradient.

    With dilation d it is d x d plain convolutions, each on every d-th pixel (a phase). A map that
    its tiles would cover badly, or one that is not float32, takes the direct convolution.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.direct = conv

    @cached_property
    def kernels(self) -> Tensor:
        """The transformed weights, (36, C, out), made when they are first needed."""
        # In parts, since float64 takes twice the memory.
        parts = [
            torch.einsum("ia,jb,ocab->ijco", _WEIGHTS, _WEIGHTS, part.detach().double()).float()
            for part in self.direct.weight.split(64)
        ]
        return torch.cat(parts, dim=3).flatten(0, 1)

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
        d = self.direct.dilation[0]
        step = _OUT * d  # tiles of all phases together
        rows, columns = -(-height // step), -(-width // step)  # rounded up
        # Nothing is gained where the tiles have 1.75 times the pixels of the map.
        if x.dtype != torch.float32 or rows * columns * step**2 > 1.75 * height * width:
            return self.direct(x)
        border = (d, columns * step + d - width, d, rows * step + d - height)
        padded = F.pad(x, border).permute(0, 2, 3, 1).contiguous()  # (B, (4 rows + 2) d, ..., C)
        cells = padded.unflatten(2, (-1, d)).unflatten(1, (-1, d))
        # Neighbours share two rows and columns, so tiles are a view until they are gathered.
        tiles = cells.unfold(1, _IN, _OUT).unfold(3, _IN, _OUT)  # (B, rows, d, columns, d, C, 6, 6)
        rows_at_once = max(1, _TILES // (len(x) * d * d * columns))
        parts = [self._convolve(part) for part in tiles.split(rows_at_once, dim=1)]
        out = torch.cat(parts, dim=1)[:, :height, :width].permute(0, 3, 1, 2)
        return out if self.direct.bias is None else out + self.direct.bias[:, None, None]

    def _convolve(self, tiles: Tensor) -> Tensor:
        """Maps tiles (B, R, d, S, d, C, 6, 6) to results (B, R * 4d, S * 4d, out)."""
        batch, rows, d, columns = tiles.shape[:4]
        gathered = tiles.permute(6, 7, 0, 1, 2, 3, 4, 5).reshape(_IN**2, -1)
        transformed = (_TO_TILES @ gathered).view(_IN**2, -1, tiles.shape[5])  # (36, tiles, C)
        products = transformed @ self.kernels  # (36, tiles, out), the 36 matrix products
        values = _FROM_TILES @ products.flatten(1)  # (16, tiles * out)
        values = values.view(_OUT, _OUT, batch, rows, d, columns, d, -1)
        # Pixels of a tile are d apart, so phases lie inside of them.
        ordered = values.permute(2, 3, 0, 4, 5, 1, 6, 7)  # (B, R, 4, d, S, 4, d, out)
        return ordered.reshape(batch, rows * _OUT * d, columns * _OUT * d, -1)


def fuse_for_inference(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy in eval mode that computes the same function up to rounding.

    Batch norms are folded into the convolutions before them, and on a CPU 3x3 convolutions use
    Winograd's algorithm. The memory format is the device's, whichever one the training had, so
    that a score does not depend on it. The copy is for one evaluation, not for training.
    """
    fused = copy.deepcopy(model).eval()
    for module in list(fused.modules()):
        for conv_name, norm_name in _conv_norm_pairs(module):
            conv, norm = getattr(module, conv_name), getattr(module, norm_name)
            # No subclasses: timm's standardise weights or add an activation. Without running
            # statistics a norm normalises by those of each batch.
            is_known = type(conv) is nn.Conv2d and type(norm) in (nn.BatchNorm2d, SyncBatchNorm)
            if is_known and norm.running_mean is not None:
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())  # indices of a Sequential stay
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    for module in list(fused.modules()):
        if isinstance(module, nn.Conv2d):
            # Cloned, since the conversions of torch leave the strides of 1x1 convolutions, by
            # which it chooses kernels.
            weight = module.weight.detach().clone(memory_format=memory_format)
            module.weight = nn.Parameter(weight, requires_grad=False)
        for name, child in list(module.named_children()):
            if device.type == "cpu" and type(child) is nn.Conv2d and WinogradConv2d.supports(child):
                setattr(module, name, WinogradConv2d(child))
    return fused.eval()  # modules made since are in training mode


def _conv_norm_pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Return the names of children of which the second is called on the output of the first.

    Only where the order of calls is certain: in a plain Sequential, and in torchvision's blocks.
    """
    names = [name for name, _ in module.named_children()]
    if type(module) is nn.Sequential:
        return list(pairwise(names))
    if type(module).__module__ == "torchvision.models.resnet":
        # ResNet, BasicBlock and Bottleneck call bn{i} on the output of conv{i}.
        return [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if f"bn{i}" in names]
    return []
