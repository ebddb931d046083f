"""Parameters that no output depends on, for whose gradients other processes must not wait."""

from copy import deepcopy

import torch
from torch import nn

_SIZE = 64
"""Height and width of the image that is passed."""


def freeze_idle(model: nn.Module) -> list[str]:
    """Lets parameters that no output depends on have no gradient, and returns their names.

    Some networks of timm have layers behind their last map. DistributedDataParallel would wait for
    their gradients, which never come; alone nothing changes, since they never had one. A network
    that cannot be looked at on the meta device, without data, is left as it is.

    Args:
        model: Gives a SegmentationOutput; all of it enters the loss.
    """
    network = deepcopy(model).to("meta").train()
    image = torch.empty(2, 3, _SIZE, _SIZE, dtype=torch.uint8, device="meta")
    try:
        output = network(image)
    except (RuntimeError, NotImplementedError, ValueError):
        return []
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    parameters = [network.get_parameter(name) for name in names]
    total = torch.stack([o.sum() for o in (output.logits, *output.auxiliary.values())]).sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    idle = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
    for name in idle:
        model.get_parameter(name).requires_grad_(False)
    return idle
