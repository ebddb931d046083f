"""Benchmark the position attention alone: forward and backward, against the N x N map."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bench import reference
from bench.measure import GIB, Options, Row, agree, peak_memory, relative_error, seconds
from danet.ops.attention import PositionAttention
from danet.ops.tiles import attend_in_slices, attend_in_tiles

CHANNELS = 512
"""C behind a ResNet-50; keys and queries have an eighth, D = 64."""
AGREEMENT = 1e-5
SHARP = 8.0
"""Factor of an input whose energies are 64 times as large: few weights of a row are not tiny."""


def run(options: Options) -> list[Row]:
    """Measure agreement, then times and peaks by size; ours alone where the map would not fit."""
    device, cuda = options.device, options.device.type == "cuda"
    channels = 64 if options.quick else CHANNELS
    ours, theirs = _pair(channels, device)
    rows = _agreement(ours, theirs, channels, 16 if options.quick else 64, device)
    if options.quick:
        compared, alone = [(16, 16), (32, 48)], [(64, 64)]
    elif cuda:
        compared, alone = [(96, 96), (128, 128), (128, 256)], [(256, 256)]
    else:
        compared, alone = [(64, 64), (96, 96), (128, 128)], [(128, 256), (256, 256)]
    # Memory first: timing leaves holes in the heap of a CPU process.
    pairs = {}
    for size in compared:
        x = _input(channels, size, device)
        pairs[size] = [_Step(module, x, cuda) for module in (ours, theirs)]
        for step in pairs[size]:
            step()
        peaks = [peak_memory(step, device) for step in pairs[size]]
        rows.append(_memory_row(size, cuda, *peaks))
    for size in alone:
        step = _Step(ours, _input(channels, size, device), cuda)
        if cuda or options.quick:
            step()
        # Else no warm-up: a pass takes minutes on a CPU, and what the first one adds is small.
        rows.append(_memory_row(size, cuda, peak_memory(step, device)))
    for size, steps in pairs.items():
        times = seconds(steps, device, repeats=10 if cuda else 3)
        rows.append(Row("attention", _case(size, cuda), "time", "s", *times))
    rows.append(_sharp_row(ours, theirs, _input(channels, compared[0], device, SHARP), cuda))
    if cuda:
        for dtype in (torch.float32, torch.bfloat16):
            rows += _kernel_rows(compared[-1], channels, dtype, device)
    return rows


def _kernel_rows(
    size: tuple[int, int], channels: int, dtype: torch.dtype, device: torch.device
) -> list[Row]:
    """Time the choices of ``attend``: torch's kernels on slices, and tiles."""
    positions, keys = size[0] * size[1], channels // 8
    tokens = [
        torch.randn(1, positions, width, device=device, dtype=dtype, requires_grad=True)
        for width in (keys, keys, channels)
    ]
    upstream = torch.ones_like(tokens[2])

    def step(attend: Callable[..., Tensor]) -> None:
        torch.autograd.grad(attend(*tokens), tokens, upstream)

    ways: dict[str, Callable[..., Tensor]] = {
        "tiles": lambda *t: attend_in_tiles(*t)[0],
        "slices": attend_in_slices,
    }
    rows = []
    for name, attend in ways.items():
        try:
            (time,) = seconds([partial(step, attend)], device, repeats=10)
        except RuntimeError:  # no kernel supports it
            continue
        case = _case(size, dtype == torch.bfloat16)
        rows.append(Row("attention", case, "time", "s", time, note=f"{name}, by itself"))
    return rows


def _sharp_row(ours: nn.Module, theirs: nn.Module, x: Tensor, cuda: bool) -> Row:
    """Time attention with most weights tiny, as in trained networks."""
    steps = [_Step(module, x, cuda) for module in (ours, theirs)]
    times = seconds(steps, x.device, repeats=10 if cuda else 3)
    note = f"input times {SHARP:g}: sharp attention"
    return Row("attention", _case((x.shape[2], x.shape[3]), cuda), "time", "s", *times, note=note)


def _memory_row(size: tuple[int, int], cuda: bool, ours: int, reference: int | None = None) -> Row:
    note = f"{ours / (size[0] * size[1]):,.0f} bytes a position"
    values = ours / GIB, reference and reference / GIB
    return Row("attention", _case(size, cuda), "memory", "GiB", *values, note=note)


class _Step:
    """Forward and backward of a module, as a function without arguments."""

    def __init__(self, module: nn.Module, x: Tensor, mixed: bool) -> None:
        self.module, self.x, self.mixed = module, x, mixed
        self.upstream = torch.ones_like(x)

    def __call__(self) -> None:
        with torch.autocast(self.x.device.type, dtype=torch.bfloat16, enabled=self.mixed):
            out = self.module(self.x)
        inputs = [self.x, *self.module.parameters()]
        torch.autograd.grad(out, inputs, self.upstream.to(out.dtype))


def _pair(channels: int, device: torch.device) -> tuple[nn.Module, nn.Module]:
    ours, theirs = PositionAttention(channels), reference.PositionAttention(channels)
    nn.init.constant_(ours.gamma, 0.7)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(device), theirs.to(device)


def _input(
    channels: int, size: tuple[int, int], device: torch.device, scale: float = 1.0
) -> Tensor:
    return torch.randn(1, channels, *size, device=device).mul_(scale).requires_grad_()


def _agreement(
    ours: nn.Module, theirs: nn.Module, channels: int, side: int, device: torch.device
) -> list[Row]:
    """Compare values and all gradients in float32."""
    x = _input(channels, (side, side), device)
    upstream = torch.randn_like(x)
    names = [name for name, _ in ours.named_parameters()]
    results = []
    for module in (ours, theirs):
        out = module(x)
        gradients = torch.autograd.grad(out, [x, *module.parameters()], upstream)
        results.append([out.detach(), *gradients])
    worst, scale = 0.0, max(float(g.abs().max()) for g in results[1][2:])
    for name, a, b in zip(["values", "input", *names], *results, strict=True):
        # The bias of the keys adds one number to a whole row of a softmax: its gradient is 0.
        is_noise = name == "key.bias"
        error = float((a - b).abs().max()) / scale if is_noise else relative_error(a, b)
        worst = max(worst, agree(error, AGREEMENT, f"attention, {name}"))
    case = f"N={side}^2 float32"
    return [Row("attention", case, "error", "", worst, note="values and all gradients")]


def _case(size: tuple[int, int], cuda: bool) -> str:
    name = f"N={size[0]}^2" if size[0] == size[1] else f"N={size[0]}x{size[1]}"
    return f"{name} {'bfloat16' if cuda else 'float32'}"
