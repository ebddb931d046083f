"""The arithmetic in which operators compute: native bfloat16, TF32, and no autocast."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from danet.errors import InputError


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
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
    # Releases of torch without this query report nothing.
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
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


def has_tf32(device: torch.device) -> bool:
    """Return whether a device multiplies in TF32: CUDA from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def require_tf32(device: torch.device, key: str) -> None:
    """Raise InputError, which names the setting ``key``, for a device without TF32."""
    if not has_tf32(device):
        raise InputError(f"{key}=tf32 needs a CUDA device from Ampere on; use {key}=float32")


@contextmanager
def cuda_arithmetic(*, tf32: bool, benchmark: bool) -> Iterator[None]:
    """Set how CUDA computes in float32, and how it chooses convolutions; restore both at the end.

    Args:
        tf32: Round the operands of convolutions and products to TF32, which has the range of
            float32 and a mantissa of 10 bits. By default torch does so for convolutions alone.
        benchmark: Time the kernels of each new size of convolution, and take the fastest; for
            sizes that stay the same.
    """
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    kept = convolutions.allow_tf32, products.allow_tf32, convolutions.benchmark
    convolutions.allow_tf32 = products.allow_tf32 = tf32
    convolutions.benchmark = benchmark
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32, convolutions.benchmark = kept
