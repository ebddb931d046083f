"""The network as evaluation runs it: the same function in fewer operations."""

import copy
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from danet.evaluation.winograd import WinogradConv2d


def fuse_for_inference(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy in eval mode that computes the same function up to rounding.

    Batch norms are folded into the convolutions before them, and on a CPU 3x3 convolutions use
    Winograd's algorithm. The memory format is the device's, whichever one the training had, so
    that a score does not depend on it. The copy is for one evaluation, not for training.
    """
    fused = copy.deepcopy(model).eval()
    for module in list(fused.modules()):
        for conv_name, norm_name in _conv_norm_pairs(module):
            conv, norm = getattr(module, conv_name), getattr(module, norm_name)
            # No subclasses: timm's standardise weights or add an activation. Without running
            # statistics a norm normalises by those of each batch.
            is_known = type(conv) is nn.Conv2d and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
            if is_known and norm.running_mean is not None:
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())  # indices of a Sequential stay
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    for module in list(fused.modules()):
        if isinstance(module, nn.Conv2d):
            # Cloned, since the conversions of torch leave the strides of 1x1 convolutions, by
            # which it chooses kernels.
            weight = module.weight.detach().clone(memory_format=memory_format)
            module.weight = nn.Parameter(weight, requires_grad=False)
        for name, child in list(module.named_children()):
            if device.type == "cpu" and type(child) is nn.Conv2d and WinogradConv2d.supports(child):
                setattr(module, name, WinogradConv2d(child))
    return fused.eval()  # modules made since are in training mode


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
