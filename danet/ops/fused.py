"""Softmax attention by torch's fused CUDA kernels, and the choice among them.

The kernels are made for heads with values as wide as the keys, at most 128 or 256. The values here
have C channels for D of the keys, so they are cut into slices that pass as heads with the same
queries and keys: wide slices, since each computes the energies again.
"""

import logging
import warnings
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from danet.ops.arithmetic import has_bfloat16, without_autocast

_log = logging.getLogger(__name__)
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-5}
"""Largest error of a kernel that is used, in the norm, relative to float64."""


class Kernel(NamedTuple):
    """A fused kernel of torch, and how it is fed."""

    backend: SDPBackend
    width: int  # channels of a slice of the values
    shares: bool = True
    """Whether the slices share one copy of queries and keys, as heads with a stride of 0."""

    def __str__(self) -> str:
        return f"{self.backend.name.lower()} in slices of {self.width}"


def attend_in_slices(query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> Tensor:
    """Compute ``danet.ops.tiles.attend`` by a fused kernel, which never stores the map."""
    batch, queries, _ = query.shape
    slices = value.shape[-1] // kernel.width
    query, key = (t.contiguous().unsqueeze(1).expand(-1, slices, -1, -1) for t in (query, key))
    if not kernel.shares:
        query, key = query.contiguous(), key.contiguous()
    # (B, S, N, width)
    values = value.contiguous().unflatten(-1, (slices, kernel.width)).transpose(1, 2)
    # scale=1: unlike a transformer, the paper does not divide by sqrt(D).
    with sdpa_kernel([kernel.backend]):
        context = F.scaled_dot_product_attention(query, key, values, scale=1.0)
    return context.transpose(1, 2).reshape(batch, queries, -1)  # (B, M, C)


def candidates(dtype: torch.dtype, width: int, channels: int) -> list[Kernel]:
    """Return the kernels that may fit keys of D and values of C channels, the fastest first."""
    if dtype not in BOUNDS or width % 8:
        return []
    wide = max((n for n in range(8, min(channels, 128) + 1, 8) if channels % n == 0), default=0)
    found = []
    if dtype != torch.float32:
        # cuDNN alone takes unequal widths: with D = 64 and slices of 128 it does 1.3 times the
        # needed arithmetic forward and 1.5 times backward, slices of 64 double it.
        found += [Kernel(SDPBackend.CUDNN_ATTENTION, wide, shares) for shares in (True, False)]
        found.append(Kernel(SDPBackend.FLASH_ATTENTION, width))
    found += [Kernel(SDPBackend.EFFICIENT_ATTENTION, n) for n in (wide, width)]
    return [kernel for kernel in found if kernel.width and channels % kernel.width == 0]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose_kernel(
    device: torch.device, dtype: torch.dtype, width: int, channels: int
) -> Kernel | None:
    """Return the first candidate that works on the device, or None for tiles."""
    if device.type != "cuda" or (dtype == torch.bfloat16 and not has_bfloat16(device)):
        return None
    # cuDNN refuses where torch is asked for deterministic operations.
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    return _first_that_works(device, dtype, width, channels, is_deterministic)


@lru_cache
def _first_that_works(
    device: torch.device, dtype: torch.dtype, width: int, channels: int, _is_deterministic: bool
) -> Kernel | None:
    """Try the candidates on a few tokens, log and return the first that is right."""
    what = f"position attention on {device} in {dtype}, keys of {width}, values of {channels}"
    for kernel in candidates(dtype, width, channels):
        try:
            error = error_of(kernel, device, dtype, width, channels)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as refusal:  # torch checks some limits, cuDNN and CUDA others
            _log.debug("%s: not %s (%s)", what, kernel, refusal)
            continue
        if error <= BOUNDS[dtype]:
            _log.info("%s: %s", what, kernel)
            return kernel
        _log.warning("%s: not %s, whose error is %.1e", what, kernel, error)
    _log.info("%s: tiles", what)
    return None


@torch.inference_mode(mode=False)
@torch.enable_grad()
def error_of(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int, channels: int
) -> float:
    """Return the largest error of values and gradients on a few tokens, in the norm."""
    generator = torch.Generator().manual_seed(0)  # leaves the run's own state as it is
    shapes = (2, 100, width), (2, 136, width), (2, 136, channels), (2, 100, channels)
    query, key, value, upstream = (torch.randn(shape, generator=generator) for shape in shapes)
    spread = 2 / width**0.25  # energies of 4, with some large weights, whatever the width
    inputs = [t.to(device, dtype) for t in (spread * query, spread * key, value)]
    upstream = upstream.to(device)
    results = []
    with without_autocast(device.type), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of each reason why a kernel does not fit
        for wanted in (dtype, torch.float64):
            query, key, value = (t.to(wanted).requires_grad_() for t in inputs)
            if wanted == dtype:
                out = attend_in_slices(query, key, value, kernel)
            else:
                out = (query @ key.transpose(1, 2)).softmax(dim=-1) @ value
            gradients = torch.autograd.grad(out, (query, key, value), upstream.to(wanted))
            results.append([t.double() for t in (out.detach(), *gradients)])
    errors = [(a - b).norm() / b.norm() for a, b in zip(*results, strict=True)]
    return float(torch.stack(errors).max())
