"""The plan of a run as text, the largest crop that fits a device, refusal of what cannot fit."""

import os
from bisect import bisect_right

import torch

from danet.config.schema import TrainConfig
from danet.engine.precision import choose_precision
from danet.errors import InputError
from danet.memory import available_memory
from danet.models.finetuning import count_frozen
from danet.preflight.memory_estimate import StepSimulator

RESERVE = 0.1  # share of a device's memory that is left for workspaces of kernels
MIB, GIB = 2**20, 2**30
SIDES = range(64, 2049, 32)  # square crops among which the largest that fits is searched
PIXELS_A_STEP = 16_000_000  # larger batches are simulated before a run; the paper has 4.7 million


def largest_crop(simulator: StepSimulator, batch_size: int, limit: int) -> str:
    """Return the largest square crop whose step takes up to ``limit`` bytes, as a setting."""
    fitting = bisect_right(SIDES, limit, key=lambda side: simulator.peak(batch_size, side, side))
    side = SIDES[fitting - 1]
    return f"[{side}, {side}]" if fitting else "none"


def describe(config: TrainConfig, device: torch.device) -> str:
    """Return the plan of a run as text, from its config alone; raise InputError without a crop."""
    settings, batch_size = config.trainer, config.data.batch_size
    size = config.data.crop or config.data.size
    if size is None:
        raise InputError(
            "data.crop=null: the size of a batch is not known; set 'data.crop=[512,512]'"
        )
    height, width = size
    precision = choose_precision(settings.precision, device)
    simulator = StepSimulator(config, precision=precision, on_cuda=device.type == "cuda")
    forward, step = simulator.flops(batch_size, height, width)
    peak = simulator.peak(batch_size, height, width)
    memory, source = memory_of(config, device)
    limit = int(memory * (1 - RESERVE))
    crop = largest_crop(simulator, batch_size, limit)
    networks = simulator.model, simulator.model.get_submodule("backbone")
    total, backbone = (sum(p.numel() for p in network.parameters()) for network in networks)
    frozen = f"; {count:,} frozen" if (count := count_frozen(simulator.model)) else ""
    standing = simulator.weights + simulator.optimizer + simulator.average
    compiled = "; of the step before it is compiled" if settings.compile else ""
    rows = [
        ("step", f"{batch_size} x {height} x {width}, {settings.accumulate} batch(es) an update"),
        ("on", f"{device}, {str(precision).removeprefix('torch.')}"),
        ("parameters", f"{total:,} (backbone {backbone:,}, heads {total - backbone:,}{frozen})"),
        ("FLOPs forward", f"{forward / 1e9:,.1f} G a batch; a multiply-add is 2"),
        ("FLOPs step", f"{step / 1e9:,.1f} G; recomputation is counted"),
        ("weights", f"{_size(simulator.weights)} with buffers"),
        ("optimizer", _size(simulator.optimizer)),
        ("average", f"{_size(simulator.average)} (trainer.ema_decay)"),
        ("activations", f"{_size(peak - standing)} with gradients, at most"),
        ("peak", f"{_size(peak)} without workspaces of kernels{compiled}"),
        ("memory", f"{_size(memory)} {source}; {RESERVE:.0%} are left for workspaces"),
        ("this run", "fits" if peak <= limit else "DOES NOT FIT"),
        ("largest crop", f"{crop} at data.batch_size={batch_size}"),
        *(("note", note) for note in getattr(networks[1], "notes", ())),
    ]
    return "\n".join(f"{label:<14} {text}" for label, text in rows)


def refuse_the_impossible(config: TrainConfig, device: torch.device) -> None:
    """Refuse a step of very many pixels that cannot fit; costs nothing at usual sizes."""
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
    memory, source = memory_of(config, device)
    if needed > memory:
        crop = largest_crop(simulator, batch_size, int(memory * (1 - RESERVE)))
        raise InputError(
            f"data.crop={list(size)} with data.batch_size={batch_size}: a step needs about "
            f"{_size(int(needed))}, and there are {_size(memory)} {source}; the largest crop that "
            f"fits is {crop}"
        )


def memory_of(config: TrainConfig, device: torch.device) -> tuple[int, str]:
    """Return the bytes of a device that a run may take, and their source for messages."""
    if config.device_memory is not None:
        return int(config.device_memory * GIB), "by device_memory"
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], f"free on {device}"
    if (available := available_memory()) is None:  # not Linux: all of the memory
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return available, f"free on {device}"


def _size(count: int) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / MIB:,.1f} MiB"
