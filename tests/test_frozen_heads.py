"""Heads on kept features are trained and scored as they are in the whole network."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, call
from test_reproduce import script
from torch import nn

from danet.checkpoint import format as checkpoint_format
from danet.config.build import load_model, make, make_model
from danet.errors import InputError
from danet.models.timm_backbone import TimmBackbone

frozen = script("frozen_heads")


@pytest.fixture
def settings(tmp_path):
    return [
        *(text for text in TINY if not text.startswith("trainer.eval_every")),
        *("model.backbone.freeze=all", "trainer.steps=3", "frozen.label_step=1"),
        f"frozen.kept={tmp_path / 'kept'}",
    ]


def test_scores_are_those_of_the_tool_and_the_losses_fall(settings, tmp_path, capsys):
    folder = tmp_path / "run"
    changed = [text for text in settings if "steps" not in text]
    frozen.main([*changed, "trainer.steps=40", "optimizer.lr=0.01", f"run.dir={folder}"])
    said = capsys.readouterr().out
    found = frozen.train([*changed, "trainer.steps=40", "optimizer.lr=0.01"])
    scores = frozen.score(found)
    assert f"test: mIoU {100 * scores['miou']:.2f}" in said
    assert np.mean([loss for _, loss in found.losses[-10:]]) < 0.9 * found.losses[0][1]
    call("eval", f"checkpoint={folder}/last.pt", "split=test", f"output={tmp_path / 'scored'}")
    metrics = json.loads((tmp_path / "scored" / "metrics.json").read_text())
    for key in ("miou", "pixel_accuracy", "mean_accuracy", "images", "step"):
        assert scores[key] == pytest.approx(metrics[key], abs=2e-3), key


def test_the_first_loss_is_that_of_the_whole_network(settings):
    found = frozen.train(settings)
    config = found.config
    torch.manual_seed(config.seed)
    model = make_model(config)
    own, _ = frozen.parse(settings)
    dataset = frozen.make_dataset(config, "train", training=False)
    size = config.data.batch_size
    views = next(frozen.in_random_order(len(dataset), size, own.share, config.seed))
    samples = [dataset[view % len(dataset)] for view in views]
    flips = [slice(None, None, -1 if view >= len(dataset) else 1) for view in views]
    pairs = list(zip(samples, flips, strict=True))
    images = np.stack([s.image[:, flip].transpose(2, 0, 1) for s, flip in pairs])
    masks = np.stack([s.mask[:, flip] for s, flip in pairs])
    optimizer = make(config.optimizer, "optimizer")(model)
    step = frozen.TrainStep(
        model.train(),
        make(config.loss, "loss"),
        optimizer,
        make(config.schedule, "schedule"),
        config.trainer,
        num_classes=config.data.num_classes,
    )
    batch = frozen.Batch(torch.from_numpy(images), torch.from_numpy(masks), ("",) * size)
    assert step([batch], 0)["main"].item() == pytest.approx(found.losses[0][1], rel=1e-5)


def test_features_are_computed_once(settings, monkeypatch):
    first = frozen.train(settings)
    monkeypatch.setattr(frozen, "write", None)
    again = frozen.train(settings)
    assert first.losses == again.losses
    other = frozen.train([*settings, "model/head=position"])
    assert np.array_equal(other.test.features, first.test.features)
    monkeypatch.undo()
    torch.manual_seed(5)
    more = frozen.train([*settings, "seed=2"])  # another backbone, since its weights are random
    assert not np.array_equal(more.test.features, first.test.features)


def test_the_backbone_of_a_checkpoint_is_taken_and_stays(settings, tmp_path):
    frozen.main([*settings, f"run.dir={tmp_path / 'a'}"])
    path = tmp_path / "a" / "last.pt"
    found = frozen.train([*settings, "seed=2", f"frozen.checkpoint={path}"])
    before = load_model(path).backbone.state_dict()
    for name, value in found.model.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    saved = checkpoint_format.load(path)
    assert saved["step"] == 3


def test_every_picture_is_seen_once_in_an_epoch_as_itself_or_mirrored():
    batches = list(islice(frozen.in_random_order(8, 4, 1.0, seed=3), 6))
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert sorted(view % 8 for view in first + second) == list(range(8))
    views = {view for batch in batches for view in batch}
    assert min(views) < 8 <= max(views) < 16
    assert batches != list(islice(frozen.in_random_order(8, 4, 1.0, seed=4), 6))
    few = list(islice(frozen.in_random_order(8, 2, 0.25, seed=3), 3))
    assert all(sorted(view % 8 for view in batch) == [0, 4] for batch in few)


def test_tiles_divide_a_picture_and_their_mirrors_follow(settings):
    tiled = [*settings, "frozen.tile=[24,48]"]
    own, others = frozen.parse(tiled)
    config = frozen.compose(others)
    model = make_model(config).eval()
    dataset = frozen.make_dataset(config, "train", training=False)
    kept = frozen.keep(model, config, dataset, own)
    count = 4 * len(dataset)
    assert len(kept.masks) == len(kept.features) == 2 * count
    image, mask, _ = dataset[1]
    assert np.array_equal(kept.masks[4 + 1], mask[:24, 48:])
    assert np.array_equal(kept.masks[count + 4 + 1], mask[:24, 48:][:, ::-1])
    pixels = torch.from_numpy(image[24:, :48][:, ::-1].transpose(2, 0, 1).copy())[None]
    with torch.inference_mode():
        expected = model.backbone(model.normalise(pixels))[-1][0].numpy()
    assert kept.features[count + 4 + 2] == pytest.approx(expected, abs=1e-6)


def test_an_earlier_map_is_averaged_to_the_size_of_the_last(settings, tmp_path, capsys):
    last = frozen.train(settings)
    frozen.main([*settings, "frozen.map=-4", f"run.dir={tmp_path / 'run'}"])
    assert "no checkpoint is written" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    found = frozen.train([*settings, "frozen.map=-4"])
    kept, _, _ = found.test.batch([1])
    pixels = torch.from_numpy(found.data[1].image.transpose(2, 0, 1).copy())[None]
    with torch.inference_mode():
        maps = last.model.backbone(last.model.normalise(pixels))
        logits = found.model(pixels).logits
    assert kept.shape[2:] == maps[-1].shape[2:] < maps[-4].shape[2:]
    rows = maps[-4].unflatten(2, (kept.shape[2], -1)).unflatten(4, (kept.shape[3], -1))
    assert kept.numpy() == pytest.approx(rows.mean(dim=(3, 5)).numpy(), abs=1e-6)
    fine = frozen.resize(found.model.head(kept)["main"], logits.shape[2:], align_corners=True)
    assert torch.allclose(logits, fine, atol=1e-5)


@pytest.mark.parametrize(("number", "pixels"), [(-2, 339), (-3, 67)])
def test_the_study_of_depth_names_what_a_position_depends_on(number, pixels):
    """By the gradient of one position, with weights above zero and without activations."""
    pytest.importorskip("timm", reason="the optional extra danet[timm] is not installed")
    with open(frozen.ROOT / "scripts" / "studies.yaml", encoding="utf-8") as file:
        level = yaml.safe_load(file)["depth"]["levels"][f"{pixels} pixels"]
    assert f"frozen.map={number}" in level
    backbone = TimmBackbone(name="tf_efficientnet_lite0", output_stride=16).double().eval()
    for module in backbone.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.Conv2d):
                nn.init.constant_(child.weight, 1 / child.weight[0].numel())
    image = torch.zeros(1, 3, 512, 512, dtype=torch.double, requires_grad=True)
    found = backbone(image)[number]
    place = found.shape[-1] // 2
    found[0, :, place, place].sum().backward()
    for rows in (image.grad[0].abs().sum(dim=(0, 1)), image.grad[0].abs().sum(dim=(0, 2))):
        touched = rows.nonzero()
        assert touched.max() - touched.min() + 1 == pixels


def test_labels_of_every_fourth_row_and_column(settings):
    found = frozen.train(settings)
    (whole,), (few,) = found.test.batch([1]).mask, found.test.batch([1], step=4).mask
    assert torch.equal(few, whole[2::4, 2::4])


@pytest.mark.parametrize(
    "text",
    [
        *("share=0", "share=1.5", "share=x", "tile=[3]", "tile=x", "label_step=0", "label_step=a"),
        *("map=0", "map=-5", "map=x"),
    ],
)
def test_bad_settings_are_named(text):
    with pytest.raises(InputError, match=f"frozen.{text[:3]}.*share is above 0 and at most 1"):
        frozen.parse([f"frozen.{text}"])


def test_a_setting_it_does_not_have_is_named():
    with pytest.raises(InputError, match=r"frozen.tiles: expected one of frozen.kept"):
        frozen.parse(["frozen.tiles=[2,3]"])


def test_pictures_of_several_sizes_are_refused(settings):
    own, others = frozen.parse(settings)
    config = frozen.compose(others)
    dataset = frozen.make_dataset(config, "val", training=False)
    samples = [dataset[i] for i in range(3)]
    samples[2] = samples[2]._replace(image=samples[2].image[:40], mask=samples[2].mask[:40])

    class Uneven:
        split, fingerprint = "val", staticmethod(lambda: "uneven")
        __len__ = staticmethod(lambda: 3)
        __getitem__ = staticmethod(samples.__getitem__)

    with pytest.raises(InputError, match=r"found 96 x 40 pixels, and 96 x 48 in .*of one size"):
        frozen.keep(make_model(config).eval(), config, Uneven(), own)
    assert not list(own.kept.glob("*/*.npy"))


def test_a_run_needs_a_folder_before_it_is_trained(settings, monkeypatch):
    monkeypatch.setattr(frozen, "train", None)
    with pytest.raises(InputError, match=r"run\.dir=<folder>"):
        frozen.main(settings)
