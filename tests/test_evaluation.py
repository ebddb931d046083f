"""Scores are what counting by hand gives; windows and scales are what a slow loop gives."""

import copy
import json
import math
from collections import Counter
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, LargestTensor, call, no_waiting
from test_config import compose
from torch import nn

from danet.checkpoint import format as checkpoint_format
from danet.config.build import checked_config, make
from danet.config.resume import differences
from danet.config.validate import check
from danet.data.loader import eval_batches
from danet.errors import InputError
from danet.evaluation import metrics, sliding_window
from danet.evaluation.evaluate import evaluate
from danet.evaluation.fuse import fuse_for_inference
from danet.evaluation.inference import MultiScale, Sliding, Whole, describe
from danet.evaluation.metrics import BoundaryIoU, ConfusionMatrix, PixelLoss, image_iou
from danet.evaluation.protocols import AuthorsProtocol, MMSegProtocol
from danet.evaluation.sliding_window import Windows, resize_bands, sum_maps, window_starts
from danet.losses import OHEM, CrossEntropy, DeepSupervision, Dice, WeightedSum
from danet.models.heads.dual import DualAttentionHead
from danet.models.resnet import ResNet
from danet.models.segmentor import Segmentor
from danet.ops.arithmetic import cuda_arithmetic
from danet.ops.resize import resize
from danet.types import IGNORE, Sample, SegmentationOutput

K = 3


class StandIn(nn.Module):
    """Logits that depend on what else is in the window, and on left and right."""

    align_corners = True

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, K, 5, padding=2)

    def forward(self, image):
        x = image.float() / 255
        return SegmentationOutput(8 * self.conv(x) + x.mean(dim=(2, 3), keepdim=True) ** 2, {})


@pytest.fixture
def model():
    return StandIn().eval().requires_grad_(False)


def picture(height, width, batch=2):
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)


def softmax(model, image):
    return model(image).logits.softmax(dim=1)


def mirrored_mean(model, image):
    return (softmax(model, image) + softmax(model, image.flip(3)).flip(3)) / 2


# Confusion matrix


def counted(pairs, num_classes=K):
    """Returns a matrix that has seen ``pairs`` of (prediction, truth)."""
    confusion = ConfusionMatrix(num_classes)
    guess, truth = torch.tensor(pairs).T
    confusion.update(guess, truth)
    return confusion


def test_scores_of_three_classes_are_those_computed_by_hand():
    # Rows are the truth:  [[3, 1, 0], [1, 2, 1], [0, 0, 2]]
    pairs = [(0, 0)] * 3 + [(1, 0), (0, 1)] + [(1, 1)] * 2 + [(2, 1)] + [(2, 2)] * 2
    scores = counted(pairs).scores()
    assert scores.iou == pytest.approx((3 / 5, 2 / 5, 2 / 3))
    assert scores.accuracy == pytest.approx((3 / 4, 2 / 4, 2 / 2))
    miou, frequent = (3 / 5 + 2 / 5 + 2 / 3) / 3, 0.4 * 3 / 5 + 0.4 * 2 / 5 + 0.2 * 2 / 3
    assert scores[:5] == pytest.approx((miou, 7 / 10, (3 / 4 + 2 / 4 + 1) / 3, frequent, 3))


def test_a_class_nobody_saw_is_left_out_and_one_only_predicted_scores_zero():
    scores = counted([(0, 0), (0, 0), (2, 0), (2, 2)], num_classes=4).scores()
    assert [math.isnan(v) for v in scores.iou] == [False, True, False, True]
    assert (scores.miou, scores.classes_averaged) == (pytest.approx((2 / 3 + 1 / 2) / 2), 2)
    assert scores.frequency_weighted_iou == pytest.approx(0.75 * 2 / 3 + 0.25 * 1 / 2)
    predicted = counted([(0, 0), (1, 0)]).scores()
    assert predicted.iou[1] == 0
    assert math.isnan(predicted.accuracy[1])
    assert (predicted.miou, predicted.mean_accuracy) == pytest.approx((1 / 4, 1 / 2))


@pytest.mark.parametrize("pair", [(K, 0), (0, K), (0, 254), (-1, 0), (0, -1)], ids=str)
def test_what_cannot_be_scored_is_an_error(pair):
    confusion = counted([(0, 0), pair])
    assert confusion.matrix.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="1 pixels are neither one of 3 classes nor 255"):
        confusion.scores()
    with pytest.raises(ValueError, match=r"no labelled pixel was counted \(2 ignored\)"):
        counted([(0, IGNORE), (1, IGNORE)]).scores()
    with pytest.raises(ValueError, match=r"prediction \(1, 2\), mask \(2, 1\)"):
        ConfusionMatrix(K).update(torch.zeros(1, 2).long(), torch.zeros(2, 1).long())


@pytest.mark.parametrize("before", [2**24, 2**31 - 1], ids=["2^24", "2^31 - 1"])
def test_counts_stay_exact_where_float32_and_int32_would_not(before):
    # 2**24 + 1 is the first whole number that float32 does not have.
    confusion = ConfusionMatrix(2)
    confusion.counts[0] = before
    for _ in range(3):
        confusion.update(torch.tensor([0, 1]), torch.tensor([0, 0], dtype=torch.uint8))
    assert confusion.matrix.tolist() == [[before + 3, 3], [0, 0]]
    assert confusion.matrix.dtype == torch.int64
    assert confusion.scores().iou[0] == (before + 3) / (before + 6)


def count_with_masks(prediction, mask, k):
    """Counts classes pair by pair, then what is ignored and what is no class."""
    truth, guess = mask.long(), prediction.long()
    kept = truth != IGNORE
    valid = kept & (truth >= 0) & (truth < k) & (guess >= 0) & (guess < k)
    pairs = Counter(zip(truth[valid].tolist(), guess[valid].tolist(), strict=True))
    found = [pairs[t, g] for t in range(k) for g in range(k)]
    return [*found, int((~kept).sum()), int((kept & ~valid).sum())]


@pytest.mark.parametrize("num_classes", [1, 11, 255], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
def test_every_value_of_every_type_is_counted_where_masks_would_count_it(dtype, num_classes):
    low, high = (0, 256) if dtype == torch.uint8 else (-300, 600)
    confusion = ConfusionMatrix(num_classes)
    values = torch.randint(low, high, (2, 40, 50), dtype=dtype)
    classes = torch.randint(0, num_classes, (2, 40, 50), dtype=dtype)
    values = torch.where(torch.rand(2, 40, 50) < 0.3, values, classes)
    values[0, :5] = IGNORE
    others = torch.randint(0, min(num_classes + 1, 256), (2, 40, 50), dtype=torch.uint8)
    for pair in ((values, others), (others, values)):
        confusion.counts.zero_()
        confusion.update(*pair)
        assert confusion.counts.tolist() == count_with_masks(*pair, num_classes)


# Boundary IoU, and the mean of single images


def blobs(seed, size=(40, 57), cells=6):
    """Regions of several pixels, as a network predicts them."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, K, (cells, cells), dtype=np.uint8)
    rows, columns = (np.arange(n) * cells // n for n in size)
    return coarse[np.ix_(rows, columns)].copy()


def near_outline(region, distance):
    """The pixels of a region that ``distance`` erosions by 3x3 take away; all is empty outside."""
    eroded = region
    for _ in range(distance):
        padded = np.pad(eroded, 1)
        height, width = region.shape
        shifts = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
        eroded = np.logical_and.reduce(shifts)
    return region & ~eroded


def literal(pairs, ratio):
    both, either = np.zeros(K), np.zeros(K)
    for guess, truth in pairs:
        distance = max(1, round(ratio * math.hypot(*truth.shape)))
        for k in range(K):
            true = near_outline(truth == k, distance)
            predicted = near_outline((guess == k) & (truth != IGNORE), distance)
            both[k] += (true & predicted).sum()
            either[k] += (true | predicted).sum()
    return [b / e if e else math.nan for b, e in zip(both, either, strict=True)]


@pytest.mark.parametrize("ratio", [0.001, 0.02, 0.1])
@pytest.mark.parametrize("ignored", [False, True])
def test_boundary_iou_is_that_of_eroded_regions(ratio, ignored):
    counter, pairs = BoundaryIoU(K, ratio), []
    for seed, size in enumerate([(40, 57), (33, 33), (64, 20)]):
        guess, truth = blobs(seed, size), blobs(seed + 10, size, cells=5)
        guess[: size[0] // 2] = truth[: size[0] // 2]  # half of it is right
        if ignored:
            truth[5:9, 3:17] = IGNORE
        pairs.append((guess, truth))
        counter.update(guess, truth)
    assert counter.iou().tolist() == pytest.approx(literal(pairs, ratio), nan_ok=True)
    assert 0.2 < counter.iou().nanmean() < 1
    right, truth = BoundaryIoU(K, ratio), np.minimum(blobs(0), 1)
    right.update(truth, truth)
    assert right.iou().tolist() == pytest.approx([1.0, 1.0, math.nan], nan_ok=True)


def test_the_mean_of_an_image_is_that_of_a_loop():
    for seed in range(5):
        guess, truth = blobs(seed, cells=3), blobs(seed + 20, cells=3)
        truth[:4] = IGNORE
        confusion, valid, ious = ConfusionMatrix(K), truth != IGNORE, []
        confusion.update(torch.from_numpy(guess), torch.from_numpy(truth))
        for k in range(K):
            true, predicted = (truth == k) & valid, (guess == k) & valid
            if (true | predicted).any():
                ious.append((true & predicted).sum() / (true | predicted).sum())
        assert image_iou(confusion.matrix).tolist() == pytest.approx([np.mean(ious), 1])
    assert image_iou(torch.zeros(K, K, dtype=torch.int64)).tolist() == [0, 0]  # without labels


# Inference


@pytest.mark.parametrize(("flip", "wanted"), [(False, softmax), (True, mirrored_mean)])
def test_whole_is_one_pass_or_the_mean_with_the_mirrored_image(model, flip, wanted, capsys):
    image = picture(40, 50)
    got = Whole(flip=flip, max_pixels=2000)(model, image)
    torch.testing.assert_close(got, wanted(model, image))
    assert torch.allclose(got, softmax(model, image), atol=1e-3) != flip
    torch.testing.assert_close(MultiScale(scales=[1.0], flip=flip)(model, image), got)
    assert capsys.readouterr() == ("", ""), "within the limit"


def slow_sliding(model, image, crop, stride, single):
    """Every window by itself: steps of ``stride``, each moved back to end inside the image."""
    height, width = image.shape[2:]
    total = torch.zeros(image.shape[0], K, height, width, dtype=torch.float64)
    count = torch.zeros(height, width)
    corners = {
        (max(min(top, height - crop[0]), 0), max(min(left, width - crop[1]), 0))
        for top in range(0, height, stride[0])
        for left in range(0, width, stride[1])
    }
    for top, left in sorted(corners):
        window = ..., slice(top, top + crop[0]), slice(left, left + crop[1])
        total[window] += single(model, image[window])
        count[window] += 1
    assert (count > 0).all()
    return (total / count).float()


@pytest.mark.parametrize("flip", [False, True], ids=["plain", "flip"])
@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [
        ((45, 61), (32, 32), (20, 20)),
        ((64, 64), (32, 32), (32, 32)),
        ((33, 70), (32, 40), (32, 17)),
        ((20, 70), (32, 32), (5, 32)),
        ((70, 20), (32, 40), (30, 40)),
    ],
    ids=str,
)
def test_windows_equal_a_loop_over_windows(model, size, crop, stride, flip):
    image = picture(*size, batch=2)
    single = mirrored_mean if flip else softmax
    wanted = slow_sliding(model, image, crop, stride, single)
    for together in (None, 1, 2, 5):
        infer = Sliding(crop=crop, stride=stride, flip=flip, windows_per_batch=together)
        torch.testing.assert_close(infer(model, image), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("flip", [False, True], ids=["plain", "flip"])
@pytest.mark.parametrize("windows", [{}, {"crop": (32, 32), "stride": (20, 24)}], ids=str)
def test_scales_equal_the_steps_written_out(model, flip, windows):
    image, single = picture(40, 52, batch=1), mirrored_mean if flip else softmax
    wanted = torch.zeros(1, K, 40, 52)
    for size in ((30, 39), (40, 52), (60, 78)):
        small = resize(image.float(), size, align_corners=True)
        parts = single(model, small)
        if windows:
            parts = slow_sliding(model, small, *windows.values(), single)
        wanted += resize(parts, (40, 52), align_corners=True) / 3
    got = MultiScale(scales=(0.75, 1, 1.5), flip=flip, **windows)(model, image)
    torch.testing.assert_close(got, wanted)


def assert_most_probable(classes, probabilities):
    """Holds classes against probabilities, but for near ties, which rounding may turn."""
    best, second = probabilities.topk(2, dim=1).values.unbind(dim=1)
    # Logits of up to 8 are rounded to 1e-6 or so, and by each kernel otherwise. Probabilities of
    # almost one round to one; the logits still know the larger.
    clear = best - second > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(classes[clear].long(), probabilities.argmax(dim=1)[clear])


PROTOCOLS = [
    AuthorsProtocol(base_size=80, crop=48, scales=[1.0, 1.5], stride_rate=0.5),
    MMSegProtocol(ratios=[1.0, 1.5], flip=True),
]
MODES = [
    Whole(),
    Whole(flip=True),
    Whole(max_pixels=1600),
    Sliding(crop=(32, 40), stride=(20, 13)),
    Sliding(crop=(32, 32), stride=(11, 32), flip=True, windows_per_batch=3),
    MultiScale(scales=(0.5, 1, 2.2)),
    MultiScale(scales=(0.5, 1.3), crop=(32, 32), stride=(17, 32)),
    MultiScale(scales=(0.5, 1.3), flip=False, max_pixels=2000),
]


@pytest.mark.parametrize("infer", MODES, ids=lambda i: type(i).__name__)
@pytest.mark.parametrize("size", [(1, 1), (7, 3000), (300, 5), (32, 32), (64, 97)], ids=str)
def test_predict_is_the_most_probable_class(model, infer, size):
    image = picture(*size, batch=2 if size[1] < 100 else 1)
    classes, probabilities = infer.predict(model, image), infer(model, image)
    assert (classes.dtype, classes.shape) == (torch.uint8, (image.shape[0], *size))
    assert_most_probable(classes, probabilities)


@pytest.mark.bad_input("I06")
def test_a_large_image_is_done_in_windows_and_one_line_says_so(model, capsys):
    image, infer = picture(70, 90), Whole(max_pixels=1700)
    wanted = slow_sliding(model, image, (41, 41), (30, 30), softmax)
    seen = set()
    model.register_forward_pre_hook(lambda _, x: seen.add((x[0].dtype, x[0].shape)))
    torch.testing.assert_close(infer(model, image), wanted)
    assert seen == {(torch.uint8, (2, 3, 41, 41))}, "windows are cut as bytes"
    assert_most_probable(infer.predict(model, image), wanted)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in ("90 x 70", "evaluation.max_pixels=1700", "41 x 41", "every 30 pixels"):
        assert part in said


@pytest.mark.bad_input("I06")
def test_prediction_in_windows_never_holds_more_than_a_band(model):
    image = picture(240, 1500, batch=1)
    infer = Sliding(crop=(64, 192), stride=(48, 160), windows_per_batch=4)
    with LargestTensor() as largest:
        infer.predict(model, image)
    assert largest.numel <= K * 64 * 1500
    # Scales hold one map of the image.
    infer = MultiScale(scales=(2.2,), crop=(64, 64), stride=(64, 64), windows_per_batch=16)
    with LargestTensor() as largest:
        infer(model, picture(100, 400, batch=1))
    assert largest.numel <= max(K * 100 * 400, K * 65 * 880, 3 * 220 * 880)


# Windows and bands


def test_windows_are_full_inside_and_cover_every_pixel():
    for size in range(1, 60):
        for crop in (1, 2, 7, 32):
            for stride in range(1, crop + 1):
                begins = window_starts(size, crop, stride)
                assert begins == sorted(set(begins))
                assert (begins[0], begins[-1]) == (0, max(size - crop, 0))
                covered = {p for begin in begins for p in range(begin, min(begin + crop, size))}
                assert covered == set(range(size))


TALL = tuple(range(500, 4506, 500))


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize(
    "cuts", [(30,), (1, 30), (29, 30), (7, 8, 20, 30), tuple(range(1, 31)), (*TALL, 4506)], ids=str
)
@pytest.mark.parametrize("size", [(30, 17), (1, 1), (13, 40), (66, 17), (2048, 3)], ids=str)
def test_bands_are_resized_as_the_whole_map_is(size, cuts, last):
    whole = torch.rand(2, 5, cuts[-1], 3 if cuts[-1] > 30 else 17)
    if last:
        whole = whole.contiguous(memory_format=torch.channels_last)
    bands = (whole[:, :, a:b] for a, b in pairwise([0, *cuts]))
    got = sum_maps([resize_bands(bands, cuts[-1], size)], size[0])
    torch.testing.assert_close(got, resize(whole, size), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("width", "crop", "stride"), [(400, 32, 24), (407, 32, 10), (130, 64, 64), (90, 200, 40)]
)
def test_strips_of_a_wide_image_give_the_classes_of_its_bands(monkeypatch, width, crop, stride):
    monkeypatch.setattr(sliding_window, "STRIP", 120)
    image = torch.rand(2, 3, 80, width, dtype=torch.float64)  # nothing is near a tie
    widths = []

    def infer(part):  # says something else about a pixel in each window
        return (part - part.mean(dim=(2, 3), keepdim=True)).softmax(dim=1)

    class Seen(Windows):
        def bands(self, infer, image, grid=None):
            widths.append(image.shape[3])
            return super().bands(infer, image, grid)

    windows = Seen((32, crop), (24, stride))
    bands = Windows((32, crop), (24, stride)).bands(infer, image)
    expected = torch.cat([band.argmax(dim=1) for band in bands], dim=1)
    classes = torch.full_like(expected, -1)
    for piece in windows.pieces(infer, image):
        classes[piece.place] = piece.scores.argmax(dim=1)
    assert torch.equal(classes, expected)
    assert max(widths) < 120 + 2 * crop
    assert len(widths) > (2 if width > 200 else 0)


# The loop


def pictures_of(*sizes):
    """Returns samples of noise of given sizes with labels."""
    samples = []
    for i, (height, width) in enumerate(sizes):
        image = picture(height, width, batch=1)[0].permute(1, 2, 0)
        mask = torch.randint(0, K, (height, width))
        mask[: i + 1] = IGNORE
        samples.append(Sample(image.numpy(), mask.byte().numpy(), f"picture {i}"))
    return samples


@pytest.fixture
def danet():
    head = partial(DualAttentionHead, num_classes=K, reduction=2)
    network = Segmentor(ResNet(depth=18, width=8), head)
    for module in network.modules():
        if hasattr(module, "gamma"):
            nn.init.ones_(module.gamma)
    return network


def run(network, pictures, infer=MODES[0], counters=(), *, batch_size=1, **shard):
    batches, device = eval_batches(pictures, batch_size=batch_size, **shard), torch.device("cpu")
    return evaluate(network, batches, infer, num_classes=K, device=device, counters=counters)


MIXED = [(40, 56), (33, 47), (40, 56), (56, 40), (33, 47)]


@pytest.mark.parametrize("sizes", [[(40, 56)] * 5, MIXED], ids=["one size", "mixed sizes"])
def test_scores_do_not_depend_on_the_batch_size(danet, sizes):
    pictures, before = pictures_of(*sizes), copy.deepcopy(danet.train().state_dict())
    alone, together = run(danet, pictures, batch_size=1), run(danet, pictures, batch_size=3)
    assert torch.equal(alone.matrix, together.matrix)
    halves = [run(danet, pictures, batch_size=2, rank=r, world=2).counts for r in (0, 1)]
    assert torch.equal(sum(halves), alone.counts), "two processes count what one counts"
    wanted = sum(int((s.mask != IGNORE).sum()) for s in pictures)
    assert alone.matrix.sum() == wanted
    assert (alone.matrix.sum(dim=0) > 0).sum() > 1, "a network that says one thing shows little"
    assert not danet.training
    for name, value in danet.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_evaluation_counts_what_the_network_predicts_picture_by_picture(danet):
    """In float64: with its norms folded a network rounds otherwise, which may turn near ties."""
    pictures, wanted = pictures_of(*MIXED), ConfusionMatrix(K)
    danet.eval().double()
    for sample in pictures:
        image = torch.from_numpy(sample.image).permute(2, 0, 1)[None]
        with torch.no_grad():
            guess = danet(image).logits.argmax(dim=1)[0]
        wanted.update(guess, torch.from_numpy(sample.mask))
    assert torch.equal(run(danet, pictures, batch_size=2).matrix, wanted.matrix)


# Loss

WEIGHTS = [0.5, 2.0, 1.0]
CRITERIA = {
    "cross entropy": (CrossEntropy(), [1.0] * K, 1.0),
    "class weights": (CrossEntropy(WEIGHTS), WEIGHTS, 1.0),
    "all pixels of ohem": (OHEM(0.3, min_kept=9, class_weights=WEIGHTS), WEIGHTS, 1.0),
    "no regions": (WeightedSum([Dice(), CrossEntropy(WEIGHTS)], [1.0, 0.5]), WEIGHTS, 0.5),
    "regions alone": (Dice(), [1.0] * K, 1.0),
    "a sum of regions": (WeightedSum([Dice()], [2.0]), [1.0] * K, 1.0),
}


def literal_loss(probabilities, pictures, weights):
    """The formula in float64, pixel by pixel: sum(-w[y] log p[y]) / sum(w[y])."""
    above = below = 0.0
    for p, sample in zip(probabilities, pictures, strict=True):
        for y, x in zip(*(sample.mask != IGNORE).nonzero(), strict=True):
            truth = sample.mask[y, x]
            above -= weights[truth] * math.log(p[truth, y, x])
            below += weights[truth]
    return above / below


def as_batch(sample):
    return torch.from_numpy(sample.image).permute(2, 0, 1)[None]


@pytest.mark.parametrize("name", CRITERIA)
def test_the_loss_is_the_mean_over_all_labelled_pixels_however_they_are_spread(danet, name):
    criterion, weights, factor = CRITERIA[name]
    nn.init.normal_(danet.head.classify[-1].weight, std=0.5)
    pictures = pictures_of((12, 17), (9, 30), (12, 17), (16, 11), (9, 30))
    # The network as evaluation runs it, so that all that differs is the summation.
    fused = fuse_for_inference(danet, torch.device("cpu"))
    with torch.no_grad():
        maps = [fused(as_batch(s)).logits[0].double().softmax(dim=0).tolist() for s in pictures]
    wanted = factor * literal_loss(map(np.array, maps), pictures, weights)
    sums = []
    for rank, world, size in ((0, 1, 1), (0, 1, 3), (0, 2, 2), (1, 2, 1), (5, 6, 1)):
        loss = PixelLoss(DeepSupervision(criterion).pixel_parts, K)
        run(danet, pictures, counters=[loss], batch_size=size, rank=rank, world=world)
        sums.append(loss.sums)
    for spread in (sums[0], sums[1], sums[2] + sums[3]):
        loss.sums = spread
        assert loss.mean() == pytest.approx(wanted, rel=1e-6)
    assert torch.equal(sums[0], sums[1]), "to the bit in batches of any size"
    assert not sums[4].any(), "a process without a picture has sums of the same shape"


@pytest.mark.parametrize("infer", [*MODES, *PROTOCOLS], ids=lambda i: type(i).__name__)
def test_the_loss_is_that_of_the_probabilities_of_every_mode(model, infer, monkeypatch):
    monkeypatch.setattr(sliding_window, "STRIP", 60)  # also from strips of columns
    monkeypatch.setattr(metrics, "_ELEMENTS", 500)
    pictures = pictures_of((40, 150), (50, 33))
    maps = [infer(model, as_batch(sample))[0].double().numpy() for sample in pictures]
    loss = PixelLoss(DeepSupervision(CrossEntropy()).pixel_parts, K)
    counted = run(model, pictures, infer, [loss])
    assert loss.mean() == pytest.approx(literal_loss(maps, pictures, [1.0] * K), rel=1e-5)
    assert torch.equal(counted.counts, run(model, pictures, infer).counts)


def test_the_loss_takes_little_memory_and_never_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(metrics, "_ELEMENTS", 4096)
    probabilities = torch.randn(1, K, 200, 300).softmax(dim=1)
    mask = torch.randint(0, K, (1, 200, 300), dtype=torch.uint8)
    loss = PixelLoss(DeepSupervision(CrossEntropy(WEIGHTS)).pixel_parts, K)
    before = probabilities.clone()
    with LargestTensor() as largest, no_waiting():
        loss.update(probabilities, mask, are_logits=False)
    assert largest.numel <= 4096
    assert torch.equal(probabilities, before)


def test_a_probability_of_zero_and_labels_that_are_no_classes_leave_the_loss_finite():
    loss = PixelLoss(DeepSupervision(CrossEntropy(WEIGHTS)).pixel_parts, K)
    assert math.isnan(loss.mean()), "nothing is labelled yet"
    scores = torch.tensor([0.0, 1.0, 0.0]).view(1, K, 1, 1).expand(1, K, 1, 3)
    loss.update(scores, torch.tensor([[[0, K, IGNORE]]], dtype=torch.uint8), are_logits=False)
    assert loss.mean() == pytest.approx(-math.log(torch.finfo(torch.float32).tiny))
    assert loss.sums[0, 1] == WEIGHTS[0], "one pixel is counted"


# Precision


@pytest.mark.parametrize("infer", [*MODES, *PROTOCOLS], ids=lambda i: type(i).__name__)
def test_bfloat16_predicts_nearly_the_classes_of_float32(danet, infer, monkeypatch):
    nn.init.normal_(danet.head.classify[-1].weight, std=0.5)  # classes that are not near ties
    image = picture(64, 80, batch=1)
    fused = fuse_for_inference(danet, torch.device("cpu"))
    classes, probabilities = [], []
    for precision in ("float32", "bfloat16"):
        monkeypatch.setattr(infer, "precision", precision)
        classes.append(infer.predict(fused, image))
        probabilities.append(infer(fused, image))
    assert len(classes[0].unique()) > 1
    assert (classes[0] == classes[1]).float().mean() >= 0.98
    assert probabilities[1].dtype == torch.float32
    assert not torch.equal(*probabilities), "the network computed in bfloat16"


def cuda_switches():
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    return cudnn.allow_tf32, products.allow_tf32, cudnn.benchmark


def test_the_precision_alone_sets_autocast_and_tf32(monkeypatch):
    seen = []

    class Look(nn.Module):
        def forward(self, image):
            seen.append((*cuda_switches(), torch.is_autocast_enabled("cpu")))
            return SegmentationOutput(image[:, :2].float(), {})

    monkeypatch.setattr("danet.ops.arithmetic.has_tf32", lambda device: True)
    with cuda_arithmetic(tf32=True, benchmark=True):
        for precision in ("float32", "tf32", "bfloat16"):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "bfloat16"):
                Whole(precision=precision).predict(Look(), picture(8, 8))
        assert cuda_switches() == (True, True, True), "as the process had them"
    assert seen == [
        (False, False, False, False),
        (True, True, False, False),
        (False,) * 3 + (True,),
    ]


def test_tf32_without_a_device_that_has_it_is_refused():
    with pytest.raises(InputError, match=r"evaluation\.precision=tf32 .*; use .*=float32"):
        Whole(precision="tf32").predict(nn.Identity(), picture(8, 8))


def test_logits_of_bfloat16_are_resized_in_float32(danet):
    """Rounded to eight bits, neighbouring classes would often be equal."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = danet.eval()(picture(64, 80)).logits
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_every_config_of_a_mode_names_its_precision():
    for path in sorted((ROOT / "configs/evaluation").glob("*.yaml")):
        node = check(compose(f"evaluation={path.stem}")).evaluation
        assert "precision=float32" in describe(node)
        with pytest.raises(
            InputError, match=r"precision=half: expected one of float32, tf32, bfloat16$"
        ):
            check(compose(f"evaluation={path.stem}", "evaluation.precision=half"))
        assert make({**node, "precision": "bfloat16"}, "evaluation").precision == "bfloat16"
    with pytest.raises(ValueError, match="precision='half' is not one of float32, tf32, bfloat16"):
        Whole(precision="half")
    with pytest.raises(ValueError, match=r"ratio=1 is not in 0\.\.1"):
        BoundaryIoU(3, ratio=1)


def test_the_tool_and_the_training_agree_on_the_score_and_name_the_precision(tmp_path, capsys):
    settings = [*TINY, "data.num_workers=0", "trainer.steps=2", f"run.dir={tmp_path}"]
    call("train", *settings, "evaluation.precision=bfloat16")
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    protocol = "whole (flip=false, max_pixels=4194304, precision=bfloat16)"
    assert f"validation, {protocol}\n" in capsys.readouterr().out
    call("eval", f"checkpoint={tmp_path / 'last.pt'}", f"output={tmp_path}")
    printed = capsys.readouterr().out
    assert f"miou={last['miou']}\n" in printed
    assert f"protocol: {protocol}\n" in printed
    assert json.loads((tmp_path / "metrics.json").read_text())["protocol"] == protocol


def test_a_checkpoint_without_a_precision_was_scored_in_float32(tiny_checkpoint, tmp_path, capsys):
    saved, old = checkpoint_format.load(tiny_checkpoint), tmp_path / "old.pt"
    config = checked_config(saved, "x").plain
    del saved["config"]["evaluation"]["precision"]
    checkpoint_format.save(old, saved)
    assert not differences(checked_config(saved, "old.pt").plain, config)
    call("eval", f"checkpoint={old}", f"output={tmp_path}")
    assert "precision=float32)\n" in capsys.readouterr().out
