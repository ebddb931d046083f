"""Measurements of the benchmark: records, interleaved times, peak memory, errors."""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.resident import reset_high_water_mark, status
from danet.engine.precision import choose_precision

GIB = 2**30


class Options(NamedTuple):
    """The options of the command line."""

    device: torch.device
    quick: bool = False
    """Tiny sizes, to check that parts run and agree; the figures are not worth keeping."""
    precision: str = "auto"
    """Of our step, as in ``trainer.precision``."""
    profile: bool = False
    """Print the most expensive operators."""

    def precisions(self) -> list[torch.dtype]:
        """Return the dtypes to measure: float32, and the one that training chooses or is given."""
        return list(dict.fromkeys([torch.float32, choose_precision(self.precision, self.device)]))


class Row(NamedTuple):
    """One figure, and that of the reference if there is one."""

    part: str
    case: str
    measure: str
    """What was measured: ``time``, ``memory``, ``error``, ..."""
    unit: str
    ours: float
    reference: float | None = None
    note: str = ""
    against: str = ""
    """Which reference, with its precision and memory order."""
    bound: float | None = None
    """Of an error."""

    @property
    def has_failed(self) -> bool:
        """Return whether an error is above its bound, or not a number."""
        return self.bound is not None and not self.ours <= self.bound

    @property
    def ratio(self) -> float | None:
        """Return reference over ours: above 1, ours takes less. An error has no ratio."""
        if self.reference is None or self.measure == "error" or not self.ours:
            return None
        return self.reference / self.ours


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """Return the peak of bytes during a call, above those allocated before it.

    On CUDA by torch's allocator. On the CPU by resident memory, so that workspaces of kernels count
    (Linux with glibc only): after ``return_freed_memory`` and before ``seconds``, which leaves
    holes in the heap that a call can fill unnoticed. The function must have run before, or its
    first-time costs are counted.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    reset_high_water_mark()
    start = status("VmRSS")
    function()
    return max(0, status("VmHWM") - start)


def seconds(
    functions: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    repeats: int,
    warm_ups: int = 1,
) -> list[float]:
    """Return the median time of each function, measured in turns: A, B, A, B, ..."""
    _set_thresholds(mmap=2**25, trim=2**26)  # the values that glibc's dynamic thresholds reach
    for _ in range(warm_ups):
        for function in functions:
            function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, spent in zip(functions, times, strict=True):
            _wait(device)
            start = time.perf_counter()
            function()
            _wait(device)
            spent.append(time.perf_counter() - start)
    return [statistics.median(spent) for spent in times]


def return_freed_memory() -> None:
    """Make glibc map blocks of 64 KiB and more one by one, so that freeing returns them at once.

    Otherwise freed blocks stay resident, and resident memory exceeds what is used. It costs time,
    so ``seconds`` ends it.
    """
    _set_thresholds(mmap=2**16, trim=2**17)


def _set_thresholds(*, mmap: int, trim: int) -> None:
    """Set glibc's thresholds, in bytes, for mapping blocks one by one and trimming the heap."""
    if sys.platform == "linux":
        libc, m_trim_threshold, m_mmap_threshold = ctypes.CDLL("libc.so.6"), -1, -3
        libc.mallopt(m_mmap_threshold, mmap)
        libc.mallopt(m_trim_threshold, trim)


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Return the largest difference over the largest value of the reference."""
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).abs().max() / reference.abs().max().clamp(min=1e-30))


def name_of(dtype: torch.dtype) -> str:
    """Return ``float32`` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def table(rows: Iterable[Row]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| part | case | measure | against | reference | ours | reference / ours | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        reference = "" if row.reference is None else _number(row.reference, row.unit)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        figures = (row.against, reference, _number(row.ours, row.unit), ratio)
        verdict = f"FAILED, bound {row.bound:g}; " if row.has_failed else ""
        cells = (row.part, row.case, row.measure, *figures, verdict + row.note)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float, unit: str) -> str:
    return f"{value:.1e} {unit}".strip() if 0 < abs(value) < 1e-2 else f"{value:.3f} {unit}".strip()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
