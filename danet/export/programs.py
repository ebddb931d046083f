"""Programs that run without this project, and their deviation from the network."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from danet.errors import UserError
from danet.filesystem import atomic_write
from danet.ops.attention import PositionAttention

SMALLEST = 9
"""Smallest side for an exported program: maps of one cell would be resized otherwise."""
OPSET = 20
"""Of ONNX: from 2023, which current runtimes support."""
_EXAMPLE = (2, 255, 265)  # batch, height, width; exporters take 1 and multiples of 8 for constants
QUERIES_PER_TILE = 512
"""Of the attention in ONNX."""
Program = Callable[[np.ndarray], np.ndarray]
"""Maps an image, uint8 (B, 3, H, W) RGB or raw bands, to logits, float32 (B, K, H, W)."""


class Parity(NamedTuple):
    """The deviation of a program from the network on an image of noise."""

    height: int
    width: int
    difference: float
    """The largest one between two logits."""
    scale: float
    """The largest absolute logit of the network."""
    agreement: float
    """Fraction of the pixels with the same class."""


class Exportable(nn.Module):
    """A copy of a Segmentor that maps an image to logits (B, K, H, W).

    The image is uint8 (B, 3, H, W), RGB, or raw bands (B, N, H, W), uint8 or float32.

    In training and evaluation position attention is a custom operator, which other runtimes lack.
    Here it is a ``scan`` over tiles of queries: ONNX has that as the operator Scan, and
    torch.export as a higher-order operator. So a program takes every size, and holds 512 x N
    weights at a time and never N x N.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        for module in self.network.modules():
            if isinstance(module, PositionAttention):
                module.__class__ = _ScannedAttention

    def forward(self, image: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to (B, K, H, W)."""
        return self.network(image).logits


class _ScannedAttention(PositionAttention):
    """A PositionAttention in operations that exporters support: one tile of queries at a time."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, H, W)."""
        query = self.query(x).flatten(2).transpose(1, 2)  # (B, N, D)
        key = self.key(x).flatten(2)  # (B, D, N)
        value = self.value(x).flatten(2).transpose(1, 2)  # (B, N, C)
        batch, count, width = query.shape
        # A scan needs tiles of one size; the result of the padding is cut off. Two tiles more than
        # are full, so that there is never one alone and always some padding: exporters specialise
        # on both.
        tiles = count // QUERIES_PER_TILE + 2
        padded = F.pad(query, (0, 0, 0, tiles * QUERIES_PER_TILE - count))

        def step(carry: Tensor, tile: Tensor) -> tuple[Tensor, Tensor]:
            weights = torch.bmm(tile, key).softmax(dim=-1)  # (B, tile, N)
            return carry.clone(), torch.bmm(weights, value)  # a carry must not alias its input

        # (tiles, B, tile, D)
        by_tile = padded.view(batch, tiles, QUERIES_PER_TILE, width).transpose(0, 1)
        _, found = scan(step, query.new_zeros(1), by_tile, dim=0)  # (tiles, B, tile, C)
        context = found.permute(1, 3, 0, 2).flatten(2)[:, :, :count]  # (B, C, N)
        return x + self.gamma * context.unflatten(2, x.shape[2:])


def export_onnx(model: nn.Module, path: Path, opset: int = OPSET) -> Program:
    """Write an ONNX file with free batch, height and width; return its program, run on the CPU.

    It needs the packages onnx, onnxscript and onnxruntime.
    """
    import onnx
    import onnxruntime

    exportable = Exportable(model)
    weights = _fix_padding(exportable)
    with _quiet(), atomic_write(path) as temporary:
        torch.onnx.export(
            exportable,
            (_noise(model, *_EXAMPLE),),
            temporary,
            dynamo=True,
            dynamic_shapes={"image": {0: "batch", 2: "height", 3: "width"}},
            input_names=["image"],
            output_names=["logits"],
            opset_version=opset,
            external_data=False,
        )
        program = onnx.load(temporary)
        for node in program.graph.node:
            if node.op_type == "Conv" and node.input[1] in weights:
                kept = [a for a in node.attribute if a.name not in ("pads", "auto_pad")]
                del node.attribute[:]
                same = onnx.helper.make_attribute("auto_pad", "SAME_UPPER")
                node.attribute.extend([*kept, same])
        onnx.save(program, temporary)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: session.run(["logits"], {"image": image})[0]


def _fix_padding(model: nn.Module) -> set[str]:
    """Give convolutions with the padding of TensorFlow a fixed one; return their weights' names.

    The former depends on the size of the input by a formula that keeps torch.export busy for hours
    where sizes are free. Both lead to outputs of one size, and in ONNX the former is an attribute.
    """
    weights = set()
    for name, module in model.named_modules():
        found: Any = module
        if type(module).__name__ == "Conv2dSame" and all(k % 2 for k in found.kernel_size):  # timm
            sizes = zip(found.dilation, found.kernel_size, strict=True)
            found.__class__, found.padding = nn.Conv2d, tuple(d * (k // 2) for d, k in sizes)
            weights.add(f"{name}.weight")
    return weights


def export_torch(model: nn.Module, path: Path) -> Program:
    """Write a program of torch.export (.pt2) with free batch, height and width, and return it."""
    images, sizes = (_noise(model, *_EXAMPLE),), dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    with _quiet(), atomic_write(path) as temporary:
        network = Exportable(model)
        written = torch.export.export(network, images, dynamic_shapes={"image": sizes})
        torch.export.save(written, temporary)
    with _quiet():
        module = torch.no_grad()(torch.export.load(path).module())
    return lambda image: module(torch.from_numpy(image)).numpy()


def compare(model: nn.Module, program: Program, sizes: Sequence[tuple[int, int]]) -> list[Parity]:
    """Compare a program with the network it came from, on one image of noise per size (H, W).

    Raises UserError if they differ by more than rounding explains.
    """
    found = []
    for height, width in sizes:
        image = _noise(model, 1, height, width)
        with torch.inference_mode():
            expected = model(image).logits
        got = torch.from_numpy(program(image.numpy()))
        difference, scale = (got - expected).abs().max().item(), expected.abs().max().item()
        if not difference <= 1e-3 * max(1.0, scale):  # negated, so that NaN is refused
            raise UserError(
                f"at {height} x {width} a logit of the exported program differs by "
                f"{difference:.3g} from the network, whose largest is {scale:.3g}; that is more "
                "than rounding, so the file should not be used"
            )
        agreement = (got.argmax(dim=1) == expected.argmax(dim=1)).double().mean().item()
        found.append(Parity(height, width, difference, scale, agreement))
    return found


def _noise(model: Any, *size: int) -> Tensor:
    image: Tensor = model.example(*size)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, image.shape, generator=generator)
    if image.dtype == torch.uint8:
        return noise.to(image)
    low, high = torch.tensor(model.bands.limits).T[:, :, None, None]  # (N, 1, 1) each
    return low + noise / 255 * (high - low)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' progress and warnings."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
