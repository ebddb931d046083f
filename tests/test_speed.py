"""The network that evaluation runs is the network: in float64 terms, with everything in place."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from danet.engine.precision import choose_memory_format
from danet.evaluation.fuse import WinogradConv2d, fuse_for_inference
from danet.models.heads.dual import DualAttentionHead
from danet.models.resnet import ResNet
from danet.models.segmentor import Segmentor

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("size", "dilation"),
    [((16, 16), 1), ((17, 33), 2), ((40, 24), 3), ((48, 97), 4), ((33, 40), 1)],
)
def test_winograd_is_the_convolution(size, dilation):
    bias = size[0] % 2 == 0
    conv = nn.Conv2d(128, 136, 3, padding=dilation, dilation=dilation, bias=bias)
    conv.requires_grad_(False)
    x = torch.randn(2, 128, *size)
    offset = None if conv.bias is None else conv.bias.double()
    wanted = F.conv2d(x.double(), conv.weight.double(), offset, padding=dilation, dilation=dilation)
    for order in (torch.contiguous_format, torch.channels_last):
        got = WinogradConv2d(conv)(x.contiguous(memory_format=order))
        # Measured: 2.5e-5 on every kind of CPU; a wrong coefficient is off by 1e-2 and more.
        assert (got - wanted).abs().max() < 1e-4 * wanted.std()


def test_winograd_is_done_where_it_pays():
    conv = nn.Conv2d(128, 128, 3, padding=4, dilation=4).requires_grad_(False)
    quick = WinogradConv2d(conv)
    large, small = torch.randn(1, 128, 32, 32), torch.randn(1, 128, 5, 70)
    assert torch.equal(quick(small), conv(small)), "16 rows for 5 are no gain"
    assert not torch.equal(quick(large), conv(large))
    wide = quick.double()(large.double())
    torch.testing.assert_close(wide, conv.double()(large.double()), atol=0, rtol=0)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(128, 128, 1),
        nn.Conv2d(128, 128, 3),
        nn.Conv2d(128, 128, 3, padding=1, stride=2),
        nn.Conv2d(128, 128, 3, padding=1, groups=2),
        nn.Conv2d(128, 128, 3, padding=1, dilation=2),
        nn.Conv2d(128, 128, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(128, 128, 3, padding="same"),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.Conv2d(128, 128, 3, padding=1, dtype=torch.float64),
    ],
    ids=str,
)
def test_winograd_leaves_other_convolutions_alone(conv):
    assert not WinogradConv2d.supports(conv)


@pytest.fixture(params=[18, pytest.param(50, marks=pytest.mark.slow)])
def danet(request):
    """A network with channels enough for Winograd, statistics as if trained, and loud logits."""
    head = partial(DualAttentionHead, num_classes=5, channels=128)
    network = Segmentor(ResNet(depth=request.param, width=64), head)
    for module in network.modules():
        if hasattr(module, "gamma"):
            nn.init.constant_(module.gamma, 0.7)
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.3, 0.8)
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.1)
    return network.eval().requires_grad_(False)


def test_the_prepared_network_says_the_same(danet):
    image = torch.randint(0, 256, (1, 3, 12, 16), dtype=torch.uint8)
    image = image.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    danet.head.classify[-1].bias.zero_()
    danet.head.classify[-1].weight.mul_(3 / danet(image).logits.std())
    quick = fuse_for_inference(danet, CPU)
    kinds = [type(module) for module in quick.modules()]
    assert kinds.count(nn.BatchNorm2d) == 1, "the stem's, whose place no rule knows"
    assert kinds.count(WinogradConv2d) > 5
    plain, got = danet(image).logits, quick(image).logits
    exact = danet.double()(image).logits
    assert exact.std() > 2
    assert (got - exact).abs().max() < max(5 * (plain - exact).abs().max(), 5e-5)
    assert (got.double().softmax(dim=1) - exact.softmax(dim=1)).abs().max() < 5e-5


def test_preparing_changes_nothing_and_forgets_the_memory_order_of_the_training(danet):
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    plain = fuse_for_inference(danet, CPU)(image).logits
    turned = danet.train().to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in turned.state_dict().items()}
    quick = fuse_for_inference(turned, CPU)
    assert torch.equal(quick(image).logits, plain)
    assert turned.training
    assert not any(module.training for module in quick.modules())
    assert [type(module) for module in turned.modules()].count(WinogradConv2d) == 0
    assert turned.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for name, value in turned.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("setting", "device", "dtype", "is_last"),
    [
        (None, "cpu", torch.float32, False),
        (None, "cpu", torch.bfloat16, True),
        (None, "ampere", torch.float32, True),
        (None, "turing", torch.float32, False),
        (None, "turing", torch.float16, True),
        (True, "cpu", torch.float32, True),
        (False, "cuda", torch.bfloat16, False),
    ],
)
def test_the_memory_order_follows_the_arithmetic(monkeypatch, setting, device, dtype, is_last):
    capability = {"ampere": (8, 0), "turing": (7, 5)}.get(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = "cuda" if capability else device
    order = torch.channels_last if is_last else torch.contiguous_format
    assert choose_memory_format(setting, torch.device(device), dtype) == order


class InAnotherOrder(nn.Module):
    """Its batch norm stands beside its convolution, but is called before it."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 1)
        self.bn1 = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.conv1(self.bn1(x))


def test_only_what_surely_follows_a_convolution_is_folded():
    unknown = InAnotherOrder()
    stray = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    moody = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    known = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    network = nn.Sequential(unknown, stray, moody, known).requires_grad_(False)
    for norm in (unknown.bn1, stray[2], known[1]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    quick = fuse_for_inference(network, CPU)
    left = [name for name, m in quick.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert left == ["0.bn1", "1.2", "2.1"]
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(quick(x), network.eval()(x))
