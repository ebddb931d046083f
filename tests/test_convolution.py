"""The wide convolution in pieces: the same numbers as torch's, in every place where it stands."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from danet.ops.convolution import WideConv2d

ORDERS = [torch.contiguous_format, torch.channels_last]


def wide(order: torch.memory_format = torch.channels_last) -> tuple[WideConv2d, Tensor]:
    """Returns a convolution that is done in pieces, and an input of odd size."""
    torch.manual_seed(0)
    conv = WideConv2d(1024, 40, 3).to(memory_format=order)
    return conv, torch.randn(2, 1024, 7, 9).to(memory_format=order).requires_grad_()


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def convolved(
    x: Tensor, weight: Tensor, upstream: Tensor, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns torch's convolution of operands rounded to bfloat16, and the gradients of both."""
    operands = [t.detach().bfloat16().to(dtype).requires_grad_() for t in (x, weight)]
    y = F.conv2d(*operands, padding=1)
    return y, torch.autograd.grad(y, operands, upstream.to(dtype))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("autocast", [True, False])
def test_values_and_gradients_are_those_of_a_convolution(order, autocast):
    conv, x = wide(order)
    if not autocast:
        conv, x = conv.bfloat16(), x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = conv(x)
    assert y.dtype == torch.bfloat16
    assert type(y.grad_fn).__name__ != "ConvolutionBackward0", "torch's own"
    assert y.is_contiguous(memory_format=order)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, conv.weight), upstream)
    # The convolution of the rounded operands, in float64: what is left is the rounding of results.
    # That is 1.7e-3, and more where the CPU's kernel rounds partial sums, so torch's own is beside.
    exact, wanted = convolved(x, conv.weight, upstream, torch.float64)
    plain, theirs = convolved(x, conv.weight, upstream, torch.bfloat16)
    assert relative(y, exact) < max(3e-3, 1.5 * relative(plain, exact))
    for mine, own, right, like in zip(found, theirs, wanted, (x, conv.weight), strict=True):
        assert mine.dtype == like.dtype
        assert relative(own, right) < 2e-2, "no kernel is as bad as that"
        assert relative(mine, right) < max(3e-3, 1.5 * relative(own, right))


@pytest.mark.parametrize("wanted", ["input", "weight"])
def test_either_gradient_can_be_had_alone(wanted):
    conv, x = wide()
    conv.weight.requires_grad_(wanted == "weight")
    x.requires_grad_(wanted == "input")
    with torch.autocast("cpu", torch.bfloat16):
        conv(x).float().sum().backward()
    assert (x.grad is None) == (wanted == "weight")
    assert (conv.weight.grad is None) == (wanted == "input")


def test_whatever_is_not_wide_or_not_bfloat16_is_torchs_own():
    conv, x = wide()
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, padding=1))
    narrow = WideConv2d(64, 8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert type(narrow(x[:, :64]).grad_fn).__name__ == "ConvolutionBackward0"


def test_a_folded_batch_norm_keeps_its_bias():
    conv, x = wide()
    norm = torch.nn.BatchNorm2d(40)
    torch.nn.init.normal_(norm.bias)
    folded = fuse_conv_bn_eval(conv.eval(), norm.eval())
    with torch.inference_mode():
        right = norm(conv(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(folded(x), right) < 1e-2


def test_shapes_are_known_without_storage():
    conv, x = wide()
    with torch.autocast("cpu", torch.bfloat16):
        assert conv.to("meta")(x.to("meta")).shape == (2, 40, 7, 9)
