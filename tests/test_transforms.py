"""Crop and colours: equal to the slow order, to the formula, and to the libraries they replace."""

import itertools

import albumentations as A
import cv2
import numpy as np
import pytest
from albumentations.augmentations.pixel import functional as library

from danet.data.transforms import IMAGE_FILL, ColorJitter, Pipeline, ScaleCrop
from danet.types import IGNORE, Sample

# Scale and crop


def noise(height, width):
    rng = np.random.default_rng(height)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, rng.integers(0, 200, (height, width), dtype=np.uint8)


def scale_whole(image, mask, rows, columns):
    """Scales a whole picture by the definition, in float64: pixel i lies at (i + 0.5) s - 0.5."""

    def places(count, source):
        return (np.arange(count) + 0.5) * (source / count) - 0.5

    def along(axis, array, count):
        at = places(count, array.shape[axis])
        low, share = np.floor(at).astype(int), at - np.floor(at)
        share = share.reshape([-1 if i == axis else 1 for i in range(3)])
        first = array.take(low.clip(0, array.shape[axis] - 1), axis)
        second = array.take((low + 1).clip(0, array.shape[axis] - 1), axis)
        return first * (1 - share) + second * share

    scaled = along(1, along(0, image.astype(float), rows), columns)
    sizes = zip((rows, columns), mask.shape, strict=True)
    nearest = [np.floor(places(count, source) + 0.5).astype(int) for count, source in sizes]
    return scaled, mask[np.ix_(*nearest)]


def naive_window(image, mask, seed, size, scale):
    """Draws as ScaleCrop does, scales everything, then cuts and pads."""
    crop = ScaleCrop(size, scale)
    crop.set_random_seed(seed)
    factor = crop.py_random.uniform(*scale)
    rows, columns = (max(1, round(n * factor)) for n in mask.shape)
    top = crop.py_random.randint(0, max(0, rows - size[0]))
    left = crop.py_random.randint(0, max(0, columns - size[1]))
    image, mask = scale_whole(image, mask, rows, columns)
    window = np.tile(np.array(IMAGE_FILL, float), (*size, 1))
    labels = np.full(size, IGNORE, np.uint8)
    image, mask = (a[top : top + size[0], left : left + size[1]] for a in (image, mask))
    window[: image.shape[0], : image.shape[1]] = image
    labels[: mask.shape[0], : mask.shape[1]] = mask
    return window, labels


@pytest.mark.parametrize("shape", [(90, 140), (140, 60), (41, 50), (400, 500)], ids=str)
def test_a_window_is_that_of_scaling_everything_and_then_cutting(shape):
    """On noise, where 1/64 of a pixel in each direction may change a value by 2 x 255 / 64."""
    image, mask = noise(*shape)
    size, scale = (64, 72), (0.4, 2.5)
    differences = []
    for seed in range(6 if max(shape) > 400 else 25):
        crop = ScaleCrop(size, scale)
        crop.set_random_seed(seed)
        drawn = crop.get_params_dependent_on_data({"shape": image.shape}, {})
        wanted, labels = naive_window(image, mask, seed, size, scale)
        got = crop.apply(image, **drawn)
        assert got.shape == (*size, 3)
        assert np.array_equal(crop.apply_to_mask(mask, **drawn), labels)
        differences.append(abs(got - wanted))
    assert np.max(differences) <= 2 * 255 / 64 + 2  # OpenCV rounds weights, and once the values
    assert np.mean(differences) < 1


def test_both_ways_to_resize_are_taken_and_agree(monkeypatch):
    image, _ = noise(400, 500)
    aligned = 0
    for seed in range(60):
        crop = ScaleCrop((64, 72), (0.4, 2.5))
        crop.set_random_seed(seed)
        drawn = crop.get_params_dependent_on_data({"shape": image.shape}, {})
        is_aligned = all(axis.aligned() is not None for axis in drawn.values())
        aligned += is_aligned
        if is_aligned:
            fast = crop.apply(image, **drawn)
            with monkeypatch.context() as patch:
                patch.setattr(type(drawn["down"]), "aligned", lambda self: None)
                slow = crop.apply(image, **drawn)
            assert abs(fast.astype(int) - slow).max() <= 4 * 255 / 64 + 2  # each is off by 1/64
    assert 45 <= aligned < 60


def test_a_crop_without_scaling_copies_pixels():
    image, mask = noise(90, 140)
    for seed in range(10):
        got = Pipeline({"crop": ScaleCrop((64, 72), (1, 1))})(Sample(image, mask, "x"), seed)
        corners = itertools.product(range(90 - 64 + 1), range(140 - 72 + 1))
        assert any(
            np.array_equal(got.image, image[top : top + 64, left : left + 72])
            and np.array_equal(got.mask, mask[top : top + 64, left : left + 72])
            for top, left in corners
        )


class Probe(A.DualTransform):
    """Keeps what albumentations hands to a transform."""

    def __init__(self):
        super().__init__(p=1.0)
        self.seen = []

    def apply(self, img, **_):
        self.seen.append(img)
        return img

    def apply_to_mask(self, mask, **_):
        self.seen.append(mask)
        return mask


def test_the_first_transform_gets_the_picture_itself_and_no_copy():
    image, mask = noise(50, 60)
    probe = Probe()
    Pipeline({"probe": probe})(Sample(image, mask, "x"), 0)
    assert all(np.shares_memory(*pair) for pair in zip(probe.seen, (image, mask), strict=True))


# Colours


def muted(height=60, width=80):
    """Colours in the middle of the range, which no factor of the tests drives out of it."""
    return np.random.default_rng(1).integers(80, 160, (height, width, 3), dtype=np.uint8)


def formula(image, *, brightness=1.0, contrast=1.0, saturation=1.0):
    """torchvision's definitions one after the other, in float64."""
    luma = np.array([0.299, 0.587, 0.114])
    x = image * brightness
    x = x * contrast + (1 - contrast) * (x @ luma).mean()
    return x * saturation + (1 - saturation) * (x @ luma)[..., None]


CHANGES = [
    {"brightness": 1.2},
    {"brightness": 0.75},
    {"contrast": 1.3},
    {"contrast": 0.7},
    {"saturation": 1.3},
    {"saturation": 0.0},
    {"brightness": 1.1, "contrast": 0.8, "saturation": 1.25},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_colours_follow_the_formulas(change):
    image = muted()
    got = ColorJitter().apply(image, **change)
    assert got.dtype == np.uint8
    assert abs(got - formula(image, **change)).max() <= 1


@pytest.mark.parametrize(
    "order", list(itertools.permutations(["brightness", "contrast", "saturation"]))
)
def test_albumentations_gives_the_same_in_any_order(order):
    """To 1 for each of its three roundings down."""
    factors = {"brightness": 1.1, "contrast": 0.8, "saturation": 1.25}
    wanted = muted()
    for name in order:
        wanted = getattr(library, f"adjust_{name}_torchvision")(wanted, factors[name])
    assert abs(ColorJitter().apply(muted(), **factors) - wanted.astype(int)).max() <= 4


@pytest.mark.parametrize("hue", [-0.25, -0.05, 0.04, 1 / 3])
def test_hue_turns_colours_as_in_hsv_and_keeps_grey_and_luma(hue):
    pure = np.array([[[150, 90, 90], [90, 150, 90], [90, 90, 150], [120, 120, 120]]], np.uint8)
    got = ColorJitter().apply(pure, hue=hue)
    turned = cv2.cvtColor(got, cv2.COLOR_RGB2HSV)[0, :3, 0] * 2.0
    wanted = np.array([0, 120, 240]) + 360 * hue
    assert (abs((turned - wanted + 180) % 360 - 180) <= 4).all()
    assert got[0, 3].tolist() == [120, 120, 120]
    luma = np.array([0.299, 0.587, 0.114])
    assert abs(got @ luma - pure @ luma).max() <= 1


def test_nothing_drawn_changes_nothing_and_values_stop_at_the_ends():
    image = noise(40, 50)[0]
    assert np.array_equal(ColorJitter().apply(image), image)
    bright = ColorJitter().apply(image, brightness=5.0)
    assert (bright[image >= 52] == 255).all()


def test_factors_fill_their_ranges():
    jitter, drawn = ColorJitter((0.5, 1.5), (0.8, 0.9), (1, 1), (-0.1, 0.1), p=1), []
    for seed in range(200):
        jitter.set_random_seed(seed)
        drawn.append(list(jitter.get_params().values()))
    low, high = np.min(drawn, axis=0), np.max(drawn, axis=0)
    assert low == pytest.approx([0.5, 0.8, 1, -0.1], abs=0.02)
    assert high == pytest.approx([1.5, 0.9, 1, 0.1], abs=0.02)
    assert (low >= [0.5, 0.8, 1, -0.1]).all()
    assert (high <= [1.5, 0.9, 1, 0.1]).all()


def test_colour_leaves_the_mask_alone():
    image, mask = noise(40, 50)
    got = Pipeline({"color": ColorJitter(p=1)})(Sample(image, mask, "x"), 3)
    assert np.array_equal(got.mask, mask)
    assert not np.array_equal(got.image, image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"brightness": (-0.1, 1)}, r"brightness=\[-0.1, 1\] is not \[low, high\] with 0 <= low"),
        ({"contrast": (2, 1)}, r"contrast=\[2, 1\] is not \[low, high\]"),
        ({"saturation": (1,)}, r"saturation=\[1\] is not \[low, high\]"),
        ({"hue": (-0.6, 0)}, r"hue=\[-0.6, 0\] is not \[low, high\] with -0.5 <= low <= high <= 0"),
    ],
)
def test_bad_ranges_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ColorJitter(**arguments)
