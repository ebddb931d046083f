"""The plan of a run as text, the largest crop that fits a device, refusal of what cannot fit."""

import os
from bisect import bisect_right

import torch

from danet.config.schema import TrainConfig
from danet.engine.precision import choose_precision
from danet.errors import InputError
from danet.memory import available_memory
from danet.preflight.memory_estimate import StepSimulator

RESERVE = 0.1
"""Share of a device's memory that is left for workspaces of kernels."""
MIB, GIB = 2**20, 2**30
SIDES = range(64, 2049, 32)
"""Square crops among which the largest that fits is searched."""
PIXELS_A_STEP = 16_000_000
"""Batches of more pixels are simulated before a run starts; the paper's have 4.7 million."""


def device_memory(device: torch.device) -> int:
    """Return the free bytes of a device; on the CPU within the limit of a container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = available_memory()
    if available is None:  # not Linux: all of the memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return available


def largest_crop(simulator: StepSimulator, batch_size: int, limit: int) -> int:
    """Return the side of the largest square crop whose step takes up to ``limit`` bytes, or 0."""
    fitting = bisect_right(SIDES, limit, key=lambda side: simulator.peak(batch_size, side, side))
    return SIDES[fitting - 1] if fitting else 0


def crop_of(config: TrainConfig) -> tuple[int, int]:
    """Return height and width of the training images of a config.

    Raises:
        InputError: There is no crop, so images have the sizes of their files.
    """
    size = config.data.crop or config.data.size
    if size is None:
        raise InputError(
            "data.crop=null: the size of a batch is not known; set data.crop=[512,512]"
        )
    return int(size[0]), int(size[1])


def describe(config: TrainConfig, device: torch.device) -> str:
    """Return the plan of a run as text, from its config alone; nothing is written.

    Args:
        config: As ``danet.config.validate.check`` returns it.
        device: Of the run; ``device_memory`` of the config, in GiB, overrides its memory.
    """
    settings, batch_size = config.trainer, config.data.batch_size
    (height, width), precision = crop_of(config), choose_precision(settings.precision, device)
    simulator = StepSimulator(config, precision=precision, on_cuda=device.type == "cuda")
    forward, step = simulator.flops(batch_size, height, width)
    peak = simulator.peak(batch_size, height, width)
    memory, source = _memory(config, device)
    limit = int(memory * (1 - RESERVE))
    total, backbone = map(_count, (simulator.model, simulator.model.get_submodule("backbone")))
    standing = simulator.weights + simulator.optimizer + simulator.average
    compiled = "; of the step before it is compiled" if settings.compile else ""
    rows = [
        ("step", f"{batch_size} x {height} x {width}, {settings.accumulate} batch(es) an update"),
        ("on", f"{device}, {str(precision).removeprefix('torch.')}"),
        ("parameters", f"{total:,} (backbone {backbone:,}, heads {total - backbone:,})"),
        ("FLOPs forward", f"{forward / 1e9:,.1f} G a batch; a multiply-add is 2"),
        ("FLOPs step", f"{step / 1e9:,.1f} G; recomputation is counted"),
        ("weights", f"{_size(simulator.weights)} with buffers"),
        ("optimizer", _size(simulator.optimizer)),
        ("average", f"{_size(simulator.average)} (trainer.ema_decay)"),
        ("activations", f"{_size(peak - standing)} with gradients, at most"),
        ("peak", f"{_size(peak)} without workspaces of kernels{compiled}"),
        ("memory", f"{_size(memory)} {source}; {RESERVE:.0%} are left for workspaces"),
        ("this run", "fits" if peak <= limit else "DOES NOT FIT"),
        ("largest crop", f"{_crop(simulator, batch_size, limit)} at data.batch_size={batch_size}"),
    ]
    return "\n".join(f"{label:<14} {text}" for label, text in rows)


def refuse_the_impossible(config: TrainConfig, device: torch.device) -> None:
    """Refuse a step of very many pixels that cannot fit; costs nothing at usual sizes.

    Raises:
        InputError: With the predicted memory and the largest crop that fits.
    """
    size = config.data.crop or config.data.size
    batch_size = config.data.batch_size
    if size is None or batch_size * size[0] * size[1] <= PIXELS_A_STEP:
        return
    precision = choose_precision(config.trainer.precision, device)
    simulator = StepSimulator(config, precision=precision, on_cuda=device.type == "cuda")
    # Linear in the pixels of two small crops: a large one is slow to simulate, attention by blocks.
    small, large = (simulator.peak(batch_size, side, side) for side in (128, 256))
    slope = (large - small) / (256**2 - 128**2)
    needed = small + slope * (size[0] * size[1] - 128**2)
    memory, source = _memory(config, device)
    if needed > memory:
        crop = _crop(simulator, batch_size, int(memory * (1 - RESERVE)))
        raise InputError(
            f"data.crop={list(size)} with data.batch_size={batch_size}: a step needs about "
            f"{_size(int(needed))}, and there are {_size(memory)} {source}; the largest crop that "
            f"fits is {crop}"
        )


def _memory(config: TrainConfig, device: torch.device) -> tuple[int, str]:
    """Return the bytes available and their source, for messages."""
    given = config.device_memory
    if given is not None:
        return int(given * GIB), "by device_memory"
    return device_memory(device), f"free on {device}"


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _size(count: int) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / MIB:,.1f} MiB"


def _crop(simulator: StepSimulator, batch_size: int, limit: int) -> str:
    side = largest_crop(simulator, batch_size, limit)
    return f"[{side}, {side}]{' or more' if side == SIDES[-1] else ''}" if side else "none"
