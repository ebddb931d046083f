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
"""Types that are fused. No subclasses: timm's standardise weights or add an activation."""


def fuse_for_inference(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy in eval mode that computes the same function up to rounding.

    Batch norms are folded into the convolutions before them, and on a CPU 3x3 convolutions use
    Winograd's algorithm. The memory format is the device's, whichever one the training had, so
    that a score does not depend on it. The network itself is not changed. The copy shares its
    tensors, so only the weights that differ cost memory; it is for one evaluation, not for
    training.
    """
    # A memo that maps the id of each tensor to the tensor makes deepcopy share it.
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    fused = copy.deepcopy(model, shared).eval()
    for module in list(fused.modules()):
        for conv, norm in _conv_norm_pairs(module):
            _fold(module, conv, norm)
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    for module in fused.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = _to_memory_format(module.weight, memory_format)
    if device.type == "cpu":
        for module in list(fused.modules()):
            for name, child in list(module.named_children()):
                if not isinstance(child, nn.Conv2d) or type(child) not in _CONVOLUTIONS:
                    continue
                if WinogradConv2d.supports(child):
                    setattr(module, name, WinogradConv2d(child))
    return fused.eval()  # modules made since are in training mode


def _to_memory_format(weight: Tensor, memory_format: torch.memory_format) -> nn.Parameter:
    """Return weights in a memory format, without a copy where they have it already."""
    ordered = weight.detach().contiguous(memory_format=memory_format)
    # Weights of 1x1 convolutions lie alike in both formats, so that ``contiguous`` leaves their
    # strides, but torch chooses kernels by strides. A tensor on "meta" has them without memory.
    strides = torch.empty(weight.shape, device="meta", memory_format=memory_format).stride()
    return nn.Parameter(
        ordered.as_strided(weight.shape, strides), requires_grad=weight.requires_grad
    )


def _conv_norm_pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Return the names of children of which the second is called on the output of the first.

    Only where the order of calls is certain: in a plain Sequential, and in torchvision's blocks.
    """
    names = [name for name, _ in module.named_children()]
    if type(module) is nn.Sequential:
        return list(pairwise(names))
    if type(module).__module__ == "torchvision.models.resnet":
        # ResNet, BasicBlock and Bottleneck call bn{i} on the output of conv{i}.
        return [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if f"bn{i}" in names]
    return []


def _fold(module: nn.Module, conv_name: str, norm_name: str) -> None:
    """Replace a convolution and its batch norm by one convolution; leave all other pairs."""
    conv, norm = getattr(module, conv_name), getattr(module, norm_name)
    if type(conv) not in _CONVOLUTIONS or type(norm) not in _NORMS:
        return
    if norm.running_mean is None or norm.running_var is None:
        return  # without running statistics it normalises by those of each batch
    fused = fuse_conv_bn_eval(conv, norm)
    setattr(module, conv_name, fused)
    setattr(module, norm_name, nn.Identity())  # indices of a Sequential stay
