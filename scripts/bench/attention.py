"""Benchmark the position attention alone: forward and backward, against the N x N map.

The plain module has the precision of ours; bfloat16 is autocast, with inputs in channels_last.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bench import reference
from bench.measure import GIB, Options, Row, name_of, peak_memory, relative_error, seconds
from danet.ops.attention import PositionAttention
from danet.ops.fused import BOUNDS, Kernel, attend_in_slices, candidates, error_of
from danet.ops.tiles import attend_in_tiles

CHANNELS = 512
"""C behind a ResNet-50; keys and queries have an eighth, D = 64."""
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
    dtypes = options.precisions()[-1:] if cuda else options.precisions()
    # Memory first: timing leaves holes in the heap of a CPU process.
    pairs = {}
    for dtype in dtypes:
        for size in compared:
            x = _input(channels, size, device, dtype)
            pairs[size, dtype] = [_Step(module, x, dtype) for module in (ours, theirs)]
            for step in pairs[size, dtype]:
                step()
            peaks = [peak_memory(step, device) for step in pairs[size, dtype]]
            rows.append(_memory_row(size, dtype, *peaks))
    for size in alone:
        step = _Step(ours, _input(channels, size, device, dtypes[-1]), dtypes[-1])
        if cuda or options.quick:
            step()
        # Else no warm-up: a pass takes minutes on a CPU, and what the first one adds is small.
        rows.append(_memory_row(size, dtypes[-1], peak_memory(step, device)))
    repeats = 1 if options.quick else (10 if cuda else 7)
    for (size, dtype), steps in pairs.items():
        times = seconds(steps, device, repeats=repeats)
        rows.append(_time_row(size, dtype, times))
    for dtype in dtypes:
        x = _input(channels, compared[0], device, dtype, SHARP)
        steps = [_Step(module, x, dtype) for module in (ours, theirs)]
        times = seconds(steps, device, repeats=repeats)
        note = f"input times {SHARP:g}: sharp attention"
        rows.append(_time_row(compared[0], dtype, times, note))
    if cuda:
        for dtype in (torch.float32, torch.bfloat16):
            rows += _kernel_rows(compared[-1], channels, dtype, device)
    return rows


def _kernel_rows(
    size: tuple[int, int], channels: int, dtype: torch.dtype, device: torch.device
) -> list[Row]:
    """Check and time the choices of ``attend``: torch's kernels on slices, and tiles."""
    positions, keys, case = size[0] * size[1], channels // 8, _case(size, dtype)
    tokens = [
        torch.randn(1, positions, width, device=device, dtype=dtype, requires_grad=True)
        for width in (keys, keys, channels)
    ]
    upstream = torch.ones_like(tokens[2])

    def step(attend: Callable[..., Tensor]) -> None:
        torch.autograd.grad(attend(*tokens), tokens, upstream)

    ways: dict[Kernel | str, Callable[..., Tensor]] = {"tiles": lambda *t: attend_in_tiles(*t)[0]}
    for kernel in candidates(dtype, keys, channels):
        ways[kernel] = partial(attend_in_slices, kernel=kernel)
    rows = []
    for way, attend in ways.items():
        name = str(way) if isinstance(way, str) or way.shares else f"{way}, copied"
        try:
            if isinstance(way, Kernel):
                error = error_of(way, device, dtype, keys, channels)
                bound = BOUNDS[dtype]
                rows.append(Row("attention", case, "error", "", error, note=name, bound=bound))
            (time,) = seconds([partial(step, attend)], device, repeats=10)
        except RuntimeError as refusal:  # no kernel supports it
            print(f"{case}: {name} refused: {refusal}", flush=True)
            continue
        # As many products as are needed: 2 forward, 5 backward.
        useful = 2 * positions**2 * (4 * keys + 3 * channels) / time / 1e12
        note = f"{name}, by itself; {useful:.1f} TFLOP/s of useful arithmetic"
        rows.append(Row("attention", case, "time", "s", time, note=note))
    return rows


def _time_row(size: tuple[int, int], dtype: torch.dtype, times: list[float], note: str = "") -> Row:
    against = f"plain {name_of(dtype)}"
    return Row("attention", _case(size, dtype), "time", "s", times[0], times[1], note, against)


def _memory_row(
    size: tuple[int, int], dtype: torch.dtype, ours: int, reference: int | None = None
) -> Row:
    note = f"{ours / (size[0] * size[1]):,.0f} bytes a position"
    values = ours / GIB, reference and reference / GIB
    against = f"plain {name_of(dtype)}" if reference else ""
    return Row("attention", _case(size, dtype), "memory", "GiB", *values, note, against)


class _Step:
    """Forward and backward of a module, as a function without arguments."""

    def __init__(self, module: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
        self.module, self.x, self.dtype = module, x, dtype
        self.upstream = torch.ones_like(x)

    def __call__(self) -> None:
        mixed = self.dtype != torch.float32
        with torch.autocast(self.x.device.type, dtype=self.dtype, enabled=mixed):
            out = self.module(self.x)
        inputs = [self.x, *self.module.parameters()]
        torch.autograd.grad(out, inputs, self.upstream.to(out.dtype))


def _pair(channels: int, device: torch.device) -> tuple[nn.Module, nn.Module]:
    ours, theirs = PositionAttention(channels), reference.PositionAttention(channels)
    nn.init.constant_(ours.gamma, 0.7)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(device), theirs.to(device)


def _input(
    channels: int,
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> Tensor:
    x = torch.randn(1, channels, *size, device=device).mul_(scale).to(dtype)
    if dtype != torch.float32:
        x = x.to(memory_format=torch.channels_last)
    return x.requires_grad_()


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
        worst = max(worst, error)
    case, note = _case((side, side), torch.float32), "values and all gradients"
    return [Row("attention", case, "error", "", worst, note=note, bound=BOUNDS[torch.float32])]


def _case(size: tuple[int, int], dtype: torch.dtype) -> str:
    name = f"N={size[0]}^2" if size[0] == size[1] else f"N={size[0]}x{size[1]}"
    return f"{name} {name_of(dtype)}"
