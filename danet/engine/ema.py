"""The exponential moving average of the weights."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class ModelEMA(AveragedModel):
    """Moving average of a network: ``average = decay * average + (1 - decay) * weights``.

    Averages parameters and batch-norm statistics, copies integer buffers. Half of the average stems
    from the last ln 2 / (1 - decay) updates. A copy of the network is the attribute ``module``.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, *, is_first: bool) -> None:
        """Take in the current weights; the first update copies them."""
        # Not update_parameters, which copies its counter to the device and waits for it.
        averages, values = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        # lerp with weight 1 copies bit for bit: the average does not start from random weights.
        weight = 1.0 if is_first else 1.0 - self.decay
        floats = [i for i, average in enumerate(averages) if average.is_floating_point()]
        # A few launches for the 500 tensors of a ResNet-101; lerp of integers does not exist.
        torch._foreach_lerp_([averages[i] for i in floats], [values[i] for i in floats], weight)
        integers = [i for i, average in enumerate(averages) if not average.is_floating_point()]
        if integers:  # batch norm's counters of batches; _foreach refuses an empty list
            torch._foreach_copy_([averages[i] for i in integers], [values[i] for i in integers])
        self.n_averaged.add_(1)
