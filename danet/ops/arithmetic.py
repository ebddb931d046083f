"""The arithmetic in which operators compute: native bfloat16, TF32, and no autocast."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes faster in bfloat16 than in float32."""
    if device.type == "cuda":
        # By default torch counts GPUs that emulate it, which gains nothing over float32.
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public query. CPUs with neither convert to float32 and back around every product.
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and not _is_xeon_without_tiles()


def _is_xeon_without_tiles() -> bool:
    """Return whether this is a Xeon of 2023 or later whose AMX tiles a virtual machine hides.

    They compute bfloat16 in the tiles; their AVX-512 instruction for it has half the rate of
    float32 (measured: 165 against 300 GFLOP/s).
    """
    # Releases of torch that cannot tell report nothing.
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_fp16")) and "Intel" in found.get("cpu_name", "")


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of sums: float32 for half precision, else that of ``x``."""
    return torch.promote_types(x.dtype, torch.float32)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype for the operands of large products; their sums are float32 inside.

    It is that of ``x`` where the device multiplies in it, and float32 where that is emulated.
    """
    is_native = x.is_cuda or (x.dtype == torch.bfloat16 and has_bfloat16(x.device))
    return x.dtype if is_native else sum_dtype(x)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context that disables autocast; an empty one on the meta device, which has none."""
    # Asking torch.amp.is_autocast_available would break the graph of torch.compile in torch 2.10.
    if device_type == "meta":
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Let float32 convolutions and products on CUDA round their operands to TF32, or not.

    TF32 has the range of float32 and a mantissa of 10 bits. By default torch uses it for
    convolutions but not for products.
    """
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    kept = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = enabled
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = kept
