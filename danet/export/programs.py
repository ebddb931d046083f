"""Programs that run without this project, and their deviation from the network."""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from danet.errors import UserError
from danet.export.network import Exportable
from danet.filesystem import atomic_write

OPSET = 20
"""Of ONNX: from 2023, which current runtimes support."""

Program = Callable[[np.ndarray], np.ndarray]
"""Maps an image, uint8 (B, 3, H, W) RGB, to logits, float32 (B, K, H, W)."""


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


def export_onnx(model: nn.Module, path: Path, opset: int = OPSET) -> Program:
    """Write an ONNX file with free batch, height and width, and return its program.

    It needs the packages onnx, onnxscript and onnxruntime.
    """
    import onnx_ir.passes.common as passes

    free = {"image": {0: "batch", 2: "height", 3: "width"}}
    with _quiet():
        program = torch.onnx.export(
            Exportable(model),
            (_example(),),
            dynamo=True,
            dynamic_shapes=free,
            input_names=["image"],
            output_names=["logits"],
            opset_version=opset,
        )
    assert program is not None
    passes.RemoveUnusedNodesPass()(program.model)
    with atomic_write(path) as temporary:
        program.save(temporary, external_data=False)
    return load_onnx(path)


def load_onnx(path: Path) -> Program:
    """Return the program of an ONNX file, run by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: session.run(["logits"], {"image": image})[0]


def export_torch(model: nn.Module, path: Path) -> Program:
    """Write a program of torch.export (.pt2) with free batch, height and width, and return it."""
    with _quiet(), atomic_write(path) as temporary:
        program = torch.export.export(
            Exportable(model),
            (_example(),),
            dynamic_shapes={"image": dict.fromkeys((0, 2, 3), Dim.AUTO)},
        )
        torch.export.save(program, temporary)
    return load_torch(path)


def load_torch(path: Path) -> Program:
    """Return the program of a file of torch.export."""
    with _quiet():
        program: ExportedProgram = torch.export.load(path)
    module = torch.no_grad()(program.module())
    return lambda image: module(torch.from_numpy(image)).numpy()


def compare(model: nn.Module, program: Program, sizes: Sequence[tuple[int, int]]) -> list[Parity]:
    """Compare a program with the network it came from, on one image of noise per size (H, W)."""
    found = []
    generator = torch.Generator().manual_seed(0)
    for height, width in sizes:
        image = torch.randint(0, 256, (1, 3, height, width), generator=generator, dtype=torch.uint8)
        with torch.inference_mode():
            expected = model(image).logits
        got = torch.from_numpy(program(image.numpy()))
        found.append(
            Parity(
                height,
                width,
                difference=(got - expected).abs().max().item(),
                scale=expected.abs().max().item(),
                agreement=(got.argmax(dim=1) == expected.argmax(dim=1)).double().mean().item(),
            )
        )
    return found


def refuse_difference(what: str, found: Sequence[Parity], *, tolerance: float = 1e-3) -> None:
    """Raise UserError where a program deviates from the network by more than rounding explains."""
    for parity in found:
        # Negated, so that NaN is refused.
        if not parity.difference <= tolerance * max(1.0, parity.scale):
            raise UserError(
                f"{what}: at {parity.height} x {parity.width} a logit differs by "
                f"{parity.difference:.3g} from the network, whose largest is {parity.scale:.3g}; "
                "that is more than rounding, so the file should not be used"
            )


def _example() -> Tensor:
    # Neither multiples of 8 nor 1, which exporters would take for constants.
    generator = torch.Generator().manual_seed(0)
    size = (2, 3, 255, 265)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' progress and warnings."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
