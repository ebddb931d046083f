"""The network as evaluation runs it: the same function in fewer operations."""

import copy
from itertools import chain, pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from danet.evaluation.winograd import WinogradConv2d
from danet.ops.convolution import WideConv2d

_CONVOLUTIONS = (nn.Conv2d, WideConv2d)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
"""What is replaced; subclasses may compute more, as timm's standardise weights or activate."""


def fuse_for_inference(model: nn.Module, device: torch.device) -> nn.Module:
    """Returns a copy, in eval mode, that computes what the network does up to rounding.

    Batch norms are folded into the convolutions before them, and on a CPU 3x3 convolutions are
    done by Winograd's algorithm. The memory order is the device's, whichever one the training had,
    so that a score does not depend on it. The network itself is not changed. The copy shares its
    tensors, so only the weights that differ cost memory; it is for one evaluation, not for
    training.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    quick = copy.deepcopy(model, shared).eval()
    for module in list(quick.modules()):
        for conv, norm in _pairs(module):
            _fold(module, conv, norm)
    order = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    for module in quick.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = _in_order(module.weight, order)
    if device.type == "cpu":
        for module in list(quick.modules()):
            for name, child in list(module.named_children()):
                if not isinstance(child, nn.Conv2d) or type(child) not in _CONVOLUTIONS:
                    continue
                if WinogradConv2d.takes(child):
                    setattr(module, name, WinogradConv2d(child))
    return quick.eval()


def _in_order(weight: Tensor, order: torch.memory_format) -> nn.Parameter:
    """Returns weights in a memory order, in their own memory where they have it already."""
    ordered = weight.detach().contiguous(memory_format=order)
    # Weights of 1x1 convolutions lie alike in both orders, but torch chooses kernels by strides.
    strides = torch.empty(weight.shape, device="meta", memory_format=order).stride()
    return nn.Parameter(
        ordered.as_strided(weight.shape, strides), requires_grad=weight.requires_grad
    )


def _pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names the children that surely are a convolution and the batch norm of its output.

    Only where the order of calls is known: in a plain Sequential, and in torchvision's blocks.
    """
    names = [name for name, _ in module.named_children()]
    if type(module) is nn.Sequential:
        return list(pairwise(names))
    if type(module).__module__ == "torchvision.models.resnet":
        return [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if f"bn{i}" in names]
    return []


def _fold(module: nn.Module, conv_name: str, norm_name: str) -> None:
    """Replaces a convolution and its batch norm by one convolution, where they are that."""
    conv, norm = getattr(module, conv_name), getattr(module, norm_name)
    if type(conv) not in _CONVOLUTIONS or type(norm) not in _NORMS:
        return
    if norm.running_mean is None or norm.running_var is None:
        return  # it normalises by the image it sees
    fused = fuse_conv_bn_eval(conv, norm)
    setattr(module, conv_name, fused)
    setattr(module, norm_name, nn.Identity())
