"""The plan of a run as text, the largest sizes that fit a device, refusal of what cannot fit."""

import os
from collections.abc import Callable, Sequence

import torch

from danet.config.schema import TrainConfig
from danet.engine.precision import choose_precision
from danet.errors import InputError
from danet.memory import available_memory
from danet.preflight.memory_estimate import StepSimulator

PROBES = (128, 256)
"""Sides of the small crops from whose memory larger ones are extrapolated."""
RESERVE = 0.1
"""Share of a device's memory that is left for workspaces of kernels."""
MIB, GIB = 2**20, 2**30
MULTIPLE = 32
"""Suggested crops are multiples of this."""
LONGEST_SIDE = 2048
LARGEST_BATCH = 512
"""Upper ends of the search."""
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


def largest_within(
    peak: Callable[[int], int],
    amount: Callable[[int], int],
    limit: int,
    *,
    known: Sequence[tuple[int, int]],
    step: int,
    most: int,
) -> int:
    """Return the largest multiple of ``step`` up to ``most`` whose peak is within ``limit``, or 0.

    A search by interpolation, since a simulation is slow; it falls back to bisection.

    Args:
        peak: Bytes by size; nearly affine in ``amount(size)``.
        amount: Pixels by size.
        limit: Bytes.
        known: At least two different amounts with their peaks.
        step: Of sizes.
        most: The largest size.
    """
    points, fits, over = list(known), 0, most + step
    while over - fits > step:
        (x0, y0), (x1, y1) = sorted(points, key=lambda point: abs(point[1] - limit))[:2]
        sizes = range(fits + step, over, step)
        guess = sizes[len(sizes) // 2]
        if (y1 - y0) * (x1 - x0) > 0:  # else flat: the update dominates small sizes
            end = x0 + (limit - y0) * (x1 - x0) / (y1 - y0)
            inside = [size for size in sizes if amount(size) <= end]
            guess = inside[-1] if inside else sizes[0]
        here = peak(guess)
        points.append((amount(guess), here))
        fits, over = (guess, over) if here <= limit else (fits, guess)
    return fits


def largest_crop(
    simulator: StepSimulator, batch_size: int, limit: int, *, known: Sequence[tuple[int, int]] = ()
) -> int:
    """Return the side of the largest square crop whose step fits, a multiple of 32; 0 if none.

    Args:
        simulator: Of the run.
        batch_size: Of the crops.
        limit: Bytes.
        known: Pixels of a batch and its peak, of earlier simulations.
    """

    def peak(side: int) -> int:
        return simulator.run(batch_size, side, side).peak

    def amount(side: int) -> int:
        return batch_size * side * side

    known = _two_points(known, PROBES, amount, peak)
    return largest_within(peak, amount, limit, known=known, step=MULTIPLE, most=LONGEST_SIDE)


def largest_batch(
    simulator: StepSimulator,
    height: int,
    width: int,
    limit: int,
    *,
    known: Sequence[tuple[int, int]] = (),
) -> int:
    """Return the largest batch of a crop whose step fits; 0 if none. See largest_crop."""

    def peak(batch_size: int) -> int:
        try:
            return simulator.run(batch_size, height, width).peak
        except ValueError:  # batch norm after global pooling needs two images
            if batch_size > 1:
                raise
            return limit + 1

    def amount(batch_size: int) -> int:
        return batch_size * height * width

    known = _two_points(known, (2, 3), amount, peak)
    return largest_within(peak, amount, limit, known=known, step=1, most=LARGEST_BATCH)


def _two_points(
    known: Sequence[tuple[int, int]],
    probes: Sequence[int],
    amount: Callable[[int], int],
    peak: Callable[[int], int],
) -> list[tuple[int, int]]:
    """Add simulations of small sizes until there are two amounts."""
    points = dict(known)
    for size in probes:
        if len(points) < 2 and amount(size) not in points:
            points[amount(size)] = peak(size)
    return list(points.items())


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
    step = simulator.run(batch_size, height, width)
    memory, name = _memory(config, device)
    limit = int(memory * (1 - RESERVE))
    known = [(batch_size * height * width, step.peak)]
    side = largest_crop(simulator, batch_size, limit, known=known)
    images = largest_batch(simulator, height, width, limit, known=known)
    compiled = "; of the step before it is compiled" if settings.compile else ""
    total, head = simulator.parameters, simulator.head_parameters
    rows = [
        ("step", f"{batch_size} x {height} x {width}, {settings.accumulate} batch(es) an update"),
        ("on", f"{device}, {str(precision).removeprefix('torch.')}"),
        ("parameters", f"{total:,} (backbone {total - head:,}, heads {head:,})"),
        ("FLOPs forward", f"{step.forward_flops / 1e9:,.1f} G a batch; a multiply-add is 2"),
        ("FLOPs step", f"{step.step_flops / 1e9:,.1f} G; recomputation is counted"),
        ("weights", f"{_size(step.parameters)} with buffers"),
        ("gradients", f"{_size(step.gradients)}; with several processes they are always there"),
        ("optimizer", _size(step.optimizer)),
        ("average", _size(step.average) if step.average else "none (trainer.ema_decay=null)"),
        ("activations", f"{_size(step.activations)} kept for the backward pass"),
        ("attention", f"{_size(step.attention)} of them"),
        ("peak", f"{_size(step.peak)} without workspaces of kernels{compiled}"),
        ("memory", f"{_size(memory)} {name}; {RESERVE:.0%} are left for workspaces"),
        ("this run", "fits" if step.peak <= limit else "DOES NOT FIT"),
        ("largest crop", f"{_crop(side)} at data.batch_size={batch_size}"),
        ("largest batch", f"{_batch(images)} at {height} x {width}"),
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
    small, large = (simulator.run(batch_size, side, side).peak for side in PROBES)
    slope = (large - small) / (PROBES[1] ** 2 - PROBES[0] ** 2)
    needed = small + slope * (size[0] * size[1] - PROBES[0] ** 2)
    memory, name = _memory(config, device)
    if needed > memory:
        side = largest_crop(simulator, batch_size, int(memory * (1 - RESERVE)))
        raise InputError(
            f"data.crop={list(size)} with data.batch_size={batch_size}: a step needs about "
            f"{_size(int(needed))}, and there are {_size(memory)} {name}; the largest crop that "
            f"fits is {_crop(side)}"
        )


def _memory(config: TrainConfig, device: torch.device) -> tuple[int, str]:
    """Return the bytes available and their source, for messages."""
    given = config.device_memory
    if given is not None:
        return int(given * GIB), "by device_memory"
    return device_memory(device), f"free on {device}"


def _size(count: int) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / MIB:,.1f} MiB"


def _crop(side: int) -> str:
    return f"[{side}, {side}]{' or more' if side == LONGEST_SIDE else ''}" if side else "none"


def _batch(size: int) -> str:
    return f"{size}{' or more' if size == LARGEST_BATCH else ''}" if size else "none"
