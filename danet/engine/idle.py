"""Parameters that the loss does not depend on, for which other processes must not wait."""

from copy import deepcopy

import torch
from torch import nn

_SIZE = 64
"""Height and width of the image that is passed."""


def freeze_idle(model: nn.Module, criterion: nn.Module) -> list[str]:
    """Lets parameters that no output depends on have no gradient, and returns their names.

    Some networks of timm have layers behind their last map. DistributedDataParallel would wait for
    their gradients, which never come; alone nothing changes, since they never had one.

    Args:
        model: Trained as a whole; its structure alone is looked at, on the meta device.
        criterion: The loss of the training.
    """
    network, loss = deepcopy(model).to("meta").train(), deepcopy(criterion).to("meta")
    image = torch.empty(2, 3, _SIZE, _SIZE, dtype=torch.uint8, device="meta")
    mask = torch.empty(2, _SIZE, _SIZE, dtype=torch.uint8, device="meta")
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    parameters = [network.get_parameter(name) for name in names]
    total = sum(loss(network(image), mask).values(), start=torch.zeros((), device="meta"))
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    idle = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
    for name in idle:
        model.get_parameter(name).requires_grad_(False)
    return idle
