"""Out-of-memory errors: recognising them, and the sizes that would have fitted."""

import torch

from danet.config.schema import TrainConfig
from danet.engine.precision import choose_precision
from danet.errors import InputError
from danet.preflight.memory_estimate import StepSimulator
from danet.preflight.plan import GIB, RESERVE, crop_of, device_memory, largest_batch, largest_crop

_SHORT = ("can't allocate memory", "out of memory", "_ALLOC_FAILED")
"""Parts of the messages of torch on a CPU, of CUDA, and of cuBLAS and cuDNN."""


def is_shortage(error: BaseException) -> bool:
    """Return whether an error is a failed allocation of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT)


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still allocate, also within its own RLIMIT_AS."""
    free = device_memory(device)
    if device.type == "cpu":
        try:
            import resource  # not on Windows

            limit = resource.getrlimit(resource.RLIMIT_AS)[0]
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
        except (ImportError, OSError, ValueError):
            return free
        if limit != resource.RLIM_INFINITY:
            free = min(free, max(0, limit - used))
    return free


def explain(
    config: TrainConfig, device: torch.device, memory: int, *, training: bool
) -> InputError:
    """Return an error with the largest batch and crop that fit, all smaller than those that failed.

    Args:
        config: Of the run.
        device: Of the run.
        memory: Bytes that were free at its start.
        training: Whether a training step failed, rather than an evaluation.
    """
    batch_size = config.data.batch_size
    start = f"out of memory: {memory / GIB:.2f} GiB of {device} were free"
    if not training:
        return InputError(
            f"{start}, and an evaluation needs more; use evaluation=sliding, or a smaller "
            "evaluation.crop"
        )
    try:
        height, width = crop_of(config)
    except InputError as error:
        return InputError(f"{start}, data.batch_size={batch_size}; {error}")
    precision = choose_precision(config.trainer.precision, device)
    simulator = StepSimulator(config, precision=precision, on_cuda=device.type == "cuda")
    needed = simulator.run(batch_size, height, width).peak
    limit = min(int(memory * (1 - RESERVE)), needed - 1)
    known = [(batch_size * height * width, needed)]
    images = largest_batch(simulator, height, width, limit, known=known)
    side = largest_crop(simulator, batch_size, limit, known=known)
    return InputError(
        f"{start}, a step of data.batch_size={batch_size} with {height} x {width} needs about "
        f"{needed / GIB:.2f}; largest batch of this size that would fit: {images or 'none'}, "
        f"largest crop of this batch: {f'[{side},{side}]' if side else 'none'}; see also "
        "model.backbone.recompute and trainer.accumulate"
    )
