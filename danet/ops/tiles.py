"""Softmax attention in tiles: exact, with memory linear in the number of positions.

The online softmax of Milakov and Gimelshein (2018), as in FlashAttention (Dao et al., 2022): the
attention map is computed tile by tile, a running maximum and sum per query keep the result exact,
and the backward pass recomputes the tiles from the logarithm of that sum. It runs on every device
and supports values wider than the keys, which torch's flash kernel does not.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula

QUERIES_PER_TILE = 512
KEYS_PER_TILE = 512
"""A tile of 512 x 512 floats stays in the cache of a core; larger ones are not faster on a CPU."""

_LOG2_E = math.log2(math.e)
"""Tiles use powers of 2, exp(x) = exp2(x log2 e): twice as fast, and twenty times as fast where
the result is a denormal number, as in most of a sharp softmax."""

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Maps (B, M, D), (B, N, D), (B, N, C) to softmax(query key^T) value, (B, M, C).

    Without a scale, as in eq. 1 and 2 of the paper. The dtype is that of ``value``; half precision
    is accumulated in float32. On CUDA torch's fused kernels are used where they support the widths,
    elsewhere tiles.
    """
    width = key.shape[-1]
    # Slices of the values are as wide as the keys; the kernels need multiples of 8.
    is_divisible = value.shape[-1] % width == 0 and width % 8 == 0
    if query.is_cuda and is_divisible and _is_dtype_fused(value):
        return attend_in_slices(query, key, value)
    context: Tensor = attend_in_tiles(query, key, value)[0]
    return context


def _is_dtype_fused(x: Tensor) -> bool:
    """Return whether torch's fused kernels support the dtype; none supports float64."""
    if x.dtype == torch.bfloat16:
        return torch.cuda.get_device_capability(x.device) >= (8, 0)  # from Ampere on
    return x.dtype in (torch.float16, torch.float32)


def attend_in_slices(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute ``attend`` by torch's fused kernels, of which flash needs values as wide as the keys.

    The values are cut into slices that pass as heads with the same queries and keys, so the
    energies are computed once per slice and the map is never stored. C is divisible by D.
    """
    batch, queries, width = query.shape
    slices = value.shape[-1] // width
    # scale=1: unlike a transformer, the paper does not divide by sqrt(D).
    with sdpa_kernel(_KERNELS):
        context = F.scaled_dot_product_attention(
            # Expanded, not repeated: the heads share one copy of queries and keys.
            query.contiguous().unsqueeze(1).expand(-1, slices, -1, -1),  # (B, S, M, D)
            key.contiguous().unsqueeze(1).expand(-1, slices, -1, -1),  # (B, S, N, D)
            value.contiguous().unflatten(-1, (slices, width)).transpose(1, 2),  # (B, S, N, D)
            scale=1.0,
        )
    return context.transpose(1, 2).reshape(batch, queries, -1)  # (B, M, C)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context that disables autocast; an empty one on the meta device, which has none."""
    # Asking torch.amp.is_autocast_available would break the graph of torch.compile in torch 2.10.
    if device_type == "meta":
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the context (B, M, C) and log2 of each query's softmax denominator, (B, M, 1)."""
    batch, queries, _ = query.shape
    context = value.new_empty(batch, queries, value.shape[-1])
    log_sum = value.new_empty(batch, queries, 1, dtype=_sum_dtype(value))
    with without_autocast(value.device.type):
        for rows in _tiles(queries, QUERIES_PER_TILE):
            tile_query = _widen(query[:, rows]) * _LOG2_E  # (B, rows, D)
            running_max = running_sum = accumulator = torch.empty(0)
            for columns in _tiles(key.shape[1], KEYS_PER_TILE):
                # (B, rows, columns), overwritten by the weights below
                energy = torch.bmm(tile_query, _widen(key[:, columns]).transpose(1, 2))
                tile_value = _widen(value[:, columns])  # (B, columns, C)
                tile_max = energy.amax(dim=-1, keepdim=True)  # (B, rows, 1)
                if columns.start == 0:
                    # No start from -inf and zeros: one more pass over the accumulator.
                    running_max = tile_max
                    weights = energy.sub_(running_max).exp2_()
                    running_sum = weights.sum(dim=-1, keepdim=True)
                    accumulator = torch.bmm(weights, tile_value)  # (B, rows, C)
                    continue
                new_max = torch.maximum(running_max, tile_max)
                # What came before is brought to the new maximum, so no exponent is ever positive.
                rescale = running_max.sub_(new_max).exp2_()
                weights = energy.sub_(new_max).exp2_()
                running_sum.mul_(rescale).add_(weights.sum(dim=-1, keepdim=True))
                accumulator.mul_(rescale).baddbmm_(weights, tile_value)
                running_max = new_max
            # Divided once at the end instead of once per tile, as in FlashAttention-2.
            context[:, rows] = accumulator.div_(running_sum)
            log_sum[:, rows] = running_sum.log2_().add_(running_max)
    return context, log_sum


def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, context: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, given that of the context."""
    dtype = _sum_dtype(value)
    grad_query, grad_key, grad_value = (
        torch.zeros_like(t, dtype=dtype) for t in (query, key, value)
    )
    # Term of the softmax itself (D in FlashAttention): sum_j p_j dp_j = gradient . context.
    delta = torch.empty_like(log_sum)  # (B, M, 1)
    with without_autocast(value.device.type):
        for rows in _tiles(query.shape[1], QUERIES_PER_TILE):
            product = _widen(gradient[:, rows]) * _widen(context[:, rows])
            delta[:, rows] = product.sum(dim=-1, keepdim=True)
        for columns in _tiles(key.shape[1], KEYS_PER_TILE):
            tile_key, tile_value = _widen(key[:, columns]), _widen(value[:, columns])
            for rows in _tiles(query.shape[1], QUERIES_PER_TILE):
                tile_query, tile_gradient = _widen(query[:, rows]), _widen(gradient[:, rows])
                energy = torch.bmm(tile_query * _LOG2_E, tile_key.transpose(1, 2))
                weights = energy.sub_(log_sum[:, rows]).exp2_()  # (B, rows, columns)
                grad_value[:, columns].baddbmm_(weights.transpose(1, 2), tile_gradient)
                # Of the energies before log2 e, which therefore does not appear below.
                grad_energy = torch.bmm(tile_gradient, tile_value.transpose(1, 2))
                grad_energy.sub_(delta[:, rows]).mul_(weights)  # (B, rows, columns)
                grad_query[:, rows].baddbmm_(grad_energy, tile_key)
                grad_key[:, columns].baddbmm_(grad_energy.transpose(1, 2), tile_query)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _sum_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of sums: float32 for half precision, else that of ``x``."""
    return torch.promote_types(x.dtype, torch.float32)


def _widen(tile: Tensor) -> Tensor:
    return tile.to(_sum_dtype(tile))


def _tiles(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


# Operators are opaque to torch.compile and torch.export, which otherwise unroll every tile.
attend_in_tiles = torch.library.custom_op("danet::attend_in_tiles", _forward, mutates_args=())
_attend_backward = torch.library.custom_op(
    "danet::attend_in_tiles_backward", _backward, mutates_args=()
)


@attend_in_tiles.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, _ = query.shape
    context = value.new_empty(batch, queries, value.shape[-1])
    return context, value.new_empty(batch, queries, 1, dtype=_sum_dtype(value))


@_attend_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, context: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])  # log_sum serves the backward pass only
    ctx.save_for_backward(*inputs, *output)


def _autograd_backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _attend_backward(gradient, *ctx.saved_tensors)
    return gradients


attend_in_tiles.register_autograd(_autograd_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.danet.attend_in_tiles)
def _(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Count a multiply-add as 2, as torch.utils.flop_counter does."""
    batch, queries, width = query
    return 2 * batch * queries * key[1] * (width + value[2])


@register_flop_formula(torch.ops.danet.attend_in_tiles_backward)
def _(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Count five products: the energies again, and one for each gradient and for the weights."""
    batch, queries, width = query
    return 2 * batch * queries * key[1] * (3 * width + 2 * value[2])
