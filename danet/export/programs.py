"""Programs that run without this project, and their deviation from the network."""

import copy
import io
import logging
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

from danet.errors import InputError, UserError
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
    """The deviation of a program from the network on an image."""

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
    Here it goes over tiles of queries, so that 512 x N weights exist at a time and never N x N. For
    images of any size that is a ``scan``: ONNX has it as the operator Scan, and torch.export as a
    higher-order operator. For images of one size the tiles are written out one by one
    (``is_unrolled``), for runtimes without Scan.
    """

    def __init__(self, model: nn.Module, *, is_unrolled: bool = False) -> None:
        super().__init__()
        self.network = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        for module in self.network.modules():
            if isinstance(module, PositionAttention):
                module.__class__ = _TiledAttention if is_unrolled else _ScannedAttention

    def forward(self, image: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to (B, K, H, W)."""
        return self.network(image).logits


class _TiledAttention(PositionAttention):
    """A PositionAttention in operations that exporters support: one tile of queries at a time."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Maps (B, N, D), (B, M, D) and (B, M, C) to (B, N, C)."""
        by_channel = key.transpose(1, 2)  # (B, D, M)
        tiles = query.split(QUERIES_PER_TILE, dim=1)
        return torch.cat([(tile @ by_channel).softmax(dim=-1) @ value for tile in tiles], dim=1)


class _ScannedAttention(PositionAttention):
    """A PositionAttention for images of any size: a scan over tiles of queries."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Maps (B, N, D), (B, M, D) and (B, M, C) to (B, N, C)."""
        batch, count, width = query.shape
        # A scan needs tiles of one size; the result of the padding is cut off. Two tiles more than
        # are full, so that there is never one alone and always some padding: exporters specialise
        # on both.
        tiles = count // QUERIES_PER_TILE + 2
        padded = F.pad(query, (0, 0, 0, tiles * QUERIES_PER_TILE - count))

        def step(carry: list[Tensor], tile: Tensor) -> tuple[list[Tensor], Tensor]:
            key, value = carry
            weights = torch.bmm(tile, key).softmax(dim=-1)  # (B, tile, M)
            # A carry must not alias its input.
            return [key.clone(), value.clone()], torch.bmm(weights, value)

        # (tiles, B, tile, D)
        by_tile = padded.view(batch, tiles, QUERIES_PER_TILE, width).transpose(0, 1)
        # Keys and values are carried: OpenVINO, and ONNX Runtime in int8, reject a body that takes
        # them from outside.
        _, found = scan(step, [key.transpose(1, 2), value], by_tile, dim=0)  # (tiles, B, tile, C)
        return found.transpose(0, 1).flatten(1, 2)[:, :count]


class _SamePadding(nn.Conv2d):
    # TensorFlow pads the start of an axis by a formula of its length, but its end, at stride 2, by
    # a fixed number. So this runs from the end to the start.

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, out, H / 2, W / 2), rounded up."""
        return super()._conv_forward(x.flip(2, 3), self.weight.flip(2, 3), self.bias).flip(2, 3)


def export_onnx(
    model: nn.Module, path: Path, opset: int = OPSET, size: Sequence[int] | None = None
) -> Program:
    """Write an ONNX file; return its program. Needs onnx, onnxscript and onnxruntime.

    Batch, height and width are free; with a ``size``, H and W, the batch is 1 and all are fixed.
    """
    import onnx

    exportable = Exportable(model, is_unrolled=size is not None)
    weights = set() if size else _fix_padding(exportable, nn.Conv2d)
    with _quiet(), atomic_write(path) as temporary:
        torch.onnx.export(
            exportable,
            (_noise(model, *((1, *size) if size else _EXAMPLE)),),
            temporary,
            dynamo=True,
            dynamic_shapes=None if size else {"image": {0: "batch", 2: "height", 3: "width"}},
            input_names=["image"],
            output_names=["logits"],
            opset_version=opset,
            external_data=False,
        )
        program = onnx.load(temporary)
        if program.opset_import[0].version != opset:  # the exporter leaves it at 18 then
            raise InputError(f"opset={opset}: the exporter cannot write it; set opset={OPSET}")
        for node in program.graph.node:
            if node.op_type == "Conv" and node.input[1] in weights:
                kept = [a for a in node.attribute if a.name not in ("pads", "auto_pad")]
                del node.attribute[:]
                same = onnx.helper.make_attribute("auto_pad", "SAME_UPPER")
                node.attribute.extend([*kept, same])
        onnx.save(program, temporary)
    return load_onnx(path)


def load_onnx(path: Path) -> Program:
    """Return the program of an ONNX file, run by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: session.run(["logits"], {"image": image})[0]


def _fix_padding(model: nn.Module, strided: type[nn.Conv2d]) -> set[str]:
    """Give convolutions with the padding of TensorFlow a fixed one; return their weights' names.

    The former depends on the size of the input by a formula that keeps torch.export busy for hours
    where sizes are free. Those of a stride become ``strided``. Both lead to outputs of one size,
    and in ONNX the former is an attribute.
    """
    weights = set()
    for name, module in model.named_modules():
        found: Any = module
        if type(module).__name__ == "Conv2dSame" and all(k % 2 for k in found.kernel_size):  # timm
            sizes = zip(found.dilation, found.kernel_size, strict=True)
            found.padding = tuple(d * (k // 2) for d, k in sizes)
            is_shifted = max(found.stride) > 1 and max(found.kernel_size) > 1
            found.__class__ = strided if is_shifted else nn.Conv2d
            weights.add(f"{name}.weight")
    return weights


def export_torch(model: nn.Module, path: Path, size: Sequence[int] | None = None) -> Program:
    """Write a program of torch.export (.pt2) and return it; its sizes are as in ``export_onnx``."""
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    with _quiet(), atomic_write(path) as temporary:
        network = Exportable(model, is_unrolled=size is not None)
        if not size:
            _fix_padding(network, _SamePadding)
        images = (_noise(model, *((1, *size) if size else _EXAMPLE)),)
        written = torch.export.export(network, images, dynamic_shapes=None if size else (free,))
        buffer = io.BytesIO()  # on a full disk torch would not raise an OSError
        torch.export.save(written, buffer)
        temporary.write_bytes(buffer.getvalue())
    with _quiet():
        module = torch.no_grad()(torch.export.load(path).module())
    return lambda image: module(torch.from_numpy(image)).numpy()


def compare(model: nn.Module, program: Program, sizes: Sequence[Sequence[int]]) -> list[Parity]:
    """Compare a program with the network it came from, on one image of noise per size (H, W).

    Raises UserError if they differ by more than rounding explains.
    """
    found = [compare_on(_noise(model, 1, *size), model, program) for size in sizes]
    for height, width, difference, scale, _ in found:
        if not difference <= 1e-3 * max(1.0, scale):  # negated, so that NaN is refused
            raise UserError(
                f"at {height} x {width} a logit of the exported program differs by "
                f"{difference:.3g} from the network, whose largest is {scale:.3g}; that is more "
                "than rounding, so the file should not be used"
            )
    return found


@torch.inference_mode()
def compare_on(image: Tensor, model: nn.Module, program: Program) -> Parity:
    """Compare a program with the network on a batch of images, (B, N, H, W)."""
    expected, got = model(image).logits, torch.from_numpy(program(image.numpy()))
    difference, scale = (got - expected).abs().max().item(), expected.abs().max().item()
    agreement = (got.argmax(dim=1) == expected.argmax(dim=1)).double().mean().item()
    return Parity(image.shape[2], image.shape[3], difference, scale, agreement)


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
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
