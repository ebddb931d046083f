"""Windows cover an image, and a result that comes in bands is the whole result."""

from itertools import pairwise

import pytest
import torch

from danet.evaluation import sliding_window
from danet.evaluation.sliding_window import (
    Band,
    Windows,
    argmax,
    resize_bands,
    sum_maps,
    window_starts,
)
from danet.ops.resize import resize


def test_windows_are_full_inside_and_cover_every_pixel():
    for size in range(1, 60):
        for crop in (1, 2, 7, 32):
            for stride in range(1, crop + 1):
                begins = window_starts(size, crop, stride)
                assert begins == sorted(set(begins))
                assert (begins[0], begins[-1]) == (0, max(size - crop, 0))
                covered = {p for begin in begins for p in range(begin, min(begin + crop, size))}
                assert covered == set(range(size))


@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [((100, 62), (32, 32), (32, 5)), ((90, 71), (40, 32), (3, 8)), ((9, 90), (32, 32), (1, 10))],
    ids=str,
)
def test_bands_follow_each_other_and_hold_the_mean_of_all_windows(size, crop, stride):
    image = torch.rand(2, 3, *size)
    # All windows say the same about a pixel, so their mean does, too.
    found = Windows(crop, stride, 3).bands(lambda windows: windows * 2, image)
    bands = [Band(top, part.clone()) for top, part in found]
    assert [b.top - a.top for a, b in pairwise(bands)] == [
        band.probabilities.shape[2] for band in bands[:-1]
    ]
    whole = sum_maps([bands], size[0])
    torch.testing.assert_close(whole, image * 2)
    torch.testing.assert_close(sum_maps([bands, bands], size[0]), image * 4)
    assert torch.equal(argmax(bands), whole.argmax(dim=1).byte())


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("cuts", [(), (1,), (29,), (7, 8, 20), tuple(range(1, 30))], ids=str)
@pytest.mark.parametrize("size", [(30, 17), (1, 1), (13, 40), (66, 17), (2, 3)], ids=str)
def test_bands_are_resized_as_the_whole_map_is(size, cuts, last):
    whole = torch.rand(2, 5, 30, 17)
    if last:
        whole = whole.contiguous(memory_format=torch.channels_last)
    bands = (Band(a, whole[:, :, a:b]) for a, b in pairwise([0, *cuts, 30]))
    got = sum_maps([resize_bands(bands, 30, size)], size[0])
    torch.testing.assert_close(got, resize(whole, size), atol=1e-6, rtol=1e-6)


def test_bands_of_a_tall_map_are_resized_as_precisely():
    whole = torch.rand(1, 2, 4506, 3)
    bands = (Band(top, whole[:, :, top : top + 500]) for top in range(0, 4506, 500))
    got = sum_maps([resize_bands(bands, 4506, (2048, 3))], 2048)
    torch.testing.assert_close(got, resize(whole, (2048, 3)), atol=1e-6, rtol=1e-6)


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
        def bands(self, infer, image):
            widths.append(image.shape[3])
            return super().bands(infer, image)

    windows = Seen((32, crop), (24, stride))
    expected = argmax(Windows((32, crop), (24, stride)).bands(infer, image))
    assert torch.equal(windows.argmax(infer, image), expected)
    assert max(widths) < 120 + 2 * crop
    assert len(widths) > (2 if width > 200 else 0)
