"""Boundary IoU and the mean of single images: equal to a literal version."""

import math

import numpy as np
import pytest
import torch

from danet.evaluation.metrics import BoundaryIoU, ConfusionMatrix, image_iou
from danet.types import IGNORE

K = 4


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


def test_a_right_prediction_has_a_boundary_iou_of_one_and_absent_classes_have_none():
    truth = blobs(0)
    truth[truth == 3] = 2
    counter = BoundaryIoU(K)
    counter.update(truth, truth)
    assert counter.iou().tolist() == pytest.approx([1.0, 1.0, 1.0, math.nan], nan_ok=True)


@pytest.mark.parametrize("ratio", [0, 1, -0.1])
def test_a_ratio_that_is_no_part_is_refused(ratio):
    with pytest.raises(ValueError, match=r"is not in 0\.\.1"):
        BoundaryIoU(K, ratio)


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
