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
    name_of,
    peak_memory,
    seconds,
    status,
)
from bench.step import make_network, make_reference
from danet.evaluation.fuse import fuse_for_inference
from danet.evaluation.inference import MultiScale, Whole
from danet.memory import available_memory
from danet.ops.arithmetic import cuda_arithmetic

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
    """Compare ours and the plain network, each precision in its better memory order."""
    size = (64, 128) if options.quick else (1024, 2048)
    cuda = options.device.type == "cuda"
    fits = options.quick or cuda or (available_memory() or 0) > ROOM_FOR_THE_MAP
    kind = "allocated on the device" if cuda else "resident, all of it"
    precisions = [name_of(dtype) for dtype in options.precisions()]
    if cuda:
        precisions.insert(1, "tf32")
    rows = []
    for precision in precisions:
        ours = _child("ours", precision, size, options.device)
        theirs = _child("plain", precision, size, options.device) if fits else {}
        note = "" if theirs else "too little memory here for the reference"
        case = f"whole {size[0]}x{size[1]} R50 {precision}"
        against = f"plain {precision}" if theirs else ""
        rows += [
            Row("eval", case, "time", "s", ours["s"], theirs.get("s"), note, against),
            Row("eval", case, "memory", "GiB", ours["GiB"], theirs.get("GiB"), kind, against),
        ]
    return rows


def _child(
    which: str, precision: str, size: tuple[int, int], device: torch.device
) -> dict[str, float]:
    """Run this file in a process of its own; return its seconds and GiB."""
    threads = str(torch.get_num_threads())
    command = [sys.executable, __file__, which, precision, *map(str, size), str(device), threads]
    scripts = Path(__file__).resolve().parents[1]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(scripts), str(scripts.parent)])}
    done = subprocess.run(command, capture_output=True, text=True, env=paths)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def whole_in_this_process(
    which: str, precision: str, height: int, width: int, device: torch.device
) -> None:
    """Print seconds and GiB, the best of three passes (of one of a minute) after a warm-up."""
    model: torch.nn.Module = make_network(50)
    if which == "plain":
        mixed = precision == "bfloat16"
        last = mixed or device.type == "cuda"
        order = torch.channels_last if last else torch.contiguous_format
        model = make_reference(50, model).eval().to(device).to(memory_format=order)

        def infer(image: Tensor) -> Tensor:
            with (
                cuda_arithmetic(tf32=precision == "tf32", benchmark=False),
                torch.autocast(device.type, torch.bfloat16, enabled=mixed),
            ):
                logits = model(image.to(memory_format=order))[0]
            return logits.softmax(dim=1).argmax(dim=1)
    else:
        model = fuse_for_inference(model.eval().to(device), device)
        mode = Whole(precision=precision)

        def infer(image: Tensor) -> Tensor:
            return mode.predict(model, image)

    infer(picture(64, 128, device))
    cuda = device.type == "cuda"
    spent: list[float] = []
    while len(spent) < 3 and sum(spent) < 60:
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        infer(picture(height, width, device))
        if cuda:
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - start)
    taken = torch.cuda.max_memory_allocated(device) if cuda else status("VmHWM")
    print(json.dumps({"s": min(spent), "GiB": taken / GIB}))


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
    error = float((a - b).abs().max())
    labels = float((a.argmax(1) != b.argmax(1)).float().mean())
    peaks = [peak_memory(function, device) / GIB for function in (ours, theirs)]
    times = seconds([ours, theirs], device, repeats=1, warm_ups=0)
    windows = f"{len(scales)} scales, mirrored, crop {crop}, stride {stride}"
    case = f"{windows}, {size[0]}x{size[1]} R50 float32"
    note, plain_name = f"probabilities; {labels:.1e} of labels differ", "plain float32 NCHW"
    return [
        Row("eval", case, "error", "", error, note=note, bound=AGREEMENT),
        Row("eval", case, "time", "s", times[0], times[1], "", plain_name),
        Row("eval", case, "memory", "GiB", peaks[0], peaks[1], "above the start", plain_name),
    ]


if __name__ == "__main__":
    which, precision, height, width, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    whole_in_this_process(which, precision, int(height), int(width), torch.device(device))
