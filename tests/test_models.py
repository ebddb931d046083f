"""The network is DANet, other heads compute their formulas, and evaluation runs the same."""

import re
from contextlib import nullcontext
from functools import partial
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import no_waiting
from test_config import compose
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from danet.config.build import make_model
from danet.config.validate import check
from danet.distributed.sync_batchnorm import SyncBatchNorm, convert_sync_batchnorm
from danet.engine.precision import choose_memory_format, choose_precision
from danet.errors import InputError
from danet.evaluation.fuse import WinogradConv2d, fuse_for_inference
from danet.models.heads.deeplab import DeepLabV2Head, DeepLabV3Head
from danet.models.heads.dual import DualAttentionHead, FCNHead, SingleAttentionHead
from danet.models.heads.psanet import PointwiseAttention, PSAHead
from danet.models.heads.pspnet import PyramidPoolingHead
from danet.models.heads.serial import CBAMHead, ConvolutionalAttention, SerialAttentionHead
from danet.models.resnet import ResNet
from danet.models.segmentor import Segmentor

CPU = torch.device("cpu")
HEADS = {
    "dual": (DualAttentionHead, {"reduction": 4}),
    "concat": (DualAttentionHead, {"reduction": 4, "fusion": "concat", "shared_input": True}),
    "concat of two": (DualAttentionHead, {"fusion": "concat", "energy": "similarity"}),
    "position": (SingleAttentionHead, {"reduction": 4, "attention": "position"}),
    "channel": (SingleAttentionHead, {"attention": "channel"}),
    "fcn": (FCNHead, {}),
    "deeplab_v2": (DeepLabV2Head, {}),
    "deeplab_v3": (DeepLabV3Head, {}),
    "pspnet": (PyramidPoolingHead, {}),
    "psanet": (PSAHead, {"mask_size": [4, 5]}),
    "cbam": (CBAMHead, {}),
    "serial": (SerialAttentionHead, {}),
}


def small(head):
    kind, options = HEADS[head]
    return Segmentor(ResNet(depth=18, width=8), partial(kind, num_classes=5, **options))


@pytest.mark.parametrize(("depth", "total"), [(50, 47_462_651), (101, 66_454_779)])
def test_danet_has_the_published_number_of_parameters(depth, total):
    with torch.device("meta"):
        model = Segmentor(
            ResNet(depth=depth, multi_grid=(4, 8, 16)),
            partial(DualAttentionHead, num_classes=19),
        )
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_with_torchvisions_weights_it_computes_at_stride_32_what_torchvision_computes(
    depth, tmp_path
):
    reference = torchvision.models.get_model(f"resnet{depth}").eval()
    torch.save(reference.state_dict(), tmp_path / "w.pth")
    ours = ResNet(depth=depth, output_stride=32, weights=str(tmp_path / "w.pth")).eval()
    assert set(reference.state_dict()) - set(ours.state_dict()) == {"fc.weight", "fc.bias"}
    x, children = torch.randn(1, 3, 32, 64), list(reference.children())
    torch.testing.assert_close(ours(x)[-1], nn.Sequential(*children[:-2])(x))


def dilations(model, stage, name):
    return [getattr(block, name).dilation[0] for block in getattr(model, stage)]


def test_dilations_are_those_of_the_released_code():
    with torch.device("meta"):
        plain = ResNet(depth=50)
        grid = ResNet(depth=50, multi_grid=(4, 8, 16))
    assert dilations(plain, "layer3", "conv2") == [1, 2, 2, 2, 2, 2]
    assert dilations(plain, "layer4", "conv2") == [2, 4, 4]
    assert dilations(grid, "layer4", "conv2") == [4, 8, 16]
    assert [b.conv2.stride[0] for b in plain.layer2] == [2, 1, 1, 1]
    assert [b.conv2.stride[0] for b in plain.layer3] == [1] * 6


def test_a_dilated_network_samples_the_strided_one():
    """À trous: at every second position, stride 16 gives what stride 32 gives.

    In float64, since kernels for a dilation may round otherwise than those for a stride.
    """
    torch.manual_seed(3)
    strided = ResNet(depth=18, width=8, output_stride=32).eval().double()
    dilated = ResNet(depth=18, width=8, output_stride=16).eval().double()
    dilated.load_state_dict(strided.state_dict())
    x = torch.randn(1, 3, 128, 160, dtype=torch.float64)
    torch.testing.assert_close(dilated(x)[-1][..., ::2, ::2], strided(x)[-1])


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("stem", ["7x7", "64-64-128", "32-32-64"])
def test_maps_have_the_promised_sizes(stride, stem):
    with torch.device("meta"):
        model = ResNet(depth=50, output_stride=stride, stem=stem)
        maps = model(torch.empty(1, 3, 256, 320))
    assert [m.shape[1] for m in maps] == model.channels == [256, 512, 1024, 2048]
    assert maps[-1].shape[-2:] == (256 // stride, 320 // stride)


@pytest.mark.parametrize("head", HEADS)
def test_images_may_have_any_size_and_every_parameter_gets_a_gradient(head):
    """An unused parameter would stop distributed training."""
    model = small(head)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
    output = model(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    (output.logits.sum() + sum(t.square().sum() for t in output.auxiliary.values())).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    for size in ((33, 47), (1, 1)):
        output = model.eval()(torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8))
        assert output.logits.shape == (2, 5, *size)
        assert output.auxiliary == {}


def test_in_training_logits_have_the_size_of_the_map_and_are_upsampled_in_evaluation():
    model = Segmentor(
        ResNet(depth=18, width=8),
        partial(DualAttentionHead, num_classes=5, dropout=0.0),
        partial(FCNHead, num_classes=5),
        align_corners=False,
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    image = torch.randint(0, 256, (2, 3, 44, 60), dtype=torch.uint8)
    coarse = model(image)
    assert set(coarse.auxiliary) == {"position", "channel", "backbone"}
    assert {x.shape for x in (coarse.logits, *coarse.auxiliary.values())} == {(2, 5, 6, 8)}
    fine = F.interpolate(coarse.logits, (44, 60), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.eval()(image).logits, fine)


# Computing blocks again


# Memory order


@pytest.mark.parametrize("head", ["fcn", "dual"])
def test_channels_last_reaches_every_convolution(head):
    """A turned map costs two copies, there and back."""
    model = small(head).train().to(memory_format=torch.channels_last)
    turned = []

    def look(name, module, inputs, output):
        for kind, x in (("into", inputs[0]), ("out of", output)):
            if not x.is_contiguous(memory_format=torch.channels_last):
                turned.append(f"{kind} {name}")

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(partial(look, name))
    image = torch.randint(0, 256, (2, 3, 64, 72), dtype=torch.uint8)
    model(image.contiguous(memory_format=torch.channels_last))
    assert turned == []


def test_bytes_and_floats_are_the_same_picture():
    model, image = small("dual").eval(), torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)
    torch.testing.assert_close(model(image).logits, model(image.float()).logits)
    normal = model.normalise(torch.tensor([124.0, 116.0, 104.0]).view(1, 3, 1, 1))
    assert normal.abs().max() < 0.01


def test_weights_that_cannot_be_downloaded_are_reported_with_their_address(monkeypatch):
    def refuse(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    message = r"https://.*resnet18.*\.pth could not be .*no route.*=FILE"
    with pytest.raises(InputError, match=message):
        ResNet(depth=18, weights="IMAGENET1K_V1")


# Heads of other papers, written out slowly


def stirred(module):
    """Returns a module in eval mode whose norms and gammas do something."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_var.uniform_(0.5, 1.5)
            part.weight.data.uniform_(0.3, 0.8)
            for tensor in (part.running_mean, part.bias.data):
                tensor.normal_(0, 0.1)
        if hasattr(part, "gamma"):
            nn.init.constant_(part.gamma, 0.7)
    return module.eval().requires_grad_(False)


def test_deeplab_v2_is_a_sum_of_dilated_classifiers():
    head = stirred(DeepLabV2Head(16, 5, rates=(2, 3)))
    x = torch.randn(2, 16, 9, 11)
    expected = sum(
        F.conv2d(x, part.weight, part.bias, padding=rate, dilation=rate)
        for part, rate in zip(head.classify, (2, 3), strict=True)
    )
    torch.testing.assert_close(head(x)["main"], expected, rtol=1e-4, atol=1e-5)


def test_deeplab_v3_computes_what_torchvision_computes():
    theirs = stirred(DeepLabHead(64, 5, (2, 4, 6)))
    ours = DeepLabV3Head(64, 5, rates=(2, 4, 6), channels=256).eval()
    names = {"0.": "pyramid.", "1.": "refine.0.", "2.": "refine.1.", "4.": "classify.1."}
    ours.load_state_dict({names[k[:2]] + k[2:]: v for k, v in theirs.state_dict().items()})
    x = torch.randn(2, 64, 9, 11)
    torch.testing.assert_close(ours(x)["main"], theirs(x))


def test_pyramid_pooling_is_that_of_averages_over_cells():
    head = stirred(PyramidPoolingHead(24, 5, bins=(1, 2, 3)))
    x = torch.randn(2, 24, 12, 18)
    parts = [x]
    for level, size in zip(head.levels, (1, 2, 3), strict=True):
        cells = x.view(2, 24, size, 12 // size, size, 18 // size).mean(dim=(3, 5))
        pooled = level[1](cells)
        parts.append(F.interpolate(pooled, (12, 18), mode="bilinear", align_corners=True))
    assert [p.shape[1] for p in parts] == [24, 8, 8, 8]
    expected = head.classify(head.join(torch.cat(parts, dim=1)))
    torch.testing.assert_close(head(x)["main"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask_size", [(5, 6), (3, 3)], ids=["reaches everywhere", "is smaller"])
def test_point_wise_attention_is_the_two_sums_over_offsets(mask_size):
    height, width, channels = 4, 6, 8
    attention = stirred(PointwiseAttention(channels, mask_size))
    x = torch.randn(2, channels, height, width)
    tall, wide = mask_size
    expected = torch.zeros(2, 2 * channels, height, width)
    places = [(y, z) for y in range(height) for z in range(width)]
    # The over-complete map of each position, with the offset 0 in the middle.
    collect, distribute = (
        predict(x).view(2, 2 * tall - 1, 2 * wide - 1, height, width)
        for predict in (attention.collect, attention.distribute)
    )

    def weight(maps, of, to):
        return maps[:, to[0] - of[0] + tall - 1, to[1] - of[1] + wide - 1, of[0], of[1]]  # (B,)

    for i in places:
        near = [j for j in places if abs(i[0] - j[0]) < tall and abs(i[1] - j[1]) < wide]
        heard = torch.stack([weight(collect, i, j) for j in near]).softmax(dim=0)
        spoken = torch.stack([weight(distribute, j, i) for j in near]).softmax(dim=0)
        features = torch.stack([x[:, :, j[0], j[1]] for j in near])  # (near, B, C)
        for half, weights in ((slice(channels), heard), (slice(channels, None), spoken)):
            expected[:, half, i[0], i[1]] = (weights[..., None] * features).sum(dim=0)
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def test_cbam_is_its_two_gates():
    attention = stirred(ConvolutionalAttention(32, 8))
    x = torch.randn(2, 32, 6, 9)
    first, second = attention.perceptron[0], attention.perceptron[2]

    def perceptron(values):  # (B, C)
        hidden = (values @ first.weight.flatten(1).T + first.bias).relu()
        return hidden @ second.weight.flatten(1).T + second.bias

    pooled = x.flatten(2)
    gate = torch.sigmoid(perceptron(pooled.mean(dim=2)) + perceptron(pooled.amax(dim=2)))
    expected = x * gate[:, :, None, None]
    maps = torch.stack((expected.mean(dim=1), expected.amax(dim=1)), dim=1)
    where = F.conv2d(maps, attention.locate.weight, attention.locate.bias, padding=3)
    expected = expected * torch.sigmoid(where)
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


# timm


def test_a_network_of_timm_is_a_backbone(tmp_path):
    timm = pytest.importorskip("timm", reason="the optional extra danet[timm] is not installed")
    settings = ("model/backbone=timm", "model.backbone.name=resnet18", "model/head=fcn")
    model = make_model(check(compose(*settings))).eval()
    assert model.backbone.channels == [64, 128, 256, 512]
    maps = model.backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (8, 12), (8, 12)]
    trained = timm.create_model("resnet18")
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    weights = f"model.backbone.weights={tmp_path / 'w.pth'}"
    model = make_model(check(compose(*settings, weights)))
    assert torch.equal(model.backbone.network.conv1.weight, trained.conv1.weight)
    torch.save({"conv1.weight": trained.conv1.weight}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"does not fit: .*missing: bn1\.weight"):
        make_model(check(compose(*settings, weights)))


def test_a_network_of_timm_gets_images_normalised_as_its_weights_want_them():
    pytest.importorskip("timm", reason="the optional extra danet[timm] is not installed")
    settings = ("model/backbone=timm", "model/head=fcn")
    for name, mean, std in (
        ("tf_efficientnet_b0.ap_in1k", [127.5] * 3, [127.5] * 3),
        ("resnet18.a1_in1k", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    ):
        model = make_model(check(compose(*settings, f"model.backbone.name={name}")))
        torch.testing.assert_close(model.mean.flatten(), torch.tensor(mean))
        torch.testing.assert_close(model.std.flatten(), torch.tensor(std))
    own = ("+model.mean=[1,2,3]", "model.backbone.name=tf_efficientnet_b0.ap_in1k")
    assert make_model(check(compose(*settings, *own))).mean.flatten().tolist() == [1, 2, 3]


def test_evaluation_leaves_layers_of_timm_that_compute_more_as_they_are():
    layers = pytest.importorskip("timm.layers", reason="danet[timm] is not installed")
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), layers.BatchNormAct2d(8)),
        nn.Sequential(layers.StdConv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)),
        nn.Conv2d(16, 16, 3, padding=1),
    ).eval()
    x = torch.randn(2, 3, 24, 40)
    torch.testing.assert_close(fuse_for_inference(network, CPU)(x), network(x))


def test_batch_norms_of_timm_keep_their_activations_with_several_processes():
    layers = pytest.importorskip("timm.layers", reason="danet[timm] is not installed")
    network = nn.Sequential(nn.Conv2d(3, 8, 3), layers.BatchNormAct2d(8), nn.BatchNorm2d(8)).eval()
    x = torch.randn(2, 3, 24, 40)
    expected, weights = network(x), network.state_dict()
    together = convert_sync_batchnorm(network)
    assert torch.equal(together(x), expected)
    assert together.state_dict().keys() == weights.keys()
    norms = [m for m in together.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [isinstance(norm, SyncBatchNorm) for norm in norms] == [True, True]


# The network that evaluation runs


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
    return stirred(Segmentor(ResNet(depth=request.param, width=64), head))


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
    ("setting", "dtype", "tf32", "is_last"),
    [
        (None, torch.float32, False, False),
        (None, torch.float32, True, True),
        (None, torch.bfloat16, False, True),
        (True, torch.float32, False, True),
        (False, torch.float16, False, False),
    ],
)
def test_the_memory_order_follows_the_arithmetic(setting, dtype, tf32, is_last):
    order = torch.channels_last if is_last else torch.contiguous_format
    assert choose_memory_format(setting, dtype, tf32=tf32) == order


@pytest.mark.parametrize(
    ("flags", "maker", "is_fast"),
    [
        ("amx_tile avx512_bf16 avx512_fp16", "Intel", True),
        ("avx512_bf16", "Intel", True),
        ("avx512_bf16", "AMD", True),
        ("avx512_bf16 avx512_fp16", "Intel", False),  # its tiles are hidden by a virtual machine
        ("avx512_bf16 avx512_fp16", "AMD", True),
        ("", "AMD", False),
    ],
)
def test_bfloat16_is_chosen_where_it_is_fast(monkeypatch, flags, maker, is_fast):
    found = {"avx512_fp16": "avx512_fp16" in flags, "cpu_name": maker}
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx_tile" in flags)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512_bf16" in flags)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert choose_precision("auto", CPU) == (torch.bfloat16 if is_fast else torch.float32)


def test_tf32_needs_a_device_that_has_it(monkeypatch):
    with pytest.raises(
        InputError, match=r"trainer\.precision=tf32 needs .* from Ampere on; use .*float32"
    ):
        choose_precision("tf32", CPU)
    for capability in ((7, 5), (8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        refused = pytest.raises(InputError) if capability < (8, 0) else nullcontext()
        with refused:
            assert choose_precision("tf32", torch.device("cuda")) == torch.float32


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


@pytest.mark.parametrize(
    ("scaled", "is_said"),
    [
        (lambda x: x / 255, True),
        (lambda x: (x / 255 - 0.5) / 0.25, True),
        (lambda x: x, False),
        (lambda x: x.to(torch.uint8), False),
        (lambda x: 0 * x, False),
        (lambda x: x - 20, False),  # odd, but no sign of scaling
    ],
    ids=["unit", "normalised", "right", "bytes", "black", "shifted"],
)
def test_scaled_pixels_are_warned_of_once_for_each_network(scaled, is_said):
    image = torch.randint(0, 256, (1, 3, 32, 32)).float()
    for _ in range(2):
        model = small("fcn").eval()
        model(image)  # what was right before proves nothing
        with (
            pytest.warns(UserWarning, match="normalises them itself")
            if is_said
            else nullcontext() as said
        ):
            model(scaled(image))
            model(scaled(image))
        if is_said:
            assert len(said) == 1
            assert said[0].filename == __file__


def test_the_look_at_pixels_costs_a_training_and_programs_nothing():
    """No number is read in a training step, of fake tensors, or of a program."""
    model, image = small("fcn"), torch.rand(2, 3, 32, 32)
    with no_waiting():
        model.train()(image)
    model.eval()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(image))
    with torch.device("meta"):
        model.to("meta")(torch.empty(2, 3, 32, 32))
    program = torch.export.export(small("fcn").eval(), (image,)).module()
    assert program(image).logits.shape == (2, 5, 32, 32)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(3, 32, 32),
        torch.zeros(2, 32, 32, 3),
        torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 4, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 3, 32, 32, dtype=torch.int64),
        torch.zeros(2, 3, 32, 32, dtype=torch.bool),
        torch.zeros(1, 3, 0, 5),
    ],
    ids=lambda wrong: f"{wrong.dtype}-{list(wrong.shape)}",
)
@pytest.mark.parametrize("is_training", [False, True])
def test_what_is_no_batch_of_images_is_refused_in_one_line(wrong, is_training):
    found = re.escape(f"found {wrong.dtype} {tuple(wrong.shape)}, expected RGB images (B, 3, H, W)")
    with pytest.raises(ValueError, match=f"^{found}.*$"):
        small("fcn").train(is_training)(wrong)


@pytest.mark.parametrize("wrong", ["a.jpg", np.zeros((32, 32, 3), np.uint8)], ids=["path", "array"])
def test_a_network_says_what_takes_paths_and_arrays(wrong):
    with pytest.raises(ValueError, match=r"found .*, expected RGB images .*; danet.predict\(model"):
        small("fcn").eval()(wrong)
