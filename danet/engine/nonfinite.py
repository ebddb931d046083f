"""Ending a run whose loss, weights or gradients are no longer finite."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from danet.distributed import collectives
from danet.errors import DivergedError

MOST_OVERFLOWS = 30
"""Overflows in a row after which a float16 run ends; each halves the loss scale."""
CAPACITY = 1000
"""Losses kept before they must be checked; each is a few scalars on the device."""
_SHOWN_NAMES = 8


class _Step(NamedTuple):
    number: int
    names: tuple[str, ...]
    """Of the samples of this process."""
    terms: Mapping[str, Tensor]
    loss: Tensor
    """float32 scalar on the device."""


class NonFiniteGuard:
    """Checks losses and weights, without waiting for the device at every step.

    Losses are kept on the device until ``check``, which waits once. There all processes learn of
    the first loss that is not finite on any of them, so that all end at the same step.

    Args:
        folder: Of the run, for the command in the message.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._steps: list[_Step] = []
        self._names: tuple[str, ...] = ()

    @property
    def is_full(self) -> bool:
        """Whether ``check`` must be called, even if no line of the log is due."""
        return len(self._steps) >= CAPACITY

    def append(self, step: int, names: Sequence[str], terms: Mapping[str, Tensor]) -> None:
        """Keep the loss terms of a step, scalars on the device, and the names of its samples."""
        self._names = tuple(names)
        # detach: a kept loss must not keep the activations of its step.
        loss = torch.stack([term.detach().float() for term in terms.values()]).sum()
        self._steps.append(_Step(step, self._names, dict(terms), loss))

    def check(self) -> dict[str, float]:
        """Return the loss terms of the latest step, averaged over processes; wait for the device.

        All processes call it after the same steps.

        Raises:
            DivergedError: A loss since the last check is not finite on some process. The message
                has the step, the process, its samples, and the command that repeats it.
        """
        steps, self._steps = self._steps, []
        latest = steps[-1].terms
        is_bad = ~torch.isfinite(torch.stack([step.loss for step in steps]))
        # 1-based index of the first bad step, 0 if there is none: one number per process, so that
        # a single reduction carries the losses and the verdicts of all processes. argmax takes no
        # bool, and returns the first of equal values.
        first = torch.where(is_bad.any(), is_bad.int().argmax() + 1, 0).float()
        rank, world_size = collectives.rank(), collectives.world_size()
        firsts = torch.zeros(world_size, device=first.device)
        firsts[rank] = first  # a sum in which each process fills its own entry is a gather
        terms = torch.stack([term.detach().float() for term in latest.values()])
        values = collectives.sum_of(torch.cat([terms, firsts]), "mean of losses")
        found = [(int(place), r) for r, place in enumerate(values[len(latest) :]) if place]
        if found:
            place, where = min(found)
            step = steps[place - 1]
            # Loss and samples are only on the process where it happened.
            loss, names = collectives.from_rank(where, (float(step.loss), step.names))
            raise DivergedError(
                f"step {step.number}: the loss is not finite ({loss}) on process {where} of "
                f"{world_size}; its samples: {shorten(names)}; {self.replay(step.number)}"
            )
        return {name: value / world_size for name, value in zip(latest, values, strict=False)}

    def require_finite(self, model: nn.Module, step: int, *, on_all: bool) -> None:
        """Check all weights and statistics; wait for the device.

        Args:
            model: The network.
            step: Updates done.
            on_all: Whether all processes call this now, so that all end if one finds something.

        Raises:
            DivergedError: With the first tensor that is not finite.
        """
        problem = self._problem_of(model, step)
        # After a signal the others may have died, so a gather could wait in vain.
        for found in collectives.gather(problem) if on_all else [problem]:
            if found:
                raise DivergedError(found)

    def _problem_of(self, model: nn.Module, step: int) -> str:
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        bad = {name: int((~value.isfinite()).sum()) for name, value in named.items()}
        name = next((name for name, count in bad.items() if count), None)
        if name is None:
            return ""
        samples = f"its samples: {shorten(self._names)}; " if self._names else ""
        return (
            f"step {step}: {bad[name]} of {named[name].numel()} values of {name} are not finite on "
            f"process {collectives.rank()} of {collectives.world_size()}; {samples}"
            f"{self.replay(step)}"
        )

    def replay(self, step: int) -> str:
        """Return the command that runs up to a step again, as part of a message."""
        last = self.folder / "last.pt"
        if last.exists():  # of finite weights, see Trainer.save; else the run starts again
            source = shlex.quote(f"resume={last}")
        else:
            folder = shlex.quote(str(self.folder))
            source = f"--config-dir {folder} --config-name config run.dir=null"
        world_size = collectives.world_size()
        start = "python" if world_size == 1 else f"torchrun --nproc-per-node {world_size}"
        return f"to see it again: {start} tools/train.py {source} trainer.stop_at={step}"


def shorten(names: Sequence[str]) -> str:
    """Join names; of many, the first few and a count."""
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


class Overflows:
    """Counts float16 steps whose gradients overflowed, which the scaler skips.

    The counts live on the device; only ``total`` and ``check`` wait for it.

    Args:
        device: That trains.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # (in all, in a row)

    def resume(self, total: int) -> None:
        """Continue from the count of a checkpoint."""
        self._counts[0] = total

    def update(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        """Count a step; call between the scaler's ``step`` and ``update``, which forgets."""
        # Private, but the public way, comparing get_scale() before and after, waits for the device.
        found = scaler._found_inf_per_device(optimizer).values()
        is_skipped = (torch.stack([value.to(self.device) for value in found]).sum() > 0).long()
        total, in_a_row = self._counts
        # A product in the place of an if, which would need the value on the host.
        self._counts = torch.stack([total + is_skipped, (in_a_row + 1) * is_skipped])

    def total(self) -> int:
        """Return how many steps of the run were skipped; wait for the device."""
        return int(self._counts[0])

    def check(self, step: int, last_step: int, replay: str) -> None:
        """End a run that no longer trains; wait for the device.

        Args:
            step: Updates done.
            last_step: Of the run.
            replay: The command that repeats the step, for the message.

        Raises:
            DivergedError: MOST_OVERFLOWS steps in a row were skipped, or all steps of the run.
        """
        total, in_a_row = self._counts.tolist()
        if in_a_row >= MOST_OVERFLOWS or (step == last_step and total == step):
            raise DivergedError(
                f"step {step}: the gradients of the last {in_a_row} steps were too large for "
                "float16, so no weight has changed; set trainer.precision=bfloat16 or float32, or "
                f"lower optimizer.lr; {replay}"
            )
