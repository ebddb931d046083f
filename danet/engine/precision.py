"""What suits the machine: precision, memory order, and whether torch can compile."""

import torch
from torch import nn

from danet.distributed import collectives, data_parallel
from danet.engine.settings import TrainSettings
from danet.errors import InputError


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of autocast; ``auto`` asks the hardware whether bfloat16 is native."""
    if wanted == "float16" and device.type != "cuda":
        raise InputError(f"trainer.precision=float16 needs CUDA; {device} has bfloat16 or float32")
    if wanted != "auto":
        return getattr(torch, wanted)
    return torch.bfloat16 if _has_bfloat16(device) else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_memory_format(
    channels_last: bool | None, device: torch.device, dtype: torch.dtype
) -> torch.memory_format:
    """Returns the memory order of images and convolutions in training; None asks the hardware.

    It is channels_last but for float32 on a CPU: there the weight gradient of a wide convolution
    takes longer in that order (2048 to 512 channels: 323 against 258 ms with AVX-512, 852 against
    356 with AVX2), while bfloat16 is up to a third faster in it. On CUDA the order is that of the
    tensor cores, which take float32 (as TF32) from compute capability 8.0.

    Args:
        channels_last: The setting.
        device: Of the training.
        dtype: In which its convolutions compute, see ``choose_precision``.
    """
    if channels_last is None:
        if device.type == "cuda":
            has_tf32 = torch.cuda.get_device_capability(device) >= (8, 0)
            channels_last = dtype != torch.float32 or has_tf32
        else:
            channels_last = dtype == torch.bfloat16
    return torch.channels_last if channels_last else torch.contiguous_format


def place(model: nn.Module, settings: TrainSettings, device: torch.device) -> nn.Module:
    """Move a network to the device that trains it, ready for several processes.

    Sets torch's process-wide determinism if ``settings.deterministic``.
    """
    if settings.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if collectives.world_size() > 1:
        data_parallel.freeze_unused_parameters(model)
        if settings.sync_batchnorm and device.type == "cuda":
            model = data_parallel.convert_sync_batchnorm(model)
    dtype = choose_precision(settings.precision, device)
    order = choose_memory_format(settings.channels_last, device, dtype)
    return model.to(device).to(memory_format=order)


def compiled(network: nn.Module, device: torch.device) -> nn.Module:
    """Returns the network behind ``torch.compile``, which compiles it when it is first called.

    Raises:
        InputError: torch cannot compile anything for this device, usually for lack of a compiler.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except (RuntimeError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(
            f"trainer.compile=true: torch cannot compile for {device} here ("
            f"{lines[0] if lines else repr(error)}); install a C++ compiler"
            f"{' and Triton' if device.type == 'cuda' else ''}, or set trainer.compile=false"
        ) from error
    return torch.compile(network)  # type: ignore[return-value]
