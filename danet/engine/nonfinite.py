"""Ending a run whose loss, weights or gradients are no longer finite."""

import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from danet.distributed import collectives
from danet.errors import DivergedError

CHECK_EVERY = 1000  # steps between checks of losses, at most; each is some scalars on the device
_SHOWN_NAMES = 8


class NonFiniteGuard:
    """Checks losses and weights, without waiting for the device at every step.

    Losses are kept on the device until ``check``, which waits once. There all processes learn of
    the first loss that is not finite on any of them, so that all end at the same step.
    ``folder`` is that of the run, for the command in the message.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._steps: list[tuple[int, Sequence[str], Mapping[str, Tensor]]] = []
        self._names: Sequence[str] = ()

    def append(self, step: int, names: Sequence[str], terms: Mapping[str, Tensor]) -> None:
        """Keep the detached loss terms of a step, scalars on the device, and its samples' names."""
        self._names = names
        self._steps.append((step, names, terms))

    def check(self) -> dict[str, float]:
        """Return the loss terms of the latest step, averaged over processes; wait for the device.

        Raises DivergedError if a loss since the last check is not finite on some process.
        """
        steps, self._steps = self._steps, []
        losses = torch.stack([torch.stack([*terms.values()]) for _, _, terms in steps])
        sums = zip(steps, losses.sum(1).tolist(), strict=True)
        bad = next(((step, names, x) for (step, names, _), x in sums if not math.isfinite(x)), None)
        # One reduction carries the latest losses and the number of processes that found a bad one.
        # In float64: of another size than the float32 sums of a step, it is noticed when a process
        # is at another exchange than this one.
        totals = torch.cat([losses[-1], losses.new_tensor([bad is not None])]).double()
        collectives.sum_in_place(totals, "mean of losses")
        *sums_of_all, diverged = totals.tolist()
        if diverged:
            everywhere = enumerate(collectives.gather(bad))
            step, rank, names, loss = min((b[0], rank, *b[1:]) for rank, b in everywhere if b)
            what = f"the loss is not finite ({loss})"
            raise DivergedError(self._message(step, what, names, rank))
        world_size = collectives.world_size()
        return {n: x / world_size for n, x in zip(steps[-1][2], sums_of_all, strict=True)}

    def require_finite(self, model: nn.Module, step: int, *, on_all: bool) -> None:
        """Raise DivergedError if a weight or statistic is not finite; wait for the device.

        With ``on_all`` all processes call this now, and all raise if one finds something.
        """
        problem = ""
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if not problem and (count := int((~tensor.isfinite()).sum())):
                what = f"{count} of {tensor.numel()} values of {name} are not finite"
                problem = self._message(step, what, self._names, collectives.rank())
        # After a signal the others may have died, so a gather could wait in vain.
        for found in collectives.gather(problem) if on_all else [problem]:
            if found:
                raise DivergedError(found)

    def _message(self, step: int, what: str, names: Sequence[str], rank: int) -> str:
        where = f"step {step}: {what} on process {rank} of {collectives.world_size()}"
        more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
        samples = f"; its samples: {', '.join(names[:_SHOWN_NAMES])}{more}" if names else ""
        return f"{where}{samples}; {self.replay(step)}"

    def replay(self, step: int) -> str:
        """Return the command that runs up to a step again, as part of a message."""
        last, processes = self.folder / "last.pt", collectives.world_size()
        if last.exists():  # of finite weights, see Trainer.save; else the run starts again
            source = shlex.quote(f"resume={last}")
        else:
            folder = shlex.quote(str(self.folder))
            source = f"--config-dir {folder} --config-name config run.dir=null"
        several = f" run.processes={processes}" if processes > 1 else ""
        return f"to see it again: python tools/train.py {source} trainer.stop_at={step}{several}"
