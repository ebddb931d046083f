"""Ending a run whose loss, weights or gradients are no longer finite."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from danet.distributed import collectives
from danet.errors import DivergedError

CHECK_EVERY = 1000
"""Steps after which losses are checked at the latest; each is a few scalars on the device."""
_SHOWN_NAMES = 8


class NonFiniteGuard:
    """Checks losses and weights, without waiting for the device at every step.

    Losses are kept on the device until ``check``, which waits once. There all processes learn of
    the first loss that is not finite on any of them, so that all end at the same step.

    Args:
        folder: Of the run, for the command in the message.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._steps: list[tuple[int, Sequence[str], Tensor]] = []  # number, samples, loss
        self._names: Sequence[str] = ()
        self._terms: Mapping[str, Tensor] = {}

    def append(self, step: int, names: Sequence[str], terms: Mapping[str, Tensor]) -> None:
        """Keep the loss terms of a step, scalars on the device, and the names of its samples."""
        self._names, self._terms = names, terms
        # detach: a kept loss must not keep the activations of its step.
        loss = torch.stack([term.detach().float() for term in terms.values()]).sum()
        self._steps.append((step, names, loss))

    def check(self) -> dict[str, float]:
        """Return the loss terms of the latest step, averaged over processes; wait for the device.

        All processes call it after the same steps.

        Raises:
            DivergedError: A loss since the last check is not finite on some process. The message
                has the step, the process, its samples, and the command that repeats it.
        """
        steps, self._steps = self._steps, []
        is_bad = ~torch.isfinite(torch.stack([loss for _, _, loss in steps]))
        # 1-based index of the first bad step, 0 if there is none: one number per process, so that
        # a single reduction carries the losses and the verdicts of all processes. argmax takes no
        # bool, and returns the first of equal values.
        first = torch.where(is_bad.any(), is_bad.int().argmax() + 1, 0).float()
        rank, world_size = collectives.rank(), collectives.world_size()
        firsts = torch.zeros(world_size, device=first.device)
        firsts[rank] = first  # a sum in which each process fills its own entry is a gather
        terms = torch.stack([term.detach().float() for term in self._terms.values()])
        values = collectives.sum_of(torch.cat([terms, firsts]), "mean of losses")
        found = [(int(place), r) for r, place in enumerate(values[len(terms) :]) if place]
        if found:
            place, where = min(found)
            step, names, loss = steps[place - 1]
            # Loss and samples are only on the process where it happened.
            value, names = collectives.from_rank(where, (float(loss), names))
            raise DivergedError(
                f"step {step}: the loss is not finite ({value}) on process {where} of "
                f"{world_size}; its samples: {shorten(names)}; {self.replay(step)}"
            )
        return {name: value / world_size for name, value in zip(self._terms, values, strict=False)}

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
