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


def smooth(height, width):
    """A picture without edges, and a mask of small blocks."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)]
    image = np.stack([127 + 100 * wave for wave in waves], axis=-1).astype(np.uint8)
    return image, ((x // 6 + y // 5) % 7).astype(np.uint8)


def draw(size, scale, seed, shape, **settings):
    """Returns a crop and what it draws from a seed: one axis down, one across."""
    crop = ScaleCrop(size, scale, **settings)
    crop.set_random_seed(seed)
    return crop, crop.get_params_dependent_on_data({"shape": shape}, {})


@pytest.mark.parametrize(
    ("picture", "most", "mean"),
    # Of noise 1/64 of a pixel in each direction may change a value by 2 x 255 / 64.
    [(noise, 2 * 255 / 64 + 2, 1), (smooth, 2, 1)],
    ids=["noise", "smooth"],
)
@pytest.mark.parametrize("shape", [(90, 140), (140, 60), (41, 50), (24, 90), (400, 500)], ids=str)
def test_a_window_is_that_of_scaling_everything_and_then_cutting(shape, picture, most, mean):
    image, mask = picture(*shape)
    size, scale = (64, 72), (0.4, 2.5)
    differences = []
    for seed in range(6 if max(shape) > 400 else 25):
        crop, drawn = draw(size, scale, seed, shape)
        wanted, labels = naive_window(image, mask, seed, size, scale)
        got = crop.apply(image, **drawn)
        assert got.shape == (*size, 3)
        assert np.array_equal(crop.apply_to_mask(mask, **drawn), labels)
        differences.append(abs(got - wanted))
    assert np.max(differences) <= most  # OpenCV rounds weights, and once the values
    assert np.mean(differences) < mean


def test_both_ways_to_resize_are_taken_and_agree(monkeypatch):
    image, _ = noise(400, 500)
    aligned = 0
    for seed in range(60):
        crop, drawn = draw((64, 72), (0.4, 2.5), seed, image.shape)
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


@pytest.mark.parametrize("shape", [(60, 90), (24, 90), (90, 24), (33, 40)], ids=str)
def test_the_edge_of_a_picture_is_not_mixed_with_its_padding(shape):
    """A white picture stays white where the mask has labels, and the padding stays grey."""
    pipeline = Pipeline({"crop": ScaleCrop((128, 160), (1.2, 2.5))})
    white = Sample(np.full((*shape, 3), 255, np.uint8), np.zeros(shape, np.uint8), "white")
    for seed in range(8):
        image, mask, _ = pipeline(white, seed)
        assert (image[mask != IGNORE] == 255).all()
        assert (image[mask == IGNORE] == IMAGE_FILL).all()


def test_windows_and_factors_stay_in_range_and_reach_its_ends():
    factors, corners = [], []
    for seed in range(300):
        _, drawn = draw((32, 32), (0.5, 2.0), seed, (64, 80))
        for axis in drawn.values():
            assert 0 <= axis.start <= max(axis.scaled - 32, 0)
        down = drawn["down"]
        factors.append(down.scaled / 64)
        if down.scaled > 64:
            corners.append(down.start / (down.scaled - 32))
    assert 0.5 <= min(factors) < 0.52
    assert 1.98 < max(factors) <= 2
    assert np.mean(factors) == pytest.approx(1.25, abs=0.1)
    assert min(corners) < 0.03
    assert max(corners) > 0.97


@pytest.mark.parametrize(
    ("factor", "shape", "expected"), [(1, (100, 160), (50, 80)), (2, (160, 100), (160, 100))]
)
def test_base_is_the_short_side_at_factor_one(factor, shape, expected):
    _, drawn = draw((32, 32), (factor, factor), 0, shape, base=50)
    assert (drawn["down"].scaled, drawn["across"].scaled) == expected


@pytest.mark.parametrize("seed", range(15))
def test_image_and_mask_go_through_the_same_geometry(seed):
    y, x = np.mgrid[:70, :90]
    mask = (x // 4 + 2 * (y // 4)).astype(np.uint8)  # rises by 1 and by 2 from block to block
    image = np.repeat(2 * mask[..., None], 3, axis=-1)
    steps = {"crop": ScaleCrop((40, 48), (0.5, 2.0)), "mirror": A.HorizontalFlip(p=0.5)}
    result = Pipeline(steps)(Sample(image, mask, "ramp"), seed)
    inside = result.mask != IGNORE
    inside &= cv2.erode(inside.astype(np.uint8), np.ones((3, 3)), borderValue=0) > 0
    difference = abs(result.image[..., 0] / 2 - result.mask)[inside]
    assert len(np.unique(result.mask[inside])) > 10
    assert difference.max() <= 2
    assert np.mean(difference) < 0.5


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
    ("transform", "arguments", "message"),
    [
        (ScaleCrop, {"size": (31, 64)}, r"size=\[31, 64\] is not \[height, width\] of at least 32"),
        (ScaleCrop, {"size": (64,)}, r"size=\[64\] is not \[height, width\]"),
        (ScaleCrop, {"size": (64, 64), "scale": (2, 1)}, r"scale=\[2, 1\] is not \[low, high\]"),
        (ScaleCrop, {"size": (64, 64), "scale": (0, 1)}, r"scale=\[0, 1\] is not \[low, high\]"),
        (ScaleCrop, {"size": (64, 64), "scale": (1,)}, r"scale=\[1\] is not \[low, high\]"),
        (ColorJitter, {"brightness": (-0.1, 1)}, r"=\[-0.1, 1\] is not .* with 0 <= low"),
        (ColorJitter, {"contrast": (2, 1)}, r"contrast=\[2, 1\] is not \[low, high\]"),
        (ColorJitter, {"saturation": (1,)}, r"saturation=\[1\] is not \[low, high\]"),
        (ColorJitter, {"hue": (-0.6, 0)}, r"hue=\[-0.6, 0\] .* -0.5 <= low <= high <= 0.5"),
    ],
)
def test_bad_arguments_are_named(transform, arguments, message):
    with pytest.raises(ValueError, match=message):
        transform(**arguments)
