"""The moving average of the weights."""

from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn


class MovingAverage(nn.Module):
    """Exponential moving average of a network: ``average = decay * average + (1 - decay) * now``.

    Weights and batch-norm statistics are averaged; whole numbers are copied. torch's AveragedModel
    gives the same averages and the same names in files, but looks at a counter in every update,
    for which a CUDA device must be waited for.

    Args:
        model: The network; its copy is the attribute ``module``.
        decay: Between 0 and 1; half of the average stems from the last ln 2 / (1 - decay) updates.
    """

    n_averaged: Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = deepcopy(model)
        self.decay = decay
        self.register_buffer("n_averaged", torch.tensor(0))

    @torch.no_grad()
    def update(self, model: nn.Module, *, is_first: bool) -> None:
        """Takes in what the network is now; the first update copies it."""
        averages, values = list(_state(self.module)), list(_state(model))
        weight = 1.0 if is_first else 1.0 - self.decay
        floats = [i for i, average in enumerate(averages) if average.is_floating_point()]
        torch._foreach_lerp_([averages[i] for i in floats], [values[i] for i in floats], weight)
        whole = [i for i, average in enumerate(averages) if not average.is_floating_point()]
        if whole:
            torch._foreach_copy_([averages[i] for i in whole], [values[i] for i in whole])
        self.n_averaged.add_(1)


def _state(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
