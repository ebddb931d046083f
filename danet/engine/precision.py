"""Adapting a network to the device: precision, memory format, compilation."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from danet.distributed import collectives, data_parallel
from danet.distributed.sync_batchnorm import convert_sync_batchnorm
from danet.engine.settings import TrainSettings
from danet.errors import InputError, first_line
from danet.ops.arithmetic import has_bfloat16, require_tf32

P = ParamSpec("P")
T = TypeVar("T")


def choose_precision(
    wanted: str, device: torch.device, *, key: str = "trainer.precision"
) -> torch.dtype:
    """Return the dtype of autocast; ``auto`` is bfloat16 where that is faster.

    With ``tf32`` it is float32. Raises InputError for a device that cannot compute as wanted.
    """
    if wanted == "float16" and device.type != "cuda":
        raise InputError(f"{key}=float16 needs CUDA; {device} has bfloat16 or float32")
    if wanted == "tf32":
        require_tf32(device, key)
    if wanted in ("auto", "tf32"):
        return torch.bfloat16 if wanted == "auto" and has_bfloat16(device) else torch.float32
    return getattr(torch, wanted)


def choose_memory_format(
    channels_last: bool | None, dtype: torch.dtype, *, tf32: bool = False
) -> torch.memory_format:
    """Return the memory format in training; None chooses by the precision of convolutions."""
    if channels_last is None:
        # Half precision is faster in this order, and so are the tensor cores of CUDA. In float32 a
        # CPU computes the weight gradient of a wide convolution slower (2048 to 512 channels: 323
        # against 258 ms with AVX-512, 852 against 356 with AVX2).
        channels_last = dtype != torch.float32 or tf32
    return torch.channels_last if channels_last else torch.contiguous_format


def place(model: nn.Module, settings: TrainSettings, device: torch.device) -> nn.Module:
    """Move a network to the device that trains it, ready for several processes."""
    if settings.deterministic:
        torch.use_deterministic_algorithms(True)
    if collectives.world_size() > 1:
        # Before DDP, which waits for the gradient of every parameter that requires one.
        data_parallel.ignore_unused_parameters(model)
        if settings.sync_batchnorm:
            convert_sync_batchnorm(model)
    dtype = choose_precision(settings.precision, device)
    is_tf32 = settings.precision == "tf32"
    order = choose_memory_format(settings.channels_last, dtype, tf32=is_tf32)
    return model.to(device).to(memory_format=order)


def compiled(function: Callable[P, T], device: torch.device) -> Callable[P, T]:
    """Return a network or function behind ``torch.compile``, which compiles it at its first call.

    Raises InputError if torch cannot compile for this device, usually for lack of a compiler.
    """
    # A small function first: the network would fail minutes later, in the first step.
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"trainer.compile=true: torch cannot compile for {device} here ({first_line(error)}); "
            f"install a C++ compiler{' and Triton' if device.type == 'cuda' else ''}, or set "
            "trainer.compile=false"
        ) from error
    return torch.compile(function)
