"""Windows cover an image, and a result that comes in bands is the whole result."""

from itertools import pairwise

import pytest
import torch

from danet.evaluation import sliding_window
from danet.evaluation.sliding_window import Windows, argmax, resize_bands, sum_maps, window_starts
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
    bands = [part.clone() for part in found]
    assert len(bands) == len(window_starts(size[0], min(size[0], crop[0]), stride[0]))
    whole = sum_maps([bands], size[0])
    torch.testing.assert_close(whole, image * 2)
    torch.testing.assert_close(sum_maps([bands, bands], size[0]), image * 4)
    assert torch.equal(argmax(bands), whole.argmax(dim=1).byte())


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
    expected = argmax(Windows((32, crop), (24, stride)).bands(infer, image))
    assert torch.equal(windows.argmax(infer, image), expected)
    assert max(widths) < 120 + 2 * crop
    assert len(widths) > (2 if width > 200 else 0)
