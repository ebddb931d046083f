"""Windows cover an image, and a result that comes in bands is the whole result."""

from itertools import pairwise

import pytest
import torch

from danet.evaluation import sliding_window as evaluation_windows
from danet.evaluation.sliding_window import (
    Band,
    Windows,
    argmax,
    concat_bands,
    resize_bands,
    window_starts,
)
from danet.ops.resize import resize


def test_windows_are_full_inside_and_cover_every_pixel():
    for size in range(1, 60):
        for crop in (1, 2, 7, 32):
            for stride in range(1, crop + 1):
                begins = window_starts(size, crop, stride)
                assert begins == sorted(set(begins))
                assert begins[0] == 0
                assert begins[-1] == max(size - crop, 0)
                assert all(b - a <= stride for a, b in pairwise(begins))
                covered = {p for begin in begins for p in range(begin, min(begin + crop, size))}
                assert covered == set(range(size))


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [((50, 31), (16, 16), (16, 5)), ((50, 31), (16, 8), (3, 8)), ((9, 90), (10, 10), (1, 10))],
    ids=str,
)
def test_bands_follow_each_other_and_hold_the_mean_of_all_windows(size, crop, stride, last):
    image = torch.rand(2, 3, *size)

    def infer(windows):  # all windows say the same about a pixel, so their mean does, too
        order = torch.channels_last if last else torch.contiguous_format
        return (windows * 2).contiguous(memory_format=order)

    bands = [Band(top, part.clone()) for top, part in Windows(crop, stride, 3).bands(infer, image)]
    assert [b.top - a.top for a, b in pairwise(bands)] == [
        band.probabilities.shape[2] for band in bands[:-1]
    ]
    torch.testing.assert_close(concat_bands(iter(bands), size[0]), image * 2)
    assert torch.equal(
        argmax(iter(bands), size[0]), concat_bands(bands, size[0]).argmax(dim=1).byte()
    )


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("cuts", [(), (1,), (29,), (7, 8, 20), tuple(range(1, 30))], ids=str)
@pytest.mark.parametrize("size", [(30, 17), (1, 1), (13, 40), (66, 17), (31, 9), (2, 3)], ids=str)
def test_bands_are_resized_as_the_whole_map_is(size, cuts, last):
    whole = torch.rand(2, 5, 30, 17)
    if last:
        whole = whole.contiguous(memory_format=torch.channels_last)
    edges = [0, *cuts, 30]
    bands = (Band(a, whole[:, :, a:b]) for a, b in pairwise(edges))
    got = concat_bands(resize_bands(bands, 30, size), size[0])
    torch.testing.assert_close(got, resize(whole, size), atol=1e-6, rtol=1e-6)


def test_bands_of_a_tall_map_are_resized_as_precisely():
    whole = torch.rand(1, 2, 4506, 3)
    bands = (Band(top, whole[:, :, top : top + 500]) for top in range(0, 4506, 500))
    got = concat_bands(resize_bands(bands, 4506, (2048, 3)), 2048)
    torch.testing.assert_close(got, resize(whole, (2048, 3)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("width", "crop", "stride"), [(200, 16, 12), (203, 16, 5), (65, 32, 32), (90, 100, 40)]
)
def test_strips_of_a_wide_image_give_the_classes_of_its_bands(monkeypatch, width, crop, stride):
    monkeypatch.setattr(evaluation_windows, "STRIP", 60)
    image = torch.rand(2, 3, 40, width, dtype=torch.float64)  # nothing is near a tie

    def infer(part):  # says something else about a pixel in each window
        return (part - part.mean(dim=(2, 3), keepdim=True)).softmax(dim=1)

    windows = Windows((16, crop), (12, stride))
    expected = argmax(windows.bands(infer, image), 40)
    assert torch.equal(windows.argmax(infer, image), expected)
    if width > 100:
        assert len(windows.strips(width)) > 2
