"""Published procedures are followed to the letter: each equals a slow version, step by step."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from danet.errors import InputError
from danet.evaluation.protocols import AuthorsProtocol, MMSegProtocol
from danet.models.segmentor import IMAGENET_MEAN, IMAGENET_STD
from danet.types import SegmentationOutput

K = 4
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))


class Network(nn.Module):
    """Logits of a normalised image, which depend on the window, on its border, left and right."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, K, 5, padding=2)

    def forward(self, x):
        return 2 * self.conv(x) + x.mean(dim=(2, 3), keepdim=True).sum(dim=1, keepdim=True) ** 2


class WholeNetwork(nn.Module):
    """The same behind the interface of a Segmentor: RGB bytes or floats in 0..255."""

    def __init__(self, network, align_corners=True):
        super().__init__()
        self.network, self.align_corners = network, align_corners

    def forward(self, image):
        return SegmentationOutput(self.network((image.float() - MEAN) / STD), {})


@pytest.fixture
def network():
    return Network().eval().requires_grad_(False)


def picture(height, width):
    return torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)


# PAPER.md says in section 3 what the authors' module does, in six steps.


def authors_steps(network, image, base, crop, scales, rate):
    """The steps, one by one, over a normalised image; returns the score of every class."""
    _, _, height, width = image.shape
    image = (image.float() - MEAN) / STD
    scores = torch.zeros(1, K, height, width)
    for scale in scales:
        # 1: the long side, and the other one rounded half up.
        long = math.ceil(base * scale)
        if height > width:
            rows, columns = long, int(width * long / height + 0.5)
            short = columns
        else:
            rows, columns = int(height * long / width + 0.5), long
            short = rows
        scaled = _resize(image, rows, columns)
        if long <= crop:  # 2
            result = _window(network, _fill(scaled, crop))[:, :, :rows, :columns]
        else:  # 3
            filled = _fill(scaled, crop) if short < crop else scaled
            _, _, tall, wide = filled.shape
            stride = int(crop * rate)
            total, count = torch.zeros(1, K, tall, wide), torch.zeros(1, 1, tall, wide)
            for i in range(math.ceil((tall - crop) / stride) + 1):
                for j in range(math.ceil((wide - crop) / stride) + 1):
                    top, left = i * stride, j * stride
                    bottom, right = min(top + crop, tall), min(left + crop, wide)
                    window = _fill(filled[:, :, top:bottom, left:right], crop)
                    real = _window(network, window)[:, :, : bottom - top, : right - left]
                    total[:, :, top:bottom, left:right] += real
                    count[:, :, top:bottom, left:right] += 1
            result = (total / count)[:, :, :rows, :columns]  # 6
        scores += _resize(result, height, width)
    return scores


def _resize(x, rows, columns):
    return F.interpolate(x, (rows, columns), mode="bilinear", align_corners=True)


def _fill(image, crop):
    """4: black on the right and at the bottom, channel by channel."""
    _, _, height, width = image.shape
    below, right = max(crop - height, 0), max(crop - width, 0)
    parts = [
        F.pad(image[:, c : c + 1], (0, right, 0, below), value=float(-MEAN[0, c] / STD[0, c]))
        for c in range(3)
    ]
    return torch.cat(parts, dim=1)


def _window(network, image):
    """5: logits, plus those of the mirror image turned back, then exp."""
    return (network(image) + network(image.flip(3)).flip(3)).exp()


CROP = 48
SIZES = {
    "smaller than the crop": (22, 36),
    "equal to it": (48, 48),
    "wider": (40, 96),
    "higher": (100, 37),
    "larger": (90, 130),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("base", ["long side", 64], ids=["as it is", "scaled"])
@pytest.mark.parametrize(
    ("scales", "rate"),
    [((1.0,), 2 / 3), ((0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.2), 0.5)],
    ids=["single", "multi"],
)
def test_the_authors_protocol_is_their_six_steps(network, size, base, scales, rate):
    image = picture(*size)
    base = max(size) if base == "long side" else base
    expected = authors_steps(network, image, base, CROP, scales, rate)
    infer = AuthorsProtocol(base_size=base, crop=CROP, scales=scales, stride_rate=rate)
    found = infer(WholeNetwork(network), image)
    probabilities = expected / expected.sum(dim=1, keepdim=True)
    torch.testing.assert_close(found, probabilities, rtol=1e-4, atol=1e-5)
    differs = infer.predict(WholeNetwork(network), image) != expected.argmax(dim=1)
    assert differs.float().mean() <= 0.001, "beyond what rounding may turn"


class Counting(nn.Module):
    align_corners = True

    def __init__(self):
        super().__init__()
        self.images = 0

    def forward(self, image):
        self.images += image.shape[0]
        return SegmentationOutput(image[:, :1].float(), {})


@pytest.mark.parametrize(
    ("choice", "passes"),
    [("danet_single", 16), ("danet_multi", 190), ("mmseg_single", 1), ("mmseg_multi", 12)],
)
def test_a_picture_of_cityscapes_takes_the_published_number_of_passes(choice, passes, monkeypatch):
    from test_config import compose

    from danet.config.build import make
    from danet.config.validate import check

    infer = make(check(compose(f"evaluation={choice}")).evaluation, "evaluation")
    model = Counting()
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda _: True)  # the meta device knows no values
    infer.predict(model, torch.empty(1, 3, 1024, 2048, dtype=torch.uint8, device="meta"))
    assert model.images == passes


@pytest.mark.parametrize("scales", [[1.0], [0.5, 1.0, 2.0]], ids=str)
def test_sums_that_are_infinite_are_an_error(scales):
    infer = AuthorsProtocol(base_size=64, crop=CROP, scales=scales, stride_rate=0.5)

    def sure(value):  # and as much from the mirror image; the largest exponent is 88.7
        return lambda image: SegmentationOutput(torch.full_like(image[:, :2], value / 2), {})

    for value in (88.5, 89):  # one is too large only where windows overlap
        with pytest.raises(InputError, match="not finite in float32; take evaluation=multi_scale"):
            infer.predict(sure(value), picture(50, 90))
    infer.predict(sure(84), picture(50, 90))


# mmsegmentation


def mmseg_steps(network, image, ratios, flip, crop, stride, align, box=None):
    """Every pass whole at the image's size, then the mean of the softmax."""
    _, _, height, width = image.shape
    total, count = torch.zeros(1, K, height, width), 0
    for ratio in ratios:
        factor = ratio
        if box:
            factor = min(
                int(max(box) * ratio) / max(height, width),
                int(min(box) * ratio) / min(height, width),
            )
        rows, columns = int(height * factor + 0.5), int(width * factor + 0.5)
        scaled = F.interpolate(
            image.float(), (rows, columns), mode="bilinear", align_corners=False
        ).round()
        for mirrored in (False, True) if flip else (False,):
            x = (scaled.flip(3) if mirrored else scaled) - MEAN
            logits = _mmseg_logits(network, x / STD, crop, stride)
            logits = logits.flip(3) if mirrored else logits
            logits = F.interpolate(logits, (height, width), mode="bilinear", align_corners=align)
            total += logits.softmax(dim=1)
            count += 1
    return total / count


def _mmseg_logits(network, x, crop, stride):
    if crop is None:
        return network(x)
    _, _, height, width = x.shape
    total, count = torch.zeros(1, K, height, width), torch.zeros(1, 1, height, width)
    for i in range(max(height - crop[0] + stride[0] - 1, 0) // stride[0] + 1):
        for j in range(max(width - crop[1] + stride[1] - 1, 0) // stride[1] + 1):
            bottom = min(i * stride[0] + crop[0], height)
            right = min(j * stride[1] + crop[1], width)
            top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
            total[:, :, top:bottom, left:right] += network(x[:, :, top:bottom, left:right])
            count[:, :, top:bottom, left:right] += 1
    return total / count


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize(
    ("ratios", "flip"), [((1.0,), False), ((0.5, 1.0, 1.75), True)], ids=["single", "multi"]
)
@pytest.mark.parametrize("windows", [None, ((48, 48), (31, 31))], ids=["whole", "windows"])
@pytest.mark.parametrize("box", [None, (128, 40)], ids=["as it is", "to a box"])
def test_the_protocol_of_mmsegmentation_is_its_steps(
    network, size, align, ratios, flip, windows, box
):
    image = picture(*size)
    crop, stride = windows or (None, None)
    expected = mmseg_steps(network, image, ratios, flip, crop, stride, align, box)
    infer = MMSegProtocol(scale=box, ratios=ratios, flip=flip, crop=crop, stride=stride)
    found = infer(WholeNetwork(network, align), image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    differs = infer.predict(WholeNetwork(network, align), image) != expected.argmax(dim=1)
    assert differs.float().mean() <= 0.001


def test_corners_follow_the_network_unless_they_are_set(network):
    image = picture(40, 70)
    found = [
        MMSegProtocol(ratios=[0.5], align_corners=given)(WholeNetwork(network, own), image)
        for given, own in ((None, True), (True, False), (None, False), (False, True))
    ]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[3])
    assert (found[0] - found[2]).abs().max() > 1e-3
