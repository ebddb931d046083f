"""A network of bands starts as that of RGB, and takes raw values."""

import math

import numpy as np
import pytest
import torch
from conftest import Tiny, tiny
from torch import nn

from danet.bands import MAX_BANDS, bands_of
from danet.errors import InputError
from danet.models.resnet import ResNet
from danet.models.segmentor import Segmentor

IMAGE = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3)).astype(np.uint8)
STEMS = {
    "7x7": lambda **of: ResNet(depth=18, width=8, **of),
    "64-64-128": lambda **of: ResNet(depth=18, width=8, stem="64-64-128", **of),
    "32-32-64": lambda **of: ResNet(depth=18, width=16, stem="32-32-64", **of),
}


def network(backbone, **settings):
    """A network whose weights and statistics are always the same."""
    torch.manual_seed(0)
    head = tiny(dropout=0).head
    made = backbone()
    model = Segmentor(made, lambda width: nn.Identity(), **settings)
    model.head = type(head)(made.channels[-1], num_classes=3, channels=8, dropout=0)
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if value.ndim == 1 or name.startswith("head"):
            value.data = torch.rand(value.shape, generator=generator)
    return model.eval()


def logits(model, image):
    with torch.no_grad():
        return model(torch.from_numpy(image).movedim(-1, 1).contiguous()).logits


@pytest.mark.parametrize("stem", STEMS)
def test_further_bands_change_no_logit_at_the_start(stem):
    rgb = network(STEMS[stem])
    more = network(STEMS[stem], channels=5)
    wide = np.concatenate([IMAGE, IMAGE[..., 1:]], axis=3)
    wide[..., 4] = 255
    assert torch.equal(logits(more, wide), logits(rgb, IMAGE))


@pytest.mark.parametrize("stem", STEMS)
def test_bands_in_another_order_and_unit_are_the_same_picture(stem):
    rgb = network(STEMS[stem])
    other = network(STEMS[stem], channels=[4, 2, 3, 9], rgb=[3, 2, 4], range=[1000, 6100])
    bgr = 1000 + 20 * IMAGE[..., [2, 1, 0, 0]].astype(np.float32)
    torch.testing.assert_close(logits(other, bgr), logits(rgb, IMAGE), rtol=1e-4, atol=1e-4)


def test_one_grey_band_is_rgb_of_three_equal_ones():
    alike = {"mean": [120.0] * 3, "std": [60.0] * 3}
    rgb, grey = network(Tiny, **alike), network(Tiny, channels=1, **alike)
    band = IMAGE[..., :1]
    expected = logits(rgb, np.repeat(band, 3, axis=3))
    torch.testing.assert_close(logits(grey, band), expected, rtol=1e-5, atol=1e-5)
    assert grey.mean.flatten().tolist() == [120]


def test_a_band_of_two_colours_gets_their_average_normalisation():
    mean, std = [10.0, 20.0, 60.0], [1.0, 2.0, 6.0]
    two = network(Tiny, channels=[7, 8], rgb=[7, 7, 8], range=[100, 610], mean=mean, std=std)
    assert two.mean.flatten().tolist() == [100 + 2 * 15, 100 + 2 * 60]
    assert two.std.flatten().tolist() == [2 * 1.5, 2 * 6]
    none = network(Tiny, channels=4, mean=mean, std=std)
    assert none.mean.flatten().tolist() == [10, 20, 60, 30]


def test_a_further_band_learns_from_the_first_step():
    model = network(Tiny, channels=4).train()
    wide = np.concatenate([IMAGE, IMAGE[..., :1]], axis=3)
    loss = model(torch.from_numpy(wide).movedim(-1, 1)).logits[:, 0].square().mean()
    loss.backward()
    gradient = model.backbone.first[0].weight.grad
    assert (gradient[:, 3].abs().amax(dim=(1, 2)) > 0).any()


def test_weights_of_other_seeds_are_not_touched_by_the_inflation():
    torch.manual_seed(3)
    Segmentor(Tiny(), lambda width: nn.Conv2d(width, 2, 1))
    after_rgb = torch.rand(1)
    torch.manual_seed(3)
    Segmentor(Tiny(), lambda width: nn.Conv2d(width, 2, 1), channels=9)
    assert torch.equal(torch.rand(1), after_rgb)


@pytest.mark.parametrize("freeze", ["stem", 1, "all"])
def test_a_frozen_stem_refuses_bands_it_would_never_read(freeze):
    with pytest.raises(
        InputError, match=r"the stem is frozen, so bands \[4, 5\] would never be read"
    ):
        network(lambda: STEMS["7x7"](freeze=freeze), channels=5)
    frozen = network(lambda: STEMS["7x7"](freeze=freeze), channels=[3, 2, 1])
    assert not frozen.backbone.conv1.weight.requires_grad


def test_a_backbone_without_a_convolution_of_rgb_is_refused():
    class Odd(Tiny):
        def __init__(self):
            super().__init__()
            self.first[0] = nn.Conv2d(48, 4, 3)

    with pytest.raises(InputError, match="no plain convolution of RGB"):
        network(Odd, channels=4)


def test_what_is_no_batch_of_the_bands_is_refused():
    model = network(Tiny, channels=4)
    with pytest.raises(ValueError, match=r"expected raw values of 4 band\(s\)"):
        model(torch.zeros(1, 3, 32, 32))


WRONG = [
    ({"channels": 0}, "data.channels=0: expected the number of bands, 1 to 128"),
    ({"channels": MAX_BANDS + 1}, "data.channels=129"),
    ({"channels": 10**12}, "data.channels=1000000000000"),
    ({"channels": True}, "data.channels=True"),
    ({"channels": "all"}, "data.channels=all"),
    ({"channels": []}, "data.channels="),
    ({"channels": [0, 1]}, "from 1 on"),
    ({"channels": [1, 1]}, "each once"),
    ({"range": [0, 9]}, "data.range=[0, 9]: expected data.channels, too"),
    ({"range": "auto"}, "data.range=auto: expected data.channels"),
    ({"rgb": [1, 2, 3]}, "data.rgb=[1, 2, 3]: expected data.channels"),
    ({"channels": 4, "range": [9, 9]}, "data.range=[9, 9]: expected the values of black and white"),
    ({"channels": 4, "range": [9, 0]}, "low before high"),
    ({"channels": 4, "range": [0, math.inf]}, "data.range="),
    ({"channels": 4, "range": [0, math.nan]}, "data.range="),
    ({"channels": 4, "range": [[0, 1]] * 3}, "for each of the 4 band(s)"),
    ({"channels": 4, "range": [0, [1]]}, "data.range="),
    ({"channels": 4, "range": [0, 1, 2]}, "data.range="),
    ({"channels": 4, "range": "full"}, "or auto"),
    ({"channels": 4, "range": 5}, "data.range=5"),
    ({"channels": 4, "rgb": [1, 2]}, "data.rgb=[1, 2]: expected the numbers of the red"),
    ({"channels": [2, 3, 4], "rgb": [1, 2, 3]}, "all among data.channels: [2, 3, 4]"),
    ({"channels": 4, "rgb": "bgr"}, "data.rgb=bgr"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=str)
def test_settings_that_do_not_fit_are_named(settings, message):
    given = (settings.get(key) for key in ("channels", "range", "rgb"))
    with pytest.raises(InputError) as caught:
        bands_of(*given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fewer_than_three_bands_are_shown_as_grey():
    assert bands_of([5, 6], None, None).rgb == (0, 0, 0)
    shown = bands_of([5, 6], [0, 1000], None).show(np.array([[[500, 7]]], np.uint16))
    assert shown.tolist() == [[[128, 128, 128]]]


def test_a_picture_is_stretched_by_the_range_and_cut_off_beyond():
    bands = bands_of([1, 2, 3, 4], [[0, 100], [-1, 1], [5, 10], [0, 1]], [2, 3, 4])
    raw = np.array([[[0, -1, 10, 0.5], [0, 9, 7.5, np.nan]]], np.float32)
    assert bands.show(raw).tolist() == [[[0, 255, 128], [255, 128, 0]]]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.float32])
def test_black_that_a_type_cannot_hold_is_its_nearest_value(kind):
    bands = bands_of(2, [[-50000, 1e6], [3, 4]], None)
    image = np.full((1, 1, 2), 9, kind)
    bands.fill(image, np.ones(image.shape, bool))
    least = -50000 if kind is np.float32 else np.iinfo(kind).min
    assert image.tolist() == [[[least, 3]]]
