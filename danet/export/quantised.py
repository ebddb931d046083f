"""Programs in int8: static quantisation by onnxruntime, after the training.

An activation has one range, that of its values on training pictures, a weight one for each channel
(Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018).
"""

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor, nn

from danet.export.programs import OPSET, Program, export_onnx, load_onnx
from danet.filesystem import atomic_write


def export_int8(
    model: nn.Module,
    path: Path,
    images: Iterator[Tensor],
    opset: int = OPSET,
    size: Sequence[int] | None = None,
) -> Program:
    """Write an ONNX file with ranges from ``images``, (1, N, H, W) each; return its program.

    Normalisation, attention and the classifier stay float32. With a ``size`` all images have it.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    feeds = ({"image": image.numpy()} for image in images)
    with tempfile.TemporaryDirectory() as folder, atomic_write(path) as temporary:
        plain, prepared = Path(folder) / "plain.onnx", Path(folder) / "prepared.onnx"
        export_onnx(model, plain, opset, size)
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        nodes = onnx.load(prepared).graph.node
        quantize_static(
            prepared,
            temporary,
            SimpleNamespace(get_next=partial(next, feeds, None)),
            op_types_to_quantize=["Conv", "Add", "Relu", "Clip", "MaxPool"],
            nodes_to_exclude=[n.name for n in nodes if n.op_type == "Conv"][-1:],  # the classifier
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return load_onnx(path)
