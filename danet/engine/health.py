"""Whether a training is healthy: losses and weights are finite, memory and speed are known."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from danet.engine import distributed
from danet.errors import DivergedError

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
        rank, world = distributed.rank(), distributed.world_size()
        firsts = torch.zeros(world, device=first.device)
        firsts[rank] = first
        terms = torch.stack([term.detach().float() for term in latest.values()])
        values = distributed.sum_of(torch.cat([terms, firsts]), "mean of losses")
        found = [(int(place), r) for r, place in enumerate(values[len(latest) :]) if place]
        if found:
            place, where = min(found)
            step = steps[place - 1]
            told = distributed.from_process(where, (float(step.loss), step.names))
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
        faults = distributed.gather(fault) if together else [fault]
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
            f"{distributed.rank()} of {distributed.world_size()}; {samples}{self.replay(step)}"
        )

    def replay(self, step: int) -> str:
        """Says with which command the step comes again."""
        last = self.folder / "last.pt"
        if last.exists():
            source = f"resume={last}"
        else:
            source = f"--config-dir {self.folder} --config-name config run.dir=null"
        world = distributed.world_size()
        start = "python" if world == 1 else f"torchrun --nproc-per-node {world}"
        return f"to see it again: {start} tools/train.py {source} trainer.stop_at={step}"


def shorten(names: Sequence[str]) -> str:
    """Returns names as one text, the first few of many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


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
        images = self._images * distributed.world_size()
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
