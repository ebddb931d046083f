"""Crop and colours: equal to the slow order and to the formula."""

import albumentations as A
import cv2
import numpy as np
import pytest

from danet.data.transforms import IMAGE_FILL, ColorJitter, Pipeline, ScaleCrop
from danet.types import IGNORE, Sample

# Scale and crop


def noise(height, width):
    rng = np.random.default_rng(height)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, rng.integers(0, 200, (height, width), dtype=np.uint8)


def interpolate(array, axis, at):
    """Interpolates between the pixels of an axis at places given as pixel centres, in float64."""
    low, share = np.floor(at).astype(int), at - np.floor(at)
    share = share.reshape([-1 if i == axis else 1 for i in range(3)])
    first = array.take(low.clip(0, array.shape[axis] - 1), axis)
    second = array.take((low + 1).clip(0, array.shape[axis] - 1), axis)
    return first * (1 - share) + second * share


def slow_window(image, mask, seed, size, scale):
    """Draws as ScaleCrop does, and computes every pixel of the window by the definition."""
    crop = ScaleCrop(size, scale)
    crop.set_random_seed(seed)
    factor = crop.py_random.uniform(*scale)
    window = np.tile(np.array(IMAGE_FILL, float), (*size, 1))
    labels = np.full(size, IGNORE, np.uint8)
    image, places = image.astype(float), []
    for axis, wanted in enumerate(size):
        source = mask.shape[axis]
        scaled = max(1, round(source * factor))
        step, length = source / scaled, min(wanted, scaled)
        start = crop.py_random.randint(0, int(source - length * step))
        at = start + (np.arange(length) + 0.5) * step - 0.5
        image = interpolate(image, axis, np.maximum(at, start))  # nothing before the window
        places.append(np.floor(at + 0.5).astype(int))
    window[: image.shape[0], : image.shape[1]] = image
    labels[: image.shape[0], : image.shape[1]] = mask[np.ix_(*places)]
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


@pytest.mark.parametrize("picture", [noise, smooth])
@pytest.mark.parametrize("shape", [(90, 140), (140, 60), (41, 50), (24, 90), (400, 500)], ids=str)
def test_a_window_is_that_of_computing_each_pixel(shape, picture):
    image, mask = picture(*shape)
    size, scale = (64, 72), (0.4, 2.5)
    for seed in range(6 if max(shape) > 400 else 25):
        crop, drawn = draw(size, scale, seed, shape)
        wanted, labels = slow_window(image, mask, seed, size, scale)
        got = crop.apply(image, **drawn)
        assert got.shape == (*size, 3)
        assert np.array_equal(crop.apply_to_mask(mask, **drawn), labels)
        assert abs(got - wanted).max() <= 2  # OpenCV rounds weights, and once the values


@pytest.mark.parametrize("shape", [(60, 90), (24, 90), (90, 24), (33, 40)], ids=str)
def test_the_edge_of_a_picture_is_not_mixed_with_its_padding(shape):
    """A white picture stays white where the mask has labels, and the padding stays grey."""
    pipeline = Pipeline({"crop": ScaleCrop((128, 160), (1.2, 2.5))})
    white = Sample(np.full((*shape, 3), 255, np.uint8), np.zeros(shape, np.uint8), "white")
    for seed in range(8):
        image, mask, _ = pipeline(white, seed)
        assert (image[mask != IGNORE] == 255).all()
        assert (image[mask == IGNORE] == IMAGE_FILL).all()


@pytest.mark.parametrize(
    ("factor", "shape", "expected"), [(1, (100, 160), (50, 80)), (2, (160, 100), (160, 100))]
)
def test_base_is_the_short_side_at_factor_one(factor, shape, expected):
    _, drawn = draw((32, 32), (factor, factor), 0, shape, base=50)
    assert tuple(n / axis.step for n, axis in zip(shape, drawn.values(), strict=True)) == expected


# Centred crops


def blob(row, column, shape=(90, 140), value=3):
    """A mask of 0 and IGNORE with one pixel of a class."""
    mask = np.zeros(shape, np.uint8)
    mask[:, ::2] = IGNORE
    mask[row, column] = value
    return mask


def crop_of(mask, seed, focus=None, *, size=(32, 40), scale=(1.0, 2.5), centred=1.0):
    pipeline = Pipeline({"crop": ScaleCrop(size, scale, centred=centred)})
    image = np.zeros((*mask.shape, 3), np.uint8)
    return pipeline(Sample(image, mask, "x"), seed, *(() if focus is None else (focus,)))


@pytest.mark.parametrize("place", [(0, 0), (88, 138), (0, 138), (45, 70), (88, 1)], ids=str)
def test_a_centred_window_shows_the_only_pixel_of_the_class(place):
    for seed in range(40):
        for scale in ((1.0, 2.5), (0.2, 0.3), (40, 60)):
            mask = crop_of(blob(*place), seed, 3, scale=scale).mask
            if scale[0] >= 1:  # a scaled picture may lose a pixel
                assert (mask == 3).any(), (seed, scale)


def test_a_pixel_lies_anywhere_in_its_window_and_every_pixel_of_the_class_is_chosen():
    mask = blob(45, 70)
    found = [np.argwhere(crop_of(mask, s, 3, scale=(1, 1)).mask == 3)[0] for s in range(400)]
    rows, columns = np.transpose(found)
    assert set(rows) == set(range(32))
    assert set(columns) == set(range(40))
    mask[3, 4] = mask[80, 130] = 3  # three places, none within a window of another
    shown = [crop_of(mask, seed, 3, scale=(1, 1)).mask for seed in range(60)]
    assert all((window == 3).sum() == 1 for window in shown)


def test_without_a_focus_each_class_of_the_mask_has_its_turn():
    mask = np.zeros((90, 140), np.uint8)
    mask[0, 0], mask[89, 139] = 1, 2
    mask[40:50] = IGNORE
    counts = np.zeros(3, int)
    for seed in range(300):
        seen = set(np.unique(crop_of(mask, seed, scale=(1, 1)).mask)) & {1, 2}
        counts[max(seen, default=0)] += 1
    assert (abs(counts - 100) < 35).all(), counts


def test_a_class_that_is_not_there_leaves_the_window_to_chance():
    mask = blob(45, 70)
    for focus, of in ((7, mask), (None, np.full_like(mask, IGNORE))):
        windows = {crop_of(of, seed, focus).mask.tobytes() for seed in range(10)}
        assert len(windows) == 1 if focus is None else len(windows) > 5


def test_the_share_of_centred_windows_is_the_one_that_is_set():
    mask = blob(45, 70, shape=(900, 1400))  # chance alone shows it once in 1000 windows
    shown = sum(
        (crop_of(mask, s, 3, centred=0.3, scale=(1, 1)).mask == 3).any() for s in range(500)
    )
    assert 110 < shown < 190
    for wrong in (0, 1.5, -0.1):
        with pytest.raises(ValueError, match=r": expected a share above 0, at most 1, or null"):
            ScaleCrop((32, 32), centred=wrong)


def test_a_focus_without_centred_crops_changes_nothing():
    mask = blob(45, 70)
    for seed in range(10):
        plain = crop_of(mask, seed, centred=None)
        assert np.array_equal(crop_of(mask, seed, 3, centred=None).mask, plain.mask)


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


def jittered(image, **factors):
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "order": []}
    return ColorJitter().apply(image, **{**neutral, **factors})


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
    got = jittered(image, **change)
    assert got.dtype == np.uint8
    assert abs(got - formula(image, **change)).max() <= 1


@pytest.mark.parametrize("hue", [-0.25, -0.05, 0.04, 1 / 3])
def test_hue_turns_colours_as_in_hsv_and_keeps_grey_and_luma(hue):
    pure = np.array([[[150, 90, 90], [90, 150, 90], [90, 90, 150], [120, 120, 120]]], np.uint8)
    got = jittered(pure, hue=hue)
    turned = cv2.cvtColor(got, cv2.COLOR_RGB2HSV)[0, :3, 0] * 2.0
    wanted = np.array([0, 120, 240]) + 360 * hue
    assert (abs((turned - wanted + 180) % 360 - 180) <= 4).all()
    assert got[0, 3].tolist() == [120, 120, 120]
    luma = np.array([0.299, 0.587, 0.114])
    assert abs(got @ luma - pure @ luma).max() <= 1


def test_nothing_drawn_changes_nothing_and_values_stop_at_the_ends():
    image = noise(40, 50)[0]
    assert np.array_equal(jittered(image), image)
    bright = jittered(image, brightness=5.0)
    assert (bright[image >= 52] == 255).all()


# Bands of any number and type

RAW = np.random.default_rng(5).normal(300, 9, (60, 80, 5)).astype(np.float32)
TYPES = [np.uint8, np.uint16, np.int16, np.float32]


def raw_sample(kind, count=5):
    image = RAW[..., :count].astype(kind)
    return Sample(image, np.ones((60, 80), np.uint8), "x")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_window_of_bands_is_that_of_each_band_alone(kind, count):
    image = raw_sample(kind, count).image
    for seed in range(8):
        crop, drawn = draw((64, 72), (0.5, 2), seed, image.shape)
        window = crop.apply(image, **drawn)
        alone = [crop.apply(image[..., i : i + 1], **drawn) for i in range(count)]
        assert window.dtype == kind
        expected = np.concatenate(alone, axis=2)
        np.testing.assert_allclose(window, expected, atol=1e-3 if kind == np.float32 else 1)


def test_beyond_the_edge_a_window_of_bands_has_its_mean():
    crop, drawn = draw((64, 96), (1, 1), 0, RAW.shape)
    window = crop.apply(RAW, **drawn)
    assert np.array_equal(window[:60, :80], RAW)
    np.testing.assert_allclose(
        window[60:], np.broadcast_to(RAW.mean((0, 1)), (4, 96, 5)), rtol=1e-5
    )


@pytest.mark.parametrize("kind", [np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("has_crop", [False, True])
def test_steps_of_albumentations_leave_raw_values_in_their_unit(kind, has_crop):
    steps = {"crop": ScaleCrop((60, 80), (1, 1))} if has_crop else {}
    steps["blur"] = A.GaussianBlur(blur_limit=(3, 3), sigma_limit=(1, 1), p=1)
    sample = raw_sample(kind)
    image = Pipeline(steps)(sample, 3).image
    expected = cv2.GaussianBlur(sample.image.astype(np.float32), (3, 3), 1)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, expected, rtol=1e-4)


def test_a_band_of_one_value_stays_as_it_is():
    flat = Sample(np.full((40, 40, 2), 1e5, np.float32), np.zeros((40, 40), np.uint8), "x")
    steps = {"jitter": ColorJitter((0.5, 2), (0.5, 2), (1, 1), (0, 0), p=1)}
    assert (Pipeline(steps)(flat, 0).image == 1e5).all()


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_jitter_of_bands_moves_each_around_its_mean_by_its_deviation(kind):
    image = (RAW / 3).astype(kind)
    step = ColorJitter((0.5, 2), (0.5, 2), (1, 1), (0, 0), p=1)
    x = image.astype(np.float64)
    expected = x.mean((0, 1)) + 1.5 * (x - x.mean((0, 1))) - 0.3 * x.std((0, 1))
    found = step.apply(image, brightness=0.7, contrast=1.5, saturation=2, hue=0.3, order=[])
    assert found.dtype == kind
    assert abs(found - expected).max() <= (0.5001 if kind == np.uint8 else 1e-3)


def test_raw_pictures_are_augmented_by_their_seed_alone():
    steps = {
        "crop": ScaleCrop((48, 48), (0.5, 2)),
        "mirror": A.HorizontalFlip(p=0.5),
        "color": ColorJitter((0.7, 1.3), (0.7, 1.3), (0.7, 1.3), (-0.05, 0.05), p=0.8),
    }
    pipeline, sample = Pipeline(steps), raw_sample(np.uint16)
    first = pipeline(sample, 11)
    pipeline(raw_sample(np.uint8), 4)
    again = pipeline(sample, 11)
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, pipeline(sample, 12).image)
