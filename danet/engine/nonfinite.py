"""Whether a training is healthy: losses and weights are finite, memory and speed are known."""

import os
import shlex
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from danet.distributed import collectives
from danet.errors import DivergedError

MOST_OVERFLOWS = 30
"""Steps in a row whose gradients may overflow float16; the factor of the loss is halved in each."""
LONGEST = 1000
"""So many steps are kept at most."""
_SHOWN = 8


class _Step(NamedTuple):
    number: int
    names: tuple[str, ...]
    """Of the samples of this process."""
    terms: Mapping[str, Tensor]
    loss: Tensor
    """float32 scalar on the device."""


class LossWatch:
    """Keeps the losses of the latest steps on the device until somebody looks at them all at once.

    Nothing is waited for in ``note``. ``look`` waits once, and all processes learn there of the
    first loss that is not finite anywhere, so that all end at the same step.

    Args:
        folder: Of the run, for the command that repeats the step.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._steps: list[_Step] = []
        self._names: tuple[str, ...] = ()

    @property
    def is_full(self) -> bool:
        """Tells whether it is time to look, even when no line of the log is due."""
        return len(self._steps) >= LONGEST

    def note(self, step: int, names: Sequence[str], terms: Mapping[str, Tensor]) -> None:
        """Keeps the loss terms of a step, scalars on the device."""
        self._names = tuple(names)
        loss = torch.stack([term.detach().float() for term in terms.values()]).sum()
        self._steps.append(_Step(step, self._names, dict(terms), loss))

    def look(self) -> dict[str, float]:
        """Returns the terms of the latest step, averaged over the processes; waits for the device.

        All processes call it after the same steps.

        Raises:
            DivergedError: The loss of a step since the last look was not finite on some process;
                with the step, the process, its samples and the command that repeats it.
        """
        steps, self._steps = self._steps, []
        latest = steps[-1].terms
        bad = ~torch.isfinite(torch.stack([step.loss for step in steps]))
        # 0 when all are finite, else the place of the first that is not, counted from 1.
        first = torch.where(bad.any(), bad.int().argmax() + 1, 0).float()
        rank, world = collectives.rank(), collectives.world_size()
        firsts = torch.zeros(world, device=first.device)
        firsts[rank] = first
        terms = torch.stack([term.detach().float() for term in latest.values()])
        values = collectives.sum_of(torch.cat([terms, firsts]), "mean of losses")
        found = [(int(place), r) for r, place in enumerate(values[len(latest) :]) if place]
        if found:
            place, where = min(found)
            step = steps[place - 1]
            told = collectives.from_rank(where, (float(step.loss), step.names))
            raise DivergedError(
                f"step {step.number}: the loss is not finite ({told[0]}) on process {where} of "
                f"{world}; its samples: {shorten(told[1])}; {self.replay(step.number)}"
            )
        return {name: value / world for name, value in zip(latest, values, strict=False)}

    def require_finite(self, model: nn.Module, step: int, *, together: bool) -> None:
        """Looks at all weights and statistics in one reduction; waits for the device.

        Args:
            model: The network.
            step: Updates done.
            together: Whether all processes look now, so that all end when one finds something.

        Raises:
            DivergedError: With the first tensor that is not finite, and how many of its values.
        """
        fault = self._fault_of(model, step)
        faults = collectives.gather(fault) if together else [fault]
        for found in faults:
            if found:
                raise DivergedError(found)

    def _fault_of(self, model: nn.Module, step: int) -> str:
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        named = {k: v.detach() for k, v in named.items() if v.is_floating_point() and v.numel()}
        if not named:
            return ""
        largest = torch._foreach_norm(list(named.values()), ord=float("inf"))
        if bool(torch.isfinite(torch.stack([value.float() for value in largest])).all()):
            return ""
        name, value = next((k, v) for k, v in named.items() if not bool(torch.isfinite(v).all()))
        count = int((~torch.isfinite(value)).sum())
        samples = f"its samples: {shorten(self._names)}; " if self._names else ""
        return (
            f"step {step}: {count} of {value.numel()} values of {name} are not finite on process "
            f"{collectives.rank()} of {collectives.world_size()}; {samples}{self.replay(step)}"
        )

    def replay(self, step: int) -> str:
        """Says with which command the step comes again."""
        last = self.folder / "last.pt"
        if last.exists():
            source = shlex.quote(f"resume={last}")
        else:
            folder = shlex.quote(str(self.folder))
            source = f"--config-dir {folder} --config-name config run.dir=null"
        world = collectives.world_size()
        start = "python" if world == 1 else f"torchrun --nproc-per-node {world}"
        return f"to see it again: {start} tools/train.py {source} trainer.stop_at={step}"


def shorten(names: Sequence[str]) -> str:
    """Returns names as one text, the first few of many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


class Overflows:
    """Counts the steps whose gradients overflowed float16, which changed no weight.

    The counts are on the device, and nothing is waited for but where it is said.

    Args:
        device: Of the training.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # All of the run, and the latest in a row.
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._factors: Tensor | None = None

    def resume(self, total: int) -> None:
        """Goes on from the count of a checkpoint."""
        self._counts[0] = total

    def note(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        """Counts a step; between the scaler's ``step`` and ``update``, which forgets."""
        found = scaler._found_inf_per_device(optimizer).values()
        is_skipped = (torch.stack([value.to(self.device) for value in found]).sum() > 0).long()
        total, in_a_row = self._counts
        self._counts = torch.stack([total + is_skipped, (in_a_row + 1) * is_skipped])

    def factor(self, schedule: Callable[[int, int], float], step: int, steps: int) -> Tensor:
        """Returns the schedule's factor at a step, which moves only with steps that were taken.

        It is looked up on the device, in a table of all steps, since only that knows how many were.
        """
        if self._factors is None:
            factors = array("f", (schedule(step, steps) for step in range(steps)))
            table = torch.frombuffer(factors, dtype=torch.float32)
            table = table.pin_memory() if self.device.type == "cuda" else table.clone()
            self._factors = table.to(self.device, non_blocking=True)
        return self._factors.take(step - self._counts[0])

    def total(self) -> int:
        """Returns how many steps of the run overflowed; waits for the device."""
        return int(self._counts[0])

    def require_updates(self, step: int, last: int, replay: str) -> None:
        """Ends a run in which nothing is trained; waits for the device.

        Args:
            step: Done so far.
            last: Of the run.
            replay: The command that repeats the step, for the message.

        Raises:
            DivergedError: MOST_OVERFLOWS steps in a row overflowed, or all of a run that is over.
        """
        total, in_a_row = self._counts.tolist()
        if in_a_row >= MOST_OVERFLOWS or (step == last and total == step):
            raise DivergedError(
                f"step {step}: the gradients of the last {in_a_row} steps were too large for "
                "float16, so no weight has changed; set trainer.precision=bfloat16 or float32, or "
                f"lower optimizer.lr; {replay}"
            )


class Pace:
    """Measures a training between two lines of its log."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Forgets what was measured; after an evaluation, which is no training."""
        self._since = time.perf_counter()
        self._waited = 0.0
        self._images = 0

    def note(self, waited: float, images: int) -> None:
        """Takes in a step: seconds spent waiting for its data, and its images on this process."""
        self._waited += waited
        self._images += images

    def take(self) -> dict[str, float]:
        """Returns numbers by name since the last call, and starts anew.

        ``data_waiting`` is a share of the time, ``images_per_second`` counts all processes (each
        has as many), ``memory_gib`` is the peak of this process so far.
        """
        seconds = max(time.perf_counter() - self._since, 1e-9)
        images = self._images * collectives.world_size()
        values = {
            "data_waiting": self._waited / seconds,
            "images_per_second": images / seconds,
            "memory_gib": peak_memory(self.device) / 2**30,
        }
        self.restart()
        return values


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes this process had: of tensors on CUDA, else of main memory (or 0)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name != "posix":
        return 0
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
