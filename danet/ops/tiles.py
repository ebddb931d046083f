"""Softmax attention in tiles: exact, with memory linear in the number of positions.

The attention map is computed some rows at a time and never kept. As in FlashAttention (Dao et al.,
2022) the backward pass recomputes it from the logarithm of each row's softmax denominator. It runs
on every device and supports values wider than the keys, which most fused kernels do not.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from danet.ops import fused
from danet.ops.arithmetic import product_dtype, sum_dtype, without_autocast

ELEMENTS_PER_TILE = 2**20
"""Energies in a tile: 4 MiB of float32. A tile is a few rows of the map, all keys wide (in the
backward pass a few columns of it): every product has one long side, and softmax needs no second
pass over the rows."""
SHORTEST_TILE = 128  # rows, however many keys there are; fewer read all values for little work
_LOG2_E = math.log2(math.e)
"""Tiles use powers of 2, exp(x) = exp2(x log2 e), which are twice as fast."""
LEAST_LOG2 = -64.0
"""Weights are at least 2^-64 of the largest, which changes no sum. Denormal numbers, the most of a
sharp softmax, make powers and products of a CPU up to twenty times as slow."""


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Maps (B, M, D), (B, N, D), (B, N, C) to softmax(query key^T) value, (B, M, C).

    Without a scale, as in eq. 1 and 2 of the paper. The dtype is that of ``value``; half precision
    is accumulated in float32. On CUDA a fused kernel is used where one fits, elsewhere tiles.
    """
    kernel = fused.choose_kernel(value.device, value.dtype, key.shape[-1], value.shape[-1])
    if kernel is not None:
        return fused.attend_in_slices(query, key, value, kernel)
    context: Tensor = attend_in_tiles(query, key, value)[0]
    return context


def _forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the context (B, M, C) and log2 of each query's softmax denominator, (B, M, 1)."""
    batch, queries, _ = query.shape
    context = value.new_empty(batch, queries, value.shape[-1])
    log_sum = value.new_empty(batch, queries, 1, dtype=sum_dtype(value))
    dtype = product_dtype(value)
    with without_autocast(value.device.type):
        for i in range(batch):
            keys, values = _widen(key[i]).t(), value[i].to(dtype)
            for rows in _tiles(queries, across=key.shape[1]):
                # (rows, N), overwritten by the weights
                energy = torch.mm(_widen(query[i, rows]) * _LOG2_E, keys)
                largest = energy.amax(dim=-1, keepdim=True)  # (rows, 1)
                weights = energy.sub_(largest).clamp_(min=LEAST_LOG2).exp2_()
                total = weights.sum(dim=-1, keepdim=True)
                # Divided before they are rounded, so that the context is rounded only once more.
                context[i, rows] = torch.mm(weights.div_(total).to(dtype), values)
                log_sum[i, rows] = total.log2_().add_(largest)
    return context, log_sum


def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, context: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, given that of the context."""
    grad_query = torch.zeros_like(query, dtype=log_sum.dtype)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    dtype, pieces = product_dtype(value), _tiles(query.shape[1], across=value.shape[2])
    with without_autocast(value.device.type):
        for i in range(len(query)):
            # Term of the softmax itself (D in FlashAttention): sum_j p_j dp_j = gradient . context.
            pairs = ((_widen(gradient[i, rows]), _widen(context[i, rows])) for rows in pieces)
            delta = torch.cat([torch.linalg.vecdot(*p) for p in pairs]).unsqueeze(-1)  # (M, 1)
            scaled = _widen(query[i]) * _LOG2_E
            own_query, own_gradient = query[i].to(dtype), gradient[i].to(dtype).contiguous()
            for columns in _tiles(key.shape[1], across=query.shape[1]):
                own_key, own_value = key[i, columns].to(dtype), value[i, columns].to(dtype)
                energy = torch.mm(scaled, _widen(key[i, columns]).t())  # (M, columns)
                weights = energy.sub_(log_sum[i]).clamp_(min=LEAST_LOG2).exp2_()
                grad_value[i, columns] = torch.mm(weights.to(dtype).t(), own_gradient)
                # Of the energies before log2 e, which therefore does not appear below.
                grad_energy = _widen(torch.mm(own_gradient, own_value.t()))
                grad_energy = grad_energy.sub_(delta).mul_(weights).to(dtype)
                grad_query[i] += torch.mm(grad_energy, own_key)
                grad_key[i, columns] = torch.mm(grad_energy.t(), own_query)
    return grad_query.to(query.dtype), grad_key, grad_value


def _widen(tile: Tensor) -> Tensor:
    return tile.to(sum_dtype(tile))


def _tiles(length: int, *, across: int) -> list[slice]:
    """Cut an axis of the map into tiles that extend over the whole other axis, ``across`` long."""
    size = max(SHORTEST_TILE, ELEMENTS_PER_TILE // across)
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
    return context, value.new_empty(batch, queries, 1, dtype=sum_dtype(value))


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
