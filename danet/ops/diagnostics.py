"""What the attention of a network does with an image, in numbers.

For position attention the rows and columns of the map are the N positions, for channel attention
the C channels; energies are what the softmax of a row is taken of.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from danet.ops.attention import ChannelAttention, PositionAttention

_ELEMENTS = 2**22  # of the map, computed at a time

Rows = tuple[Tensor, Tensor]
"""Numbers of some rows, (R,), and their energies, (R, columns)."""


@torch.inference_mode()
def diagnose(attention: PositionAttention | ChannelAttention, x: Tensor) -> dict[str, float]:
    """Describe an attention by its input, the features of one image (1, C, H, W).

    Returns:
        size: Positions or channels of the map.
        effective: Number that a row attends to: the exponential of its entropy, averaged.
        on_strongest: Share of all attention that lies on one column, the strongest.
        same_strongest: Share of the rows whose largest weight lies in the same column.
        row_cosine: Mean cosine of two different rows; 1 if all attend to the same.
        energy_std: Mean standard deviation of the energies of a row.
        reach: Mean distance to what is attended to, as a share of the map's diagonal; of positions.
        on_registers: Share of all attention that registers have, where there are some.
        scale: Of the similarities, where it is learned.
        gamma: The weight of the context.
        moved: Norm of ``gamma * context`` as a share of that of the input.
        varies: Share of the norm of the context that is left without its mean over the rows.
    """
    if x.ndim != 4 or x.shape[0] != 1:
        raise ValueError(f"found features {tuple(x.shape)}, expected those of one image")
    x = x.float()
    height, width = x.shape[2:]
    is_channel = isinstance(attention, ChannelAttention)
    if isinstance(attention, ChannelAttention):
        rows, size = _rows_of_channels(attention, x), x.shape[1]
    else:
        rows, size = _rows_of_positions(attention, x), height * width
    column_sums, unit_sum = x.new_zeros(size), x.new_zeros(size)
    strongest = torch.zeros(size, dtype=torch.long, device=x.device)
    entropy = deviation = distance = on_registers = unit_squares = 0.0
    for index, energy in rows:
        weights = energy.softmax(dim=-1)
        entropy += torch.special.entr(weights).sum(dim=-1).exp().sum().item()
        deviation += energy[:, :size].std(dim=-1, correction=0).sum().item()
        on_registers += weights[:, size:].sum().item()
        weights = weights[:, :size]
        column_sums += weights.sum(dim=0)
        strongest += torch.bincount(weights.argmax(dim=-1), minlength=size)
        unit = F.normalize(weights, dim=-1)
        unit_sum += unit.sum(dim=0)
        unit_squares += unit.square().sum().item()
        if not is_channel:
            distance += (weights * _distances(index, height, width)).sum().item()
    context = attention.context(x)  # (1, N, C)
    rest = context - context.mean(dim=2 if is_channel else 1, keepdim=True)
    # Of all pairs of rows: the square of their sum has each pair twice, and each row with itself.
    pairs = unit_sum.square().sum().item() - unit_squares
    found = {
        "size": size,
        "effective": entropy / size,
        "on_strongest": column_sums.max().item() / size,
        "same_strongest": strongest.max().item() / size,
        "row_cosine": pairs / max(size * (size - 1), 1),
        "energy_std": deviation / size,
        "gamma": attention.gamma.item(),
        "moved": (attention.gamma * context).norm().item() / max(x.norm().item(), 1e-12),
        "varies": rest.norm().item() / max(context.norm().item(), 1e-12),
    }
    if isinstance(attention, PositionAttention):
        found["reach"] = distance / size / math.hypot(height, width)
        if attention.register_keys is not None:
            found["on_registers"] = on_registers / size
        if attention.log_scale is not None:
            found["scale"] = attention.log_scale.exp().item()
    return found


def _rows_of_positions(attention: PositionAttention, x: Tensor) -> Iterator[Rows]:
    query, keys = attention.project(x)
    index = torch.arange(query.shape[1], device=x.device)
    for part in index.split(max(1, _ELEMENTS // len(index))):
        yield part, query[0, part] @ keys[0].T


def _rows_of_channels(attention: ChannelAttention, x: Tensor) -> Iterator[Rows]:
    features = x[0].flatten(1)  # (C, N)
    yield torch.arange(len(features), device=x.device), attention.sign * features @ features.T


def _distances(index: Tensor, height: int, width: int) -> Tensor:
    """Return the distances in cells from some positions to all, (R, N)."""
    every = torch.arange(height * width, device=index.device)
    down = (index // width)[:, None] - every // width
    across = (index % width)[:, None] - every % width
    return torch.hypot(down.float(), across.float())
