"""A set of more than 255 classes gives what one of 20 gives: masks of 16 bits, 65535 ignored."""

import itertools
import json
import math
import re
import shlex
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY, call, make_folder, save_picture, write_pair
from PIL import Image
from test_losses import NEAR

from danet.checkpoint import format as checkpoint_format
from danet.data.class_mix import paste
from danet.data.loader import collate, train_batches
from danet.data.transforms import Pipeline, ScaleCrop
from danet.data_check.sample import find_single_class, suggest_setting
from danet.data_check.scan import scan
from danet.datasets.base import Reading, SegmentationDataset
from danet.datasets.label_statistics import label_pixels
from danet.datasets.labels import default_palette
from danet.errors import InputError
from danet.evaluation.inference import Whole
from danet.evaluation.metrics import BoundaryIoU, ConfusionMatrix, PixelLoss
from danet.export import demo
from danet.losses import (
    OHEM,
    CrossEntropy,
    Dice,
    Focal,
    LovaszSoftmax,
    RegionMutualInformation,
    WeightedSum,
    mean_of,
)
from danet.losses.parts import divisors_of, parts_of
from danet.prediction.predict import predict
from danet.types import IGNORE, Sample, SegmentationOutput, ignore_index
from danet.visualization.overlay import Legend, SegmentedImage, colorize, sheet

FEW, K, SHIFT, WIDE = 20, 300, 240, 65535
"""Classes of a narrow set, of a wide one, from the former to the latter (255 is among them)."""
NAMES = [f"class {i}" for i in range(K)]
FACTORS = [0.5 + i / FEW for i in range(FEW)]
SPREAD = [1.0] * SHIFT + FACTORS + [1.0] * (K - SHIFT - FEW)
LOSSES = {
    "cross entropy": (CrossEntropy(), CrossEntropy()),
    "weighted": (CrossEntropy(FACTORS), CrossEntropy(SPREAD)),
    "focal": (Focal(class_weights=FACTORS), Focal(class_weights=SPREAD)),
    "ohem": (OHEM(0.05, min_kept=30), OHEM(0.05, min_kept=30)),
    "ohem over labelled": (
        OHEM(0.05, min_kept=30, normalise="labelled"),
        OHEM(0.05, min_kept=30, normalise="labelled"),
    ),
    "dice": (Dice(), Dice()),
    "lovasz": (LovaszSoftmax(), LovaszSoftmax()),
    "region mutual information": (
        RegionMutualInformation(stride=2, epsilon=1e-2),
        RegionMutualInformation(stride=2, epsilon=1e-2),
    ),
    "sum": (
        WeightedSum([CrossEntropy(), Dice(), RegionMutualInformation()], [1.0, 0.5, 2.0]),
        WeightedSum([CrossEntropy(), Dice(), RegionMutualInformation()], [1.0, 0.5, 2.0]),
    ),
}
"""The loss of a narrow set, and that of a wide one."""


def widened(mask):
    """Returns a mask of 20 classes as one of 300, uint16 or int32 as batches have it."""
    wide = np.where(np.asarray(mask) == IGNORE, WIDE, np.asarray(mask).astype(np.int32) + SHIFT)
    return torch.from_numpy(wide.astype(np.int32)) if torch.is_tensor(mask) else wide.astype("u2")


def among(logits):
    """Returns logits of 20 classes as those of 300, of which the others are impossible."""
    return torch.nn.functional.pad(logits, (0, 0, 0, 0, SHIFT, K - SHIFT - FEW), value=-1e4)


@pytest.fixture
def mask():
    """Returns classes with some 255: (2, 12, 14), uint8; the image 1 begins with ignored rows."""
    mask = torch.randint(0, FEW, (2, 12, 14), dtype=torch.uint8)
    mask[torch.rand(mask.shape) < 0.2] = IGNORE
    mask[1, :3] = IGNORE
    mask[0, 0, :9] = 15  # 255 of the wide set
    return mask


def test_what_is_ignored_follows_from_the_number_of_classes():
    assert [ignore_index(n) for n in (2, 20, 255, 256, 300, 8192)] == [255] * 3 + [65535] * 3


# Losses


def slow(logits, mask, *, gamma=0.0, smoothing=0.0, weights=None):
    """Returns the loss in float64, pixel by pixel: the mean over what is not 65535."""
    above = below = 0.0
    for b, y, x in itertools.product(*map(range, mask.shape)):
        if (truth := int(mask[b, y, x])) == WIDE:
            continue
        values = logits[b, :, y, x].double()
        log_p = (values - values.exp().sum().log()).tolist()
        w = weights or [1.0] * K
        focus = (1 - math.exp(log_p[truth])) ** gamma
        above -= (1 - smoothing) * w[truth] * focus * log_p[truth]
        above -= smoothing / K * sum(map(math.prod, zip(w, log_p, strict=True)))
        below += w[truth]
    return above / below


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_losses_of_300_classes_equal_their_formula(dtype):
    logits, weights = torch.randn(2, K, 6, 7), [0.5 + (i % 7) / 3 for i in range(K)]
    mask = torch.randint(0, K, (2, 6, 7), dtype=dtype)
    mask[:, 2:4], mask[:, 1, 1:4], mask[0, 0] = IGNORE, K - 1, WIDE
    assert float(CrossEntropy()(logits, mask)) == pytest.approx(slow(logits, mask), **NEAR)
    smooth = CrossEntropy(weights, label_smoothing=0.2)(logits, mask)
    expected = slow(logits, mask, smoothing=0.2, weights=weights)
    assert float(smooth) == pytest.approx(expected, **NEAR)
    focal = Focal(1.5, class_weights=weights)(logits, mask)
    assert float(focal) == pytest.approx(slow(logits, mask, gamma=1.5, weights=weights), **NEAR)
    every = OHEM(1.0, min_kept=1, label_smoothing=0.2)(logits, mask)
    assert float(every) == pytest.approx(slow(logits, mask, smoothing=0.2), **NEAR)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_those_of_the_narrow_set(mask, name):
    found = []
    logits = torch.randn(2, FEW, 6, 7)
    for loss, widen, target in zip(
        LOSSES[name], (torch.Tensor.clone, among), (mask, widened(mask)), strict=True
    ):
        leaf = logits.clone().requires_grad_()
        value = loss(widen(leaf), target)
        found.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("is_empty", [False, True], ids=["labels", "none"])
def test_divisors_from_the_mask_are_those_of_the_parts(mask, name, is_empty):
    loss, wide = LOSSES[name][1], widened(mask)
    if is_empty:
        wide.fill_(WIDE)
    parts = parts_of(loss, among(torch.randn(2, FEW, 6, 7)), wide, align_corners=True)
    divisors = divisors_of(loss, wide, K)
    assert divisors is None or torch.equal(
        torch.stack(divisors), torch.stack([p.divisor for p in parts])
    )
    assert not is_empty or mean_of(parts) == 0


# Scores


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.int64], ids=str)
def test_a_confusion_matrix_of_300_classes_is_that_of_a_loop(dtype):
    generator = np.random.default_rng(0)
    truth, guess = generator.integers(0, K, (2, 30, 40))
    truth[0, :9], truth[1, :5], truth[2, :3] = WIDE, IGNORE, K
    guess[3, :4], guess[4, :2], truth[3, :2] = WIDE - 1, K, WIDE
    pairs = Counter(zip(truth.ravel().tolist(), guess.ravel().tolist(), strict=True))
    confusion = ConfusionMatrix(K)
    confusion.update(torch.from_numpy(guess).to(dtype), torch.from_numpy(truth).to(dtype))
    expected = [[pairs[t, g] for g in range(K)] for t in range(K)]
    assert confusion.matrix.tolist() == expected
    ignored = int((truth == WIDE).sum())
    assert confusion.counts[-2:].tolist() == [ignored, 1200 - ignored - np.sum(expected)]
    with pytest.raises(InputError, match=r"7 pixels are neither one of 300 classes nor 65535"):
        confusion.scores()


def test_scores_and_loss_are_those_of_the_narrow_set(mask):
    logits, found, image = torch.randn(2, FEW, 12, 14), [], torch.zeros(2, 3, 12, 14)

    def network(wanted):
        return lambda _: SegmentationOutput(wanted, {})

    for scores, target in ((logits, mask), (among(logits), widened(mask))):
        classes = scores.shape[1]
        loss = PixelLoss(lambda x, y: CrossEntropy().parts(x, y), classes)
        predicted = Whole().predict(network(scores), image, target, [loss])
        assert predicted.dtype == target.dtype
        confusion, boundary = ConfusionMatrix(classes), BoundaryIoU(classes, 0.1)
        confusion.update(predicted, target)
        for pair in zip(predicted.numpy(), target.numpy(), strict=True):
            boundary.update(*pair)
        averages = confusion.scores()[:5]
        iou = [n for n in confusion.scores().iou if not math.isnan(n)]
        found.append((*averages, *iou, *boundary.iou()[boundary.iou() >= 0].tolist(), loss.mean()))
    assert found[0][:-1] == found[1][:-1]
    assert found[0][-1] == pytest.approx(found[1][-1], rel=1e-6)


# Masks


def own(root, split="train", **settings):
    return make_folder(root=root, split=split, **{"classes": NAMES, **settings})


@pytest.fixture
def twins(tmp_path):
    """Plants the same pictures with masks of 20 classes in 8 bits and of 300 in 16."""
    rng, masks = np.random.default_rng(0), []
    for i in range(6):
        image = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        values = np.array([*range(FEW), IGNORE], np.uint8)
        masks.append(cv2.resize(rng.choice(values, (6, 8)), (40, 30), interpolation=0))
        write_pair(tmp_path / "few", "train", f"p{i}", image, masks[-1], labels="masks")
        write_pair(tmp_path / "many", "train", f"p{i}", image, widened(masks[-1]), labels="masks")
    return tmp_path, masks


def test_batches_are_those_of_the_narrow_set_in_int32(twins):
    pipeline = Pipeline({"crop": ScaleCrop((32, 48), (0.5, 2.0), centred=0.5)})
    few, many = (
        list(itertools.islice(train_batches(data, batch_size=2, seed=5), 6))
        for data in (
            own(twins[0] / "few", classes=NAMES[:FEW], transform=pipeline),
            own(twins[0] / "many", transform=pipeline),
        )
    )
    for one, two in zip(few, many, strict=True):
        assert torch.equal(one.image, two.image)
        assert one.mask.dtype == torch.uint8
        assert two.mask.dtype == torch.int32
        assert torch.equal(widened(one.mask), two.mask)
    assert {255, WIDE} <= set(torch.stack([batch.mask for batch in many]).unique().tolist())


COLORS = [[i % 256, i // 256, 7] for i in range(K)]
FORMS = {
    "16 bits": (lambda m: m, {}),
    "from 1": (
        lambda m: np.where(m == WIDE, 0, m.astype(int) + 1).astype("u2"),
        {"labels_start_at": 1},
    ),
    "other values": (
        lambda m: np.where(m == WIDE, 255, m.astype(int) + 1000).astype("u2"),
        {"values": {255: WIDE, **{1000 + i: i for i in range(K)}}},
    ),
    "colours": (
        lambda m: np.array([*COLORS, [9, 9, 9]], np.uint8)[np.minimum(m, K)],
        {"colors": COLORS, "ignore_colors": [[9, 9, 9]]},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_wide_mask_is_read_also_from_the_cache(twins, tmp_path, form):
    encode, settings = FORMS[form]
    for i, mask in enumerate(twins[1]):
        save_picture(tmp_path / f"many/masks/train/p{i}.png", encode(widened(mask)))
    reading = Reading(cache="disk", cache_dir=str(tmp_path / "cache"))
    for data in (own(tmp_path / "many", **settings, **more) for more in ({}, {"reading": reading})):
        for _ in range(2):
            for i, mask in enumerate(twins[1]):
                assert data[i].mask.dtype == np.uint16
                assert np.array_equal(data[i].mask, widened(mask))


def test_arrays_of_any_whole_numbers_are_wide_masks(twins, tmp_path):
    for dtype in (np.int32, np.int64, np.uint16):
        for i, mask in enumerate(twins[1]):
            np.save(tmp_path / f"many/masks/train/p{i}.npy", widened(mask).astype(dtype))
        data = own(tmp_path / "many", mask_suffix=".npy")
        assert all(np.array_equal(data[i].mask, widened(twins[1][i])) for i in range(6))


def test_pictures_without_labels_are_ignored_and_own_sets_get_uint16(tmp_path):
    save_picture(tmp_path / "images/a.png", np.zeros((4, 5, 3), np.uint8))
    write_pair(tmp_path / "other", "train", "a", np.zeros((4, 5, 3), np.uint8), np.eye(4, 5) > 0)

    class Drawn(SegmentationDataset):
        classes = tuple(NAMES)

        def __len__(self):
            return 1

        def read(self, index):
            return np.zeros((40, 50, 3), np.uint8), np.full((40, 50), 255, np.int64), "a"

    crop = ScaleCrop((64, 64), (1, 1))
    found = Drawn(split="train", transform=Pipeline({"crop": crop}))[0].mask
    assert found.dtype == np.uint16
    assert np.unique(found, return_counts=True)[1].tolist() == [2000, 64 * 64 - 2000]
    assert found[0, 0] == 255
    assert found[-1, -1] == WIDE


def test_class_mix_pastes_class_255_and_never_what_is_ignored():
    image = np.zeros((4, 6, 3), np.uint8)
    below = Sample(image, np.full((4, 6), 7, np.uint16), "below")
    above = Sample(image + 9, np.full((4, 6), IGNORE, np.uint16), "above")
    above.mask[:2] = WIDE
    mixed = paste(below, above, 1)
    assert mixed.mask.tolist() == [[7] * 6] * 2 + [[IGNORE] * 6] * 2
    assert mixed.image[..., 0].tolist() == [[0] * 6] * 2 + [[9] * 6] * 2
    assert collate([mixed]).mask.dtype == torch.int32


def test_pixels_are_counted_by_class_and_255_is_one(twins, tmp_path):
    reading = Reading(cache_dir=str(tmp_path / "cache"))
    data = own(tmp_path / "many", reading=reading)
    expected = np.zeros((6, K), int)
    for i, mask in enumerate(twins[1]):
        np.add.at(expected[i], widened(mask)[mask != IGNORE], 1)
    assert np.array_equal(label_pixels(data, num_workers=0, skip=False), expected)
    assert expected[:, 255].any()
    report = scan(data)
    assert report.pixels.tolist() == expected.sum(axis=0).tolist()
    assert report.ignored == sum((mask == IGNORE).sum() for mask in twins[1])
    assert not report.problems
    assert suggest_setting([report]) == ("", False)


def test_a_set_whose_labels_hold_255_and_nothing_else_has_one_class(tmp_path):
    for i, value in enumerate((IGNORE, WIDE)):
        mask = np.full((4, 5), value, np.uint16)
        write_pair(tmp_path, "train", f"p{i}", np.zeros((4, 5, 3), np.uint8), mask, labels="masks")
    report = scan(own(tmp_path))
    assert "all 2 labels hold class 255 (class 255) and nothing else" in find_single_class(report)
    assert [pair.remarks for pair in report.pairs] == [
        [],
        ["the label is ignored everywhere and teaches nothing"],
    ]


# Refusals


def refusal(data):
    with pytest.raises(InputError) as found:
        data.read(0)
    return str(found.value)


def test_65535_in_a_narrow_set_is_refused_with_the_setting_that_ignores_it(twins, tmp_path):
    mask = twins[1][0]
    saved = np.where(mask == IGNORE, WIDE, mask.astype(int)).astype("u2")
    saved[0, 0] = IGNORE
    save_picture(tmp_path / "few/masks/train/p0.png", saved)
    said = refusal(own(tmp_path / "few", classes=NAMES[:FEW]))
    assert "label value 65535 on" in said
    assert "65535 is ignored only where there are more than 255 classes" in said
    (advice,) = shlex.split(re.search(r"set ('data.values=.*?')", said)[1])
    pairs = advice.removeprefix("data.values={").removesuffix("}").split(",")
    values = {int(a): int(b) for a, b in (pair.split(":") for pair in pairs)}
    _, found, _ = own(tmp_path / "few", classes=NAMES[:FEW], values=values).read(0)
    expected = mask.copy()
    expected[0, 0] = IGNORE
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)


def test_a_value_without_a_class_in_a_wide_set_is_refused(twins, tmp_path):
    save_picture(tmp_path / "many/masks/train/p0.png", np.full((30, 40), K, np.uint16))
    said = refusal(own(tmp_path / "many"))
    assert "label value 300 on 1200 pixels" in said
    assert "with values 0..299, 65535;" in said
    values = {i: i for i in range(K - 1)}
    assert "with a class or 65535 to ignore it" in refusal(own(tmp_path / "many", values=values))
    with pytest.raises(InputError, match=r"0 -> 301, but classes are 0..299 and 65535 is ignore"):
        own(tmp_path / "many", values={0: 301})


# Pictures


def test_drawings_know_the_colours_of_300_classes():
    palette = default_palette(["background", *NAMES[1:]])
    assert len(set(palette)) == K
    assert palette[0] == (0, 0, 0)
    assert default_palette(NAMES[:255]) == default_palette(NAMES)[:255]
    mask = np.array([[0, 255, 299, WIDE]], np.uint16)
    assert colorize(mask, palette)[0].tolist() == [
        [0, 0, 0],
        *map(list, (palette[255], palette[299])),
        [0, 0, 0],
    ]
    legend = Legend(["background", *NAMES[1:]], palette, opacity=1.0)
    image = np.full((1, 4, 3), 90, np.uint8)
    assert legend.over(image, mask)[0, [0, 3]].tolist() == [[90] * 3] * 2
    truth = np.array([[0, 255, 298, WIDE]], np.uint16)
    drawn = sheet(legend, SegmentedImage("a", image, mask, truth))
    assert (drawn == palette[255]).all(axis=-1).any()


def test_predictions_of_300_classes_are_uint16(mask):
    logits = torch.randn(1, K, 12, 14)
    logits[:, 299, :, :7], logits[:, IGNORE, :, 7:] = 9, 9

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, image):
            return SegmentationOutput(self.scale * logits.expand(len(image), -1, -1, -1), {})

    images = np.zeros((2, 12, 14, 3), np.uint8)
    found = predict(Fixed(), images, batch_size=2)
    assert found.dtype == np.uint16
    assert np.unique(found[..., :7]).tolist() == [299]
    assert np.unique(found[..., 7:]).tolist() == [IGNORE]
    assert predict(Fixed(), images[0]).dtype == np.uint16


# Whole commands


OWN = [s for s in TINY if not s.startswith(("data.size", "data.lengths", "data.cue"))]
SHOWN = {255: (200, 30, 30), 299: (30, 200, 30), 7: (30, 30, 200)}
"""Colour of the pictures by class: two thirds are 255."""


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Trains in a new folder, where ``own`` has noisy pictures of three of 300 classes."""
    monkeypatch.chdir(tmp_path)
    rng, root = np.random.default_rng(0), tmp_path / "own"
    for split, count in (("train", 6), ("val", 2)):
        for i in range(count):
            mask = np.kron(rng.choice([255, 255, 299, 7], (3, 4)), np.ones((16, 16))).astype("u2")
            colors = np.array([SHOWN[c] for c in mask.ravel().tolist()]).reshape(48, 64, 3)
            image = np.clip(colors + rng.normal(0, 12, colors.shape), 0, 255).astype(np.uint8)
            mask[:2] = WIDE
            write_pair(root, split, f"{split}{i}", image, mask, labels="masks")
    (root / "names.txt").write_text("".join(f"c{i}\n" for i in range(K)))
    settings = ["data=folder", f"data.root={root}", f"data.classes={root / 'names.txt'}", *OWN]
    settings += ["data.crop=[32,48]", "data.num_workers=0", "trainer.steps=40", "run.log_to=[]"]
    settings += ["trainer.accumulate=2", "data.cache_dir=cache", "data.class_mix=0.2"]
    settings += ["data.rare_class_temperature=0.5", "optimizer.lr=0.01"]
    call("train", *settings, "run.dir=whole")
    return settings


@pytest.mark.slow
def test_300_classes_are_trained_resumed_scored_predicted_exported_and_checked(trained, capsys):
    call("train", *trained, "run.dir=part", "trainer.stop_at=20")
    call("train", "resume=part/last.pt")
    whole, part = (checkpoint_format.load(Path(f"{name}/last.pt")) for name in ("whole", "part"))
    assert all(torch.equal(value, part["model"][name]) for name, value in whole["model"].items())
    assert whole["scores"] == part["scores"]

    call("eval", "checkpoint=whole/last.pt", "output=scored", "boundary_ratio=0.02")
    scores = json.loads(Path("scored/metrics.json").read_text())
    assert scores["miou"] == whole["scores"]["miou"]
    assert scores["per_class"]["c255"]["iou"] > 0.5
    call("predict", "checkpoint=whole/last.pt", "images=own/images/val", "output=predicted")
    predicted = [np.array(Image.open(p)) for p in sorted(Path("predicted/index").glob("*.png"))]
    truth = [np.array(Image.open(p)) for p in sorted(Path("own/masks/val").glob("*.png"))]
    assert predicted[0].dtype == np.uint16
    hits = sum(((p == t) & (t == 255)).sum() for p, t in zip(predicted, truth, strict=True))
    assert hits / sum((t == 255).sum() for t in truth) == pytest.approx(
        scores["per_class"]["c255"]["accuracy"]
    )
    line = json.loads(Path("predicted/predictions.jsonl").read_text().splitlines()[0])
    assert line["shares"]["c255"] == (predicted[0] == 255).mean()

    capsys.readouterr()
    call("check_data", *trained[:3], "output=checked")
    said = capsys.readouterr().out
    assert "no problems" in said
    pixels = json.loads(Path("checked/report.json").read_text())["splits"]["val"]
    assert pixels["classes"][255]["pixels"] == sum((t == 255).sum() for t in truth)
    assert pixels["ignored_pixels"] == 2 * 2 * 64
    call("visualize", "checkpoint=whole/last.pt", "output=drawn", "report=true", "count=1")
    assert "confusion.csv" in Path("drawn/report.html").read_text()

    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    call("export", "checkpoint=whole/last.pt", "output=exported", "formats=[onnx]")
    demo.give_classes(Path("exported/model.onnx"), Path("exported/classes.onnx"), is_wide=True)
    image = np.array(Image.open("own/images/val/val0.png"))
    session = ort.InferenceSession("exported/classes.onnx")
    (found,) = session.run(["classes"], {"image": image.transpose(2, 0, 1)[None]})
    assert found.dtype == np.uint16
    assert (found[0] == predicted[0]).mean() > 0.999
