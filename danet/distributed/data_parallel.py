"""Preparing a network for training on several processes."""

from copy import deepcopy

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def ignore_unused_parameters(model: nn.Module) -> list[str]:
    """Let ``wrap`` ignore the parameters that no output depends on; return their names.

    Some networks of timm have layers behind their last feature map. DistributedDataParallel would
    wait for their gradients, which never come. The search runs on the meta device, without memory;
    a network that cannot run there is left as it is.

    They keep ``requires_grad``, which says what a config freezes, so that an optimizer is over the
    same parameters with any number of processes.
    """
    network = deepcopy(model).to("meta").train()
    # Two images: batch norm in training refuses one value per channel, as after global pooling.
    image = torch.empty(2, 3, 64, 64, dtype=torch.uint8, device="meta")
    try:
        output = network(image)
    except (RuntimeError, NotImplementedError, ValueError):  # an operator without a meta kernel
        return []
    torch.stack([o.sum() for o in (output.logits, *output.auxiliary.values())]).sum().backward()
    trained = (item for item in network.named_parameters() if item[1].requires_grad)
    unused = [name for name, parameter in trained if parameter.grad is None]
    # A prototype in torch; find_unused_parameters, which is public, walks the graph in every step.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, unused)
    return unused


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the network inside DistributedDataParallel, which averages the gradients."""
    wrapped = DistributedDataParallel(
        model,
        # DDP refuses device_ids for modules on the CPU.
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # saves a second copy of all gradients
    )
    # Batch statistics of rank 0 are the ones that count: it saves them, and evaluation broadcasts
    # them. An attribute, since releases of torch differ in the name of the argument.
    wrapped.broadcast_buffers = False
    return wrapped
