"""Benchmark evaluation: a whole picture in its own process, and several scales in windows."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from bench import reference
from bench.measure import (
    GIB,
    Options,
    Row,
    agree,
    peak_memory,
    seconds,
    status,
)
from bench.step import make_network, make_reference
from danet.evaluation.fuse import fuse_for_inference
from danet.evaluation.inference import MultiScale, Whole
from danet.memory import available_memory

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.2)
"""The scales of the released code's multi-scale test."""
AGREEMENT = 1e-4
ROOM_FOR_THE_MAP = 14 * GIB
"""Memory of the reference for a whole 1024 x 2048 picture: two N x N maps of 4 GiB, and more."""


def run(options: Options) -> list[Row]:
    """Measure a whole picture, then the scales."""
    return [*_whole_rows(options), *_scale_rows(options)]


def picture(height: int, width: int, device: torch.device) -> Tensor:
    """Return smooth noise, uint8 (1, 3, H, W), the same on every call."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(1, 3, height // 16, width // 16, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (fine * 255).to(device, torch.uint8)


def _whole_rows(options: Options) -> list[Row]:
    size = (64, 128) if options.quick else (1024, 2048)
    ours = _child("ours", size, options.device)
    theirs = None
    if (
        options.quick
        or options.device.type == "cuda"
        or (available_memory() or 0) > ROOM_FOR_THE_MAP
    ):
        theirs = _child("reference", size, options.device)
    case = f"whole {size[0]}x{size[1]} R50 float32"
    note = "" if theirs else "too little memory here for the reference"
    kind = "allocated on the device" if options.device.type == "cuda" else "resident, all of it"
    return [
        Row("eval", case, "time", "s", ours["s"], theirs and theirs["s"], note),
        Row("eval", case, "memory", "GiB", ours["GiB"], theirs and theirs["GiB"], kind),
    ]


def _child(which: str, size: tuple[int, int], device: torch.device) -> dict[str, float]:
    """Run this file in a process of its own; return its seconds and GiB."""
    threads = str(torch.get_num_threads())
    command = [sys.executable, __file__, which, *map(str, size), str(device), threads]
    scripts = Path(__file__).resolve().parents[1]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(scripts), str(scripts.parent)])}
    done = subprocess.run(command, capture_output=True, text=True, env=paths)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def whole_in_this_process(which: str, height: int, width: int, device: torch.device) -> None:
    """Print seconds and GiB of one pass, after a warm-up on a small picture."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model: torch.nn.Module = make_network(50)
    if which == "reference":
        model = make_reference(50, model).eval().to(device)

        def infer(image: Tensor) -> Tensor:
            return model(image)[0].softmax(dim=1).argmax(dim=1)
    else:
        model = fuse_for_inference(model.eval().to(device), device)

        def infer(image: Tensor) -> Tensor:
            return Whole().predict(model, image)

    infer(picture(64, 128, device))
    cuda = device.type == "cuda"
    if cuda:
        infer(picture(height, width, device))
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    infer(picture(height, width, device))
    if cuda:
        torch.cuda.synchronize(device)
    spent = time.perf_counter() - start
    taken = torch.cuda.max_memory_allocated(device) if cuda else status("VmHWM")
    print(json.dumps({"s": spent, "GiB": taken / GIB}))


def _scale_rows(options: Options) -> list[Row]:
    """Compare probabilities, time and memory of multi-scale sliding windows with mirroring."""
    device, scales = options.device, SCALES
    if options.quick:
        size, crop, scales = (48, 96), 48, (0.5, 1.0)
    elif device.type == "cuda":
        size, crop = (1024, 2048), 768
    else:
        size, crop = (128, 256), 256  # a map of 32 x 32 fills Winograd's tiles, as one of 96 does
    stride = crop * 2 // 3
    network = make_network(50)
    plain = make_reference(50, network).eval().to(device)
    model = fuse_for_inference(
        network.eval().to(device), device
    )  # as danet.evaluation.evaluate does it
    image = picture(*size, device)
    infer = MultiScale(scales=scales, flip=True, crop=[crop, crop], stride=[stride, stride])

    def ours() -> Tensor:
        with torch.inference_mode():
            return infer(model, image)

    def theirs() -> Tensor:
        return reference.multi_scale(plain, image, scales=scales, crop=crop, stride=stride)

    a, b = ours(), theirs()
    error = agree(float((a - b).abs().max()), AGREEMENT, "eval, probabilities")
    labels = float((a.argmax(1) != b.argmax(1)).float().mean())
    peaks = [peak_memory(function, device) / GIB for function in (ours, theirs)]
    times = seconds([ours, theirs], device, repeats=1, warm_ups=0)
    windows = f"{len(scales)} scales, mirrored, crop {crop}, stride {stride}"
    case = f"{windows}, {size[0]}x{size[1]} R50 float32"
    return [
        Row("eval", case, "error", "", error, note=f"probabilities; {labels:.1e} of labels differ"),
        Row("eval", case, "time", "s", times[0], times[1]),
        Row("eval", case, "memory", "GiB", peaks[0], peaks[1], "above the start"),
    ]


if __name__ == "__main__":
    which, height, width, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    whole_in_this_process(which, int(height), int(width), torch.device(device))
