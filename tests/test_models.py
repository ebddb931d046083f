"""The network is DANet: sizes, dilations, names of weights, outputs, gradients."""

import copy
import functools
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision

from danet.errors import InputError
from danet.models.heads.deeplab import DeepLabV2Head, DeepLabV3Head
from danet.models.heads.dual import DualAttentionHead, FCNHead, SingleAttentionHead
from danet.models.heads.psanet import PSAHead
from danet.models.heads.pspnet import PyramidPoolingHead
from danet.models.heads.serial import CBAMHead, SerialAttentionHead
from danet.models.resnet import ResNet
from danet.models.segmentor import Segmentor

HEADS = {
    "dual": functools.partial(DualAttentionHead, num_classes=5, reduction=4),
    "concat": functools.partial(
        DualAttentionHead, num_classes=5, reduction=4, fusion="concat", shared_input=True
    ),
    "concat of two": functools.partial(
        DualAttentionHead, num_classes=5, reduction=4, fusion="concat", energy="similarity"
    ),
    "position": functools.partial(
        SingleAttentionHead, num_classes=5, reduction=4, attention="position"
    ),
    "channel": functools.partial(SingleAttentionHead, num_classes=5, attention="channel"),
    "fcn": functools.partial(FCNHead, num_classes=5),
    "deeplab_v2": functools.partial(DeepLabV2Head, num_classes=5),
    "deeplab_v3": functools.partial(DeepLabV3Head, num_classes=5),
    "pspnet": functools.partial(PyramidPoolingHead, num_classes=5),
    "psanet": functools.partial(PSAHead, num_classes=5, mask_size=[4, 5]),
    "cbam": functools.partial(CBAMHead, num_classes=5),
    "serial": functools.partial(SerialAttentionHead, num_classes=5),
}


def small(head, **backbone):
    return Segmentor(ResNet(depth=18, width=8, **backbone), HEADS[head])


@pytest.mark.parametrize(("depth", "total"), [(50, 47_462_651), (101, 66_454_779)])
def test_danet_has_the_published_number_of_parameters(depth, total):
    with torch.device("meta"):
        model = Segmentor(
            ResNet(depth=depth, multi_grid=(4, 8, 16)),
            functools.partial(DualAttentionHead, num_classes=19),
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
    torch.testing.assert_close(ours(x)[-1], torch.nn.Sequential(*children[:-2])(x))


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
            torch.nn.init.ones_(parameter)
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
        functools.partial(DualAttentionHead, num_classes=5, dropout=0.0),
        functools.partial(FCNHead, num_classes=5),
        align_corners=False,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    image = torch.randint(0, 256, (2, 3, 44, 60), dtype=torch.uint8)
    coarse = model(image)
    assert set(coarse.auxiliary) == {"position", "channel", "backbone"}
    assert {x.shape for x in (coarse.logits, *coarse.auxiliary.values())} == {(2, 5, 6, 8)}
    fine = F.interpolate(coarse.logits, (44, 60), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.eval()(image).logits, fine)


# Computing blocks again


def grow(model, steps=2):
    """Goes forward and backward in training; returns gradients and statistics."""
    model.train()
    for step in range(steps):
        torch.manual_seed(step)
        maps = model(torch.randn(2, 3, 64, 48))
        sum(m.square().mean() for m in maps).backward()
    gradients = {f"{n}.grad": p.grad for n, p in model.named_parameters()}
    return {**gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize(("depth", "recompute"), [(18, (1,)), (18, (3, 4)), (50, (1, 2, 3, 4))])
def test_computing_blocks_again_changes_no_bit(depth, recompute):
    model = ResNet(depth=depth, width=8)
    again = copy.deepcopy(model)
    again.recompute = frozenset(recompute)
    wanted, found = grow(model), grow(again)
    assert found.keys() == wanted.keys()
    assert [k for k in wanted if not torch.equal(found[k], wanted[k])] == []
    assert again.bn1.num_batches_tracked == again.layer1[0].bn1.num_batches_tracked == 2


def kept_bytes(model):
    """Returns what autograd keeps of a forward pass, each storage once."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        maps = model.train()(torch.randn(2, 3, 64, 64))
        del maps
    return sum(kept.values()) - sum(p.nbytes for p in model.parameters())


def test_every_stage_computed_again_keeps_less():
    networks = (ResNet(depth=50, width=16, recompute=range(1, last + 1)) for last in range(5))
    sizes = list(map(kept_bytes, networks))
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[4] < sizes[0] / 4


def test_nothing_is_computed_again_where_there_is_no_gradient(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("checkpointed")

    model = ResNet(depth=18, width=8, recompute=[1])
    monkeypatch.setattr("danet.models.resnet.checkpoint", refuse)
    model.eval()(torch.randn(1, 3, 32, 32))
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 32, 32))
    with pytest.raises(AssertionError, match="checkpointed"):
        model(torch.randn(2, 3, 32, 32))


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
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(functools.partial(look, name))
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
