"""A network in one runtime, in a process of its own; deployment.py starts it.

Prints one line of JSON: seconds to load, milliseconds per picture, MiB, logits against the
network's, and the confusion matrix on labelled pictures.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.resident import reset_high_water_mark, status

Program = Callable[[np.ndarray], np.ndarray]
"""Maps an image, uint8 (1, 3, H, W), to logits, float32 (1, K, H, W)."""
MIB = 2**20


def onnxruntime(path: str, threads: int) -> Program:
    """Load an ONNX file into ONNX Runtime."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(["logits"], {"image": image})[0]


def openvino(path: str, threads: int, precision: str | None = "f32") -> Program:
    """Load an ONNX file into OpenVINO; without a precision it computes in the CPU's fastest."""
    import openvino as ov

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    if precision:
        settings["INFERENCE_PRECISION_HINT"] = precision
    compiled = ov.Core().compile_model(path, "CPU", settings)
    return lambda image: compiled(image)["logits"]


def openvino_default(path: str, threads: int) -> Program:
    """Load an ONNX file into OpenVINO as it is, with bfloat16 where the CPU has it."""
    return openvino(path, threads, None)


def torch_export(path: str, threads: int) -> Program:
    """Load a program of torch.export."""
    import torch

    torch.set_num_threads(threads)
    module = torch.no_grad()(torch.export.load(path).module())
    return lambda image: module(torch.from_numpy(image)).numpy()


def pytorch(path: str, threads: int) -> Program:
    """Load a checkpoint, or make the network of that name, as ``tools/eval.py`` runs it."""
    import torch

    from bench.deployment import network_of
    from danet.evaluation.fuse import fuse_for_inference

    torch.set_num_threads(threads)
    fused = torch.no_grad()(fuse_for_inference(network_of(path), torch.device("cpu")))
    return lambda image: fused(torch.from_numpy(image)).logits.numpy()


def measure(runtime: str, path: str, threads: int, folder: str, repeats: int) -> dict[str, Any]:
    """Return the figures of one runtime on the pictures of a folder."""
    images = np.load(f"{folder}/images.npy", mmap_mode="r")  # uint8 (M, 3, H, W)
    expected = np.load(f"{folder}/logits.npy", mmap_mode="r")  # of the first, (1, K, H, W)
    first = np.array(images[:1])
    before = status("VmRSS")
    start = time.perf_counter()
    program = globals()[runtime](path, threads)
    loaded = time.perf_counter() - start
    resident = status("VmRSS")
    reset_high_water_mark()
    logits = program(first)  # the warm-up
    largest = difference = same = 0.0
    for k in range(expected.shape[1]):  # a map at a time: at 1024 x 2048 all take 160 MiB
        largest = max(largest, float(np.abs(expected[0, k]).max()))
        difference = max(difference, float(np.abs(logits[0, k] - expected[0, k]).max()))
    same = float((logits.argmax(1) == expected.argmax(1)).mean())
    del logits
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        program(first)
        spent.append(1e3 * (time.perf_counter() - start))
    peak = status("VmHWM")
    return {
        "load": loaded,
        "ms": [statistics.median(spent), min(spent), max(spent)],
        "on_top": (peak - resident) / MIB,
        "whole": peak / MIB,
        "start": before / MIB,
        "difference": difference,
        "largest": largest,
        "same": same,
        "miou": miou(program, images, folder, expected.shape[1]),
    }


def miou(program: Program, images: np.ndarray, folder: str, num_classes: int) -> float | None:
    """Return the mean IoU over the classes that occur; None without labels."""
    try:
        masks = np.load(f"{folder}/masks.npy", mmap_mode="r")  # uint8 (M, H, W)
    except FileNotFoundError:
        return None
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    for image, mask in zip(images, masks, strict=True):
        found = program(np.array(image)[None])[0].argmax(0)
        pairs = (num_classes * mask.astype(np.int64) + found)[mask < num_classes]
        counts += np.bincount(pairs, minlength=num_classes**2).reshape(counts.shape)
    hits = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hits
    return float((hits[union > 0] / union[union > 0]).mean())


if __name__ == "__main__":
    runtime, path, threads, folder, repeats = sys.argv[1:]
    print(json.dumps(measure(runtime, path, int(threads), folder, int(repeats))))
