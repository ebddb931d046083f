"""Corruptions are those of the papers: equal to literal versions, the stronger the further off."""

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from danet.data.loader import eval_batches
from danet.evaluation import corruptions
from danet.evaluation.corruptions import GROUPS, PHOTOGRAPHS, STRENGTHS, TABLE, Corrupted, corrupt
from danet.types import Sample


def natural(height, width, seed=0):
    """Returns a picture, uint8 (H, W, 3), with a spectrum of natural ones: 1 over the frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    drawn = np.fft.rfft2(rng.normal(size=(3, height, width)))
    layers = np.fft.irfft2(drawn / frequency, s=(height, width))
    layers[1:] = 0.7 * layers[:1] + 0.3 * layers[1:]  # channels are alike
    layers /= layers.std()
    return (layers * 50 + 110).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


@pytest.fixture(scope="module")
def frost(tmp_path_factory):
    """Returns a folder of white patches on grey in the place of the photographs."""
    folder = tmp_path_factory.mktemp("frost")
    for number, name in enumerate(PHOTOGRAPHS):
        picture = natural(70, 90, number) // 2 + 127
        Image.fromarray(picture).save(folder / name)
    return folder


def shares(image):
    return image.astype(np.float64) / 255


def as_bytes(x):
    return (x.clip(0, 1) * 255).astype(np.uint8)


def differ(one, two):
    return np.abs(one.astype(int) - two.astype(int)).max()


UNORDERED = {"glass_blur": (0, 4), "frost": (0, 1, 4), "fog": (0, 2, 4)}
"""Strengths, less one, whose order shows in the error: the published parameters of the others trade
one kind of error for another, such as a shorter reach for more rounds."""


@pytest.mark.parametrize("name", TABLE)
def test_the_stronger_the_further_from_the_picture(name, frost):
    errors = []
    for strength in STRENGTHS:
        squares = [
            np.square(
                corrupt(image, name, strength, seed=seed, frost=frost).astype(float) - image
            ).mean()
            for seed, image in enumerate(natural(96, 128, seed) for seed in range(4))
        ]
        errors.append(np.mean(squares))
    ordered = [errors[i] for i in UNORDERED.get(name, range(5))]
    assert ordered == sorted(set(ordered))


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (32, 301), (129, 40)], ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_every_size_keeps_shape_and_type_and_a_seed_gives_the_same_bytes(name, size, frost):
    image = natural(*size)
    before = image.copy()
    for strength in STRENGTHS:
        one, two = (corrupt(image, name, strength, seed=3, frost=frost) for _ in range(2))
        assert one.shape == image.shape
        assert one.dtype == np.uint8
        assert (one == two).all()
        assert (one != image).any()
    assert (image == before).all()


@pytest.mark.parametrize("name", TABLE)
def test_a_picture_of_one_pixel_is_no_error(name, frost):
    image = np.full((1, 1, 3), 99, np.uint8)
    shapes = {corrupt(image, name, s, seed=0, frost=frost).shape for s in STRENGTHS}
    assert shapes == {image.shape}


@pytest.mark.parametrize("name", TABLE)
def test_another_seed_changes_what_is_random_alone(name, frost):
    image = natural(64, 80)
    one, two = (corrupt(image, name, 3, seed=seed, frost=frost) for seed in (1, 2))
    fixed = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert (one == two).all() == (name in fixed)


def literal_glass(image, random, sigma, reach, rounds):
    """Blurs, goes through the pixels from the last to the first, and blurs."""
    height, width = image.shape[:2]

    def blurred(x):
        return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest", truncate=4)

    pixels = as_bytes(blurred(shares(image)))
    for _ in range(rounds):
        inner = height - 2 * reach, width - 2 * reach
        down, right = random.integers(-reach, reach, (2, *inner))
        for row in range(height - reach, reach, -1):
            for column in range(width - reach, reach, -1):
                place = row - reach - 1, column - reach - 1
                pixels[row, column] = pixels[row + down[place], column + right[place]]
    return as_bytes(blurred(shares(pixels)))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_glass_blur_equals_a_loop_over_pixels(strength, frost):
    image = natural(40, 53)
    parameters = TABLE["glass_blur"][strength]
    expected = literal_glass(image, np.random.default_rng(7), *parameters)
    found = corrupt(image, "glass_blur", strength, seed=7, frost=frost)
    assert differ(found, expected) <= 1  # of the first blur, carried along
    assert (found != expected).mean() < 0.01


@pytest.mark.parametrize("degrees", [-45, -17.3, 0, 30, 45, -90, -130])
def test_motion_is_a_weighted_sum_of_shifted_pictures(degrees):
    x, radius, sigma = shares(natural(50, 61)), 10, 5
    padded = np.pad(x, ((40, 40), (40, 40), (0, 0)), mode="edge")
    total, weights = np.zeros_like(x), 0
    for i in range(2 * radius + 1):
        weight = math.exp(-(i**2) / (2 * sigma**2))
        down = -math.ceil(i * math.sin(math.radians(degrees)) - 0.5)
        right = -math.ceil(i * math.cos(math.radians(degrees)) - 0.5)
        total += weight * padded[40 - down : 90 - down, 40 - right : 101 - right]
        weights += weight
    found = corruptions._motion(x.astype(np.float32), radius, sigma, degrees)
    np.testing.assert_allclose(found, total / weights, atol=1e-5)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_zoom_blur_averages_enlargements(strength, frost):
    image = natural(48, 67)
    ends = (1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)
    factors, x = np.arange(1, *ends[strength - 1]), shares(image)
    total = x.copy()
    for factor in factors:
        height, width = (math.ceil(n / factor) for n in x.shape[:2])
        top, left = (48 - height) // 2, (67 - width) // 2
        middle = x[top : top + height, left : left + width]
        total += ndimage.zoom(middle, (factor, factor, 1), order=1)[:48, :67]
    expected = as_bytes(total / (len(factors) + 1))
    assert differ(corrupt(image, "zoom_blur", strength, seed=0, frost=frost), expected) <= 1


@pytest.mark.parametrize("strength", STRENGTHS)
def test_defocus_blur_is_the_mean_over_a_smoothed_disk(strength, frost):
    radius, sigma = TABLE["defocus_blur"][strength]
    reach = max(8, radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = np.float64(x**2 + y**2 <= radius**2)
    # Truncated at one pixel up to a radius of 8, and at two above.
    near = 1 if radius <= 8 else 2
    disk = ndimage.gaussian_filter(disk / disk.sum(), sigma, radius=near, mode="mirror")
    image = natural(50, 61)
    expected = [ndimage.correlate(c, disk, mode="mirror") for c in shares(image).transpose(2, 0, 1)]
    found = corrupt(image, "defocus_blur", strength, seed=0, frost=frost)
    assert differ(found, as_bytes(np.stack(expected, axis=2))) <= 1


def test_brightness_raises_the_value_of_hsv(frost):
    image = natural(32, 33)
    image[0, 0], image[0, 1] = 0, 255
    for strength in STRENGTHS:
        found = corrupt(image, "brightness", strength, seed=0, frost=frost)
        for place in np.ndindex(*image.shape[:2]):
            hue, saturation, value = colorsys.rgb_to_hsv(*shares(image[place]))
            raised = colorsys.hsv_to_rgb(hue, saturation, min(1, value + strength / 10))
            assert differ(found[place], as_bytes(np.array(raised))) <= 1


def test_noise_has_the_moments_of_its_distribution(frost):
    image = np.full((300, 400, 3), 102, np.uint8)  # 0.4
    for strength in STRENGTHS:
        found = {
            name: shares(corrupt(image, name, strength, seed=1, frost=frost))
            for name in TABLE
            if GROUPS[name] == "noise"
        }
        amount = TABLE["impulse_noise"][strength][0]
        for value in (0, 1):
            assert (found["impulse_noise"] == value).mean() == pytest.approx(amount / 2, abs=2e-3)
        assert (found["impulse_noise"] == 0.4).mean() == pytest.approx(1 - amount, abs=3e-3)
        if strength == 1:  # stronger noise leaves 0..1
            for name, spread in (("gaussian_noise", 0.08), ("shot_noise", math.sqrt(0.4 / 60))):
                assert found[name].mean() == pytest.approx(0.4 - 0.5 / 255, abs=1e-3)
                assert found[name].std() == pytest.approx(spread, rel=0.02)


def test_fog_is_a_height_map_that_repeats_and_fills_its_range():
    fog = corruptions._plasma(128, 1.7, np.random.default_rng(0))
    assert fog.shape == (128, 128)
    assert (fog.min(), fog.max()) == (0, 1)
    inside = np.abs(np.diff(fog, axis=0)).mean(), np.abs(np.diff(fog, axis=1)).mean()
    across = np.abs(fog[0] - fog[-1]).mean(), np.abs(fog[:, 0] - fog[:, -1]).mean()
    np.testing.assert_allclose(across, inside, rtol=0.5)
    assert max(inside) < 0.3 * fog.std()


def test_frost_is_a_part_of_a_photograph(frost):
    image = natural(40, 50)
    dark = np.zeros_like(image)
    for seed in range(8):
        found = corrupt(dark, "frost", 3, seed=seed, frost=frost)
        mixed = corrupt(image, "frost", 3, seed=seed, frost=frost)
        ice = (shares(found) + 0.5 / 255).clip(0, 1)  # it was truncated
        expected = as_bytes(ice + 0.7 * shares(image))
        assert differ(mixed, expected) <= 1
    firsts = {corrupt(dark, "frost", 3, seed=s, frost=frost).tobytes() for s in range(8)}
    assert len(firsts) == 8


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return Sample(natural(40, 50), np.full((40, 50), index, np.uint8), str(index))


@pytest.mark.parametrize("workers", [0, 2])
def test_scores_do_not_depend_on_batches_or_processes(workers, frost):
    """Masks are unchanged, and each index has draws of its own."""

    def all_of(**settings):
        found = {}
        for group in eval_batches(data, **settings):
            for batch in group:
                found |= dict(
                    zip(batch.name, zip(batch.image, batch.mask, strict=True), strict=True)
                )
        return found

    data = Corrupted(Pictures(), "snow", 2, frost)
    alone = all_of(batch_size=1)
    shares = [all_of(batch_size=2, rank=r, world=2, num_workers=workers) for r in (0, 1)]
    both = shares[0] | shares[1]
    assert sorted(both) == sorted(alone) == list("01234")
    for name, (image, mask) in alone.items():
        assert torch.equal(both[name][0], image)
        assert (mask == int(name)).all()
    assert len({image.numpy().tobytes() for image, _ in alone.values()}) == 5
    others = Corrupted(Pictures(), "snow", 3, frost), Corrupted(Pictures(), "shot_noise", 2, frost)
    assert all((other[0].image != data[0].image).any() for other in others)
