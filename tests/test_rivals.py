"""The heads of other papers compute their formulas, written out slowly here."""

import pytest
import torch
import torch.nn.functional as F
from test_config import compose
from torch import nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from danet.config.build import make_model
from danet.config.validate import check
from danet.distributed import data_parallel
from danet.errors import InputError
from danet.evaluation.fuse import fuse_for_inference
from danet.models.heads.deeplab import DeepLabV2Head, DeepLabV3Head
from danet.models.heads.psanet import PointwiseAttention
from danet.models.heads.pspnet import PyramidPoolingHead
from danet.models.heads.serial import ConvolutionalAttention, SerialAttentionHead

K = 5


def stirred(module):
    """Returns a module in eval mode whose norms and gammas do something."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 2)
        if hasattr(part, "gamma"):
            nn.init.constant_(part.gamma, 0.7)
    return module.eval().requires_grad_(False)


def test_deeplab_v2_is_a_sum_of_dilated_classifiers():
    head = stirred(DeepLabV2Head(16, K, rates=(2, 3)))
    x = torch.randn(2, 16, 9, 11)
    expected = torch.zeros(2, K, 9, 11)
    for classify, rate in zip(head.classify, (2, 3), strict=True):
        for i in range(3):
            for j in range(3):  # tap by tap: the input moved, times a matrix
                padded = F.pad(x, (rate, rate, rate, rate))
                moved = padded[:, :, i * rate : i * rate + 9, j * rate : j * rate + 11]
                expected += torch.einsum("kc,bchw->bkhw", classify.weight[:, :, i, j], moved)
        expected += classify.bias.view(1, K, 1, 1)
    torch.testing.assert_close(head(x)["main"], expected, rtol=1e-4, atol=1e-5)


def test_deeplab_v3_computes_what_torchvision_computes():
    theirs = stirred(DeepLabHead(64, K, (2, 4, 6)))
    ours = DeepLabV3Head(64, K, rates=(2, 4, 6), channels=256).eval()
    names = {"0.": "pyramid.", "1.": "refine.0.", "2.": "refine.1.", "4.": "classify.1."}
    ours.load_state_dict({names[k[:2]] + k[2:]: v for k, v in theirs.state_dict().items()})
    x = torch.randn(2, 64, 9, 11)
    torch.testing.assert_close(ours(x)["main"], theirs(x))


def test_pyramid_pooling_is_that_of_averages_over_cells():
    head = stirred(PyramidPoolingHead(24, K, bins=(1, 2, 3)))
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


def test_serial_attention_is_position_attention_of_channel_attention():
    head = stirred(SerialAttentionHead(64, K, reduction=2))
    channel, position = head.branch.attention
    x = torch.randn(2, 64, 5, 7)
    expected = head.classify(head.branch.refine(position(channel(head.branch.reduce(x)))))
    torch.testing.assert_close(head(x)["main"], expected)
    assert channel.gamma == position.gamma == pytest.approx(0.7)


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
    torch.testing.assert_close(fuse_for_inference(network, torch.device("cpu"))(x), network(x))


def test_batch_norms_of_timm_keep_their_activations_with_several_processes():
    layers = pytest.importorskip("timm.layers", reason="danet[timm] is not installed")
    network = nn.Sequential(nn.Conv2d(3, 8, 3), layers.BatchNormAct2d(8), nn.BatchNorm2d(8)).eval()
    x = torch.randn(2, 3, 24, 40)
    expected, weights = network(x), network.state_dict()
    together = data_parallel.convert_sync_batchnorm(network)
    assert torch.equal(together(x), expected)
    assert together.state_dict().keys() == weights.keys()
    norms = [m for m in together.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [isinstance(norm, nn.SyncBatchNorm) for norm in norms] == [True, True]
