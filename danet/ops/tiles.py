"""Softmax attention in tiles: exact, with memory linear in the number of positions.

The online softmax of Milakov and Gimelshein (2018), as FlashAttention has it (Dao et al., 2022):
the map of weights is computed tile by tile, a running maximum and sum per query keep the result
exact, and the gradient computes the tiles again from the logarithm of that sum. It runs on every
device and takes values wider than the keys, which torch's flash kernel does not.
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
"""Tiles compute with powers of 2, exp(x) = exp2(x log2 e): twice as quick, and twenty times where
the result is so small that it is a denormal number, which most of a sharp softmax is."""

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Returns softmax(query key^T) value, without a scale, as the paper has it (eq. 1 and 2).

    On CUDA the fused kernels of torch are used where they take the widths, elsewhere tiles.

    Args:
        query: (B, M, D).
        key: (B, N, D).
        value: (B, N, C).

    Returns:
        (B, M, C) of the dtype of ``value``; sums are float32 where that is a half-precision one.
    """
    width = key.shape[-1]
    is_divisible = value.shape[-1] % width == 0 and width % 8 == 0
    if query.is_cuda and is_divisible and _have_kernels(value):
        return attend_in_slices(query, key, value)
    context: Tensor = attend_in_tiles(query, key, value)[0]
    return context


def _have_kernels(x: Tensor) -> bool:
    """Tells whether torch's fused kernels take the dtype; none takes float64."""
    if x.dtype == torch.bfloat16:
        return torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.dtype in (torch.float16, torch.float32)


def attend_in_slices(
    query: Tensor, key: Tensor, value: Tensor, *, width: int | None = None
) -> Tensor:
    """Is ``attend`` by torch's fused kernels, of which flash wants values as wide as the keys.

    The values are cut into slices that pass as heads with the same queries and keys, so the
    energies are computed once per slice and the map is never stored. float32 has the
    memory-efficient kernel alone, which takes wider slices, too; whether that is faster is for
    scripts/benchmark.py to say on a device.

    Args:
        query: As of ``attend``, like the other two.
        key: (B, N, D).
        value: (B, N, C).
        width: Of a slice, D by default; C is divisible by it.
    """
    batch, queries, _ = query.shape
    width = query.shape[-1] if width is None else width
    slices = value.shape[-1] // width
    # scale=1: unlike a transformer, the paper does not divide by sqrt(D).
    with sdpa_kernel(_KERNELS):
        context = F.scaled_dot_product_attention(
            query.contiguous().unsqueeze(1).expand(-1, slices, -1, -1),  # (B, S, M, D)
            key.contiguous().unsqueeze(1).expand(-1, slices, -1, -1),  # (B, S, N, D)
            value.contiguous().unflatten(-1, (slices, width)).transpose(1, 2),  # (B, S, N, D)
            scale=1.0,
        )
    return context.transpose(1, 2).reshape(batch, queries, -1)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Keeps float32 what is float32; the meta device knows no autocast and needs none."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the context (B, M, C) and the logarithm to base 2 of each query's sum, (B, M, 1)."""
    with without_autocast(value.device.type):
        return _scan(query, key, value)


def _scan(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, _ = query.shape
    context = value.new_empty(batch, queries, value.shape[-1])
    log_sum = value.new_empty(batch, queries, 1, dtype=_wide(value))
    for rows in _tiles(queries, QUERIES_PER_TILE):
        top = total = rest = torch.empty(0)
        tile_query = _widen(query[:, rows]) * _LOG2_E
        for columns in _tiles(key.shape[1], KEYS_PER_TILE):
            energy = torch.bmm(tile_query, _widen(key[:, columns]).transpose(1, 2))
            tile_value = _widen(value[:, columns])
            maximum = energy.amax(dim=-1, keepdim=True)
            if columns.start == 0:
                top = maximum
                weights = energy.sub_(top).exp2_()  # (B, rows, columns)
                total = weights.sum(dim=-1, keepdim=True)
                rest = torch.bmm(weights, tile_value)
                continue
            higher = torch.maximum(top, maximum)
            shrink = top.sub_(higher).exp2_()
            weights = energy.sub_(higher).exp2_()
            total.mul_(shrink).add_(weights.sum(dim=-1, keepdim=True))
            rest.mul_(shrink).baddbmm_(weights, tile_value)
            top = higher
        context[:, rows] = rest.div_(total)
        log_sum[:, rows] = total.log2_().add_(top)
    return context, log_sum


def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, context: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value from that of the context."""
    with without_autocast(value.device.type):
        return _scan_back(gradient, query, key, value, context, log_sum)


def _scan_back(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, context: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(value)
    for_query, for_key, for_value = (torch.zeros_like(t, dtype=wide) for t in (query, key, value))
    # The softmax's own term: sum_j p_j dp_j = gradient . context, one number per query.
    own = torch.empty_like(log_sum)
    for rows in _tiles(query.shape[1], QUERIES_PER_TILE):
        product = _widen(gradient[:, rows]) * _widen(context[:, rows])
        own[:, rows] = product.sum(dim=-1, keepdim=True)
    for columns in _tiles(key.shape[1], KEYS_PER_TILE):
        tile_key, tile_value = _widen(key[:, columns]), _widen(value[:, columns])
        for rows in _tiles(query.shape[1], QUERIES_PER_TILE):
            tile_query, tile_gradient = _widen(query[:, rows]), _widen(gradient[:, rows])
            energy = torch.bmm(tile_query * _LOG2_E, tile_key.transpose(1, 2))
            weights = energy.sub_(log_sum[:, rows]).exp2_()  # (B, rows, columns)
            for_value[:, columns].baddbmm_(weights.transpose(1, 2), tile_gradient)
            change = torch.bmm(tile_gradient, tile_value.transpose(1, 2))
            change.sub_(own[:, rows]).mul_(weights)
            for_query[:, rows].baddbmm_(change, tile_key)
            for_key[:, columns].baddbmm_(change.transpose(1, 2), tile_query)
    return for_query.to(query.dtype), for_key.to(key.dtype), for_value.to(value.dtype)


def _wide(x: Tensor) -> torch.dtype:
    """Returns the dtype of sums: float32 for half precision, else that of ``x``."""
    return torch.promote_types(x.dtype, torch.float32)


def _widen(tile: Tensor) -> Tensor:
    return tile.to(_wide(tile))


def _tiles(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


# As operators they are opaque to torch.compile and torch.export, which would unroll every tile.
attend_in_tiles = torch.library.custom_op("danet::attend_in_tiles", _forward, mutates_args=())
_attend_backward = torch.library.custom_op(
    "danet::attend_in_tiles_backward", _backward, mutates_args=()
)


@attend_in_tiles.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], query.shape[1])
    return value.new_empty(*shape, value.shape[-1]), value.new_empty(*shape, 1, dtype=_wide(value))


@_attend_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, context: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _attend_backward(gradient, *ctx.saved_tensors)
    return gradients


attend_in_tiles.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.danet.attend_in_tiles)
def _(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Counts a multiply-add as 2, as torch.utils.flop_counter does."""
    batch, queries, width = query
    return 2 * batch * queries * key[1] * (width + value[2])


@register_flop_formula(torch.ops.danet.attend_in_tiles_backward)
def _(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Counts five products: the energies again, and one for each gradient and for the weights."""
    batch, queries, width = query
    return 2 * batch * queries * key[1] * (3 * width + 2 * value[2])
