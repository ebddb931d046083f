"""Dilated ResNet: the backbone of section 3.1, built from torchvision's blocks."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from danet.checkpoint.weights import load_backbone
from danet.models.finetuning import Freeze, Layer, freeze_stages, keep_in_eval

Stem = Literal["7x7", "64-64-128", "32-32-64"]
_NUM_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""Blocks per stage, by depth."""


class ResNet(nn.Module):
    """Residual network whose last stages keep their resolution by dilation.

    Parameter names are torchvision's, so its weights load as they are. The stride is on the 3x3
    convolution of a bottleneck. Where a stage is dilated instead of strided, the convolution that
    had the stride keeps the dilation of the previous stage, as in the released code.

    Args:
        depth: 18, 34, 50 or 101.
        output_stride: Pixels of the image per pixel of the last map: 8 (the paper), 16 or 32.
        multi_grid: Dilations of the blocks of the last stage, as absolute values and repeated if
            there are more blocks; the paper's best models use (4, 8, 16) at output stride 8.
        stem: ``7x7`` is torchvision's and the released DANet's. The deep stems are three 3x3
            convolutions of these widths: 64-64-128 as in PyTorch-Encoding, 32-32-64 as in
            ResNetV1c.
        width: Channels of the first stage; 64 in the standard networks.
        weights: Initial weights: None for random ones, the path of a state dict, or the name of a
            torchvision weight entry such as ``IMAGENET1K_V1`` (downloaded once).
        recompute: Numbers 1..4 of the stages with activation checkpointing: in training their
            blocks keep only the inputs. Less memory, more time, the same results.
        freeze: Last stage whose weights and statistics stay as they are: ``none``, ``stem``,
            1..4, or ``all``, which is 4.
        norm_eval: Whether batch norms keep their statistics in training; their weights learn.

    Attributes:
        channels: Of the four feature maps.
    """

    def __init__(
        self,
        *,
        depth: int,
        output_stride: int = 8,
        multi_grid: Sequence[int] | None = None,
        stem: Stem = "7x7",
        width: int = 64,
        weights: str | None = None,
        recompute: Sequence[int] = (),
        freeze: Freeze = "none",
        norm_eval: bool = False,
    ) -> None:
        super().__init__()
        if depth not in _NUM_BLOCKS:
            raise ValueError(f"depth={depth} is not one of {', '.join(map(str, _NUM_BLOCKS))}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride={output_stride} is not 8, 16 or 32")
        if width < 1:
            raise ValueError(f"width={width} is not a positive number of channels")
        if multi_grid is not None and (not multi_grid or min(multi_grid) < 1):
            raise ValueError(f"multi_grid={list(multi_grid)} must hold dilations of at least 1")
        if not set(recompute) <= {1, 2, 3, 4}:
            raise ValueError(f"recompute={list(recompute)} must hold numbers of stages, 1 to 4")
        self.recompute, self.norm_eval = frozenset(recompute), norm_eval
        # Imported late: it takes seconds, and checking a config needs no blocks.
        from torchvision.models.resnet import BasicBlock, Bottleneck

        counts = _NUM_BLOCKS[depth]
        self._has_bottlenecks = depth >= 50
        self._block = Bottleneck if self._has_bottlenecks else BasicBlock
        self._channels = self._make_stem(stem, width)  # input channels of the next block
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

        stages, stride, dilation = [], 4, 1  # the stem and the pooling have stride 2 each
        for stage, count in enumerate(counts):
            first_dilation, step = dilation, 1
            if stage > 0 and stride < output_stride:
                stride, step = stride * 2, 2
            elif stage > 0:
                dilation *= 2
            dilations = [dilation] * count  # at output stride 8: 1, 1, 2, 4
            if stage == 3 and multi_grid is not None:
                dilations = [multi_grid[i % len(multi_grid)] for i in range(count)]
                # With multi-grid the released code has no exception for the first block.
                first_dilation = dilations[0]
            stages.append(self._make_stage(width * 2**stage, step, first_dilation, dilations))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.channels = [width * 2**stage * self._block.expansion for stage in range(4)]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # From N(0, 2 / (k * k * out)), as in the released code.
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        if weights is not None:
            load_backbone(self, depth, weights)
        freeze_stages(self, self.layers(), freeze)

    def _make_stem(self, stem: Stem, width: int) -> int:
        """Create conv1 and bn1; return the number of their output channels."""
        if stem == "7x7":
            self.conv1: nn.Module = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            return width
        if stem not in ("64-64-128", "32-32-64"):
            raise ValueError(f"stem={stem!r} is not '7x7', '64-64-128' or '32-32-64'")
        # The names are widths for a network of standard width, 64.
        widths = [3, *(int(n) * width // 64 for n in stem.split("-"))]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            conv = nn.Conv2d(before, after, 3, stride=1 if layers else 2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.conv1 = nn.Sequential(*layers[:-2])  # bn1 and relu follow, as after the 7x7 stem
        self.bn1 = nn.BatchNorm2d(widths[-1])
        return widths[-1]

    def _make_stage(
        self, planes: int, stride: int, first_dilation: int, dilations: Sequence[int]
    ) -> nn.Sequential:
        """Return the blocks of a stage; the convolution with the stride has ``first_dilation``."""
        blocks = []
        for i, dilation in enumerate(dilations):
            step = stride if i == 0 else 1
            out = planes * self._block.expansion
            downsample = None
            if step != 1 or self._channels != out:
                downsample = nn.Sequential(
                    nn.Conv2d(self._channels, out, 1, stride=step, bias=False), nn.BatchNorm2d(out)
                )
            block = self._block(self._channels, planes, step, downsample)
            # Set afterwards, since torchvision's BasicBlock rejects it in its constructor.
            strided = block.conv2 if self._has_bottlenecks else block.conv1
            for conv in (block.conv2, strided):  # 3x3; padding of the dilation keeps the size
                first = i == 0 and conv is strided
                conv.dilation = conv.padding = (first_dilation if first else dilation,) * 2
            blocks.append(block)
            self._channels = out
        return nn.Sequential(*blocks)

    def layers(self) -> list[Layer]:
        """Return the parameters by depth: the stem, then block after block."""
        parts: list[tuple[int, tuple[str, ...]]] = [(0, ("conv1.", "bn1."))]
        for n, stage in enumerate((self.layer1, self.layer2, self.layer3, self.layer4), start=1):
            parts += [(n, (f"layer{n}.{i}.",)) for i in range(len(stage))]
        names = [name for name, _ in self.named_parameters()]
        return [Layer(n, tuple(k for k in names if k.startswith(p))) for n, p in parts]

    def train(self, mode: bool = True) -> "ResNet":
        """Set training or eval mode; what is frozen stays in eval mode."""
        super().train(mode)
        if mode:
            keep_in_eval(self, norm_eval=self.norm_eval)
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, 3, H, W) to the outputs of the four stages, finest first."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (B, channels of the stem, H/4, W/4)
        maps = []
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        for number, stage in enumerate(stages, start=1):
            # Of a stage and not of the network: a frozen stage is in eval mode, and keeps nothing.
            if number in self.recompute and stage.training and torch.is_grad_enabled():
                # Block by block, since the backward pass of a checkpointed stage would hold the
                # activations of all its blocks at once.
                for block in stage:
                    x = _checkpoint_block(block, x)
            else:
                x = stage(x)
            maps.append(x)  # at output stride 8: H/4, H/8, H/8, H/8
        return maps


def _checkpoint_block(block: nn.Module, x: Tensor) -> Tensor:
    """Apply a block, keeping only its input for backward."""
    # preserve_rng_state=False: a block draws no random numbers.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    # The compiler recomputes pure kernels; statistics are updated outside of them, once.
    if not torch.compiler.is_compiling():
        options["context_fn"] = lambda: (nullcontext(), _preserve_buffers(block))
    return checkpoint(block, x, **options)


@contextmanager
def _preserve_buffers(block: nn.Module) -> Iterator[None]:
    """Replace buffers by copies for a while, so that an image counts once in running statistics."""
    kept = [(m, name, b) for m in block.modules() for name, b in m.named_buffers(recurse=False)]
    for module, name, buffer in kept:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)
