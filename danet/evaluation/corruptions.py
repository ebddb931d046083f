"""The fifteen corruptions of ImageNet-C, each at five strengths, for pictures of any size.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019; for any size: Michaelis et al., "Benchmarking Robustness in Object
Detection", 2019. As in their code, values are truncated to bytes, and glass blur copies pixels.
"""

import io
import math
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from danet.ops.resize import resize
from danet.seeds import mix
from danet.types import Sample

STRENGTHS = range(1, 6)
PHOTOGRAPHS = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
"""Of frost; the published code never draws the sixth."""
Array: TypeAlias = np.ndarray
Random: TypeAlias = np.random.Generator


class Corrupted(Dataset[Sample]):
    """Data set whose pictures are corrupted, by a name of TABLE; their masks are unchanged."""

    def __init__(self, dataset: Dataset[Sample], name: str, strength: int, frost: Path) -> None:
        self.dataset, self.name, self.strength, self.frost = dataset, name, strength, frost
        self.items = getattr(dataset, "items", None)  # with the names for messages

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        """Return a sample; what is random depends on corruption, strength and index alone."""
        sample, seed = self.dataset[index], mix([*TABLE].index(self.name), self.strength, index)
        image = corrupt(sample.image, self.name, self.strength, seed=seed, frost=self.frost)
        return sample._replace(image=image)


def corrupt(image: Array, name: str, strength: int, *, seed: int, frost: Path) -> Array:
    """Corrupt a picture, uint8 (H, W, 3) RGB; ``frost`` is the folder of PHOTOGRAPHS."""
    (function, *parameters), random = TABLE[name], np.random.default_rng(seed)
    folder = (frost,) if name == "frost" else ()
    x = image.astype(np.float32) / 255
    return _bytes(function(x, random, *parameters[strength - 1], *folder))


def _bytes(x: Array) -> Array:
    return (x.clip(0, 1) * 255).astype(np.uint8)


# Below, x is float32 (H, W, 3) in 0..1; what is returned is clipped to that range.
def _gaussian_noise(x: Array, random: Random, scale: float) -> Array:
    return x + random.standard_normal(x.shape, np.float32) * np.float32(scale)


def _shot_noise(x: Array, random: Random, photons: float) -> Array:
    return random.poisson(x * np.float32(photons)) / photons


def _impulse_noise(x: Array, random: Random, amount: float) -> Array:
    drawn = random.random(x.shape, np.float32)
    return np.where(drawn < amount / 2, 0, np.where(drawn > 1 - amount / 2, 1, x))


def _gaussian(x: Array, sigma: float) -> Array:
    size = 2 * int(4 * sigma + 0.5) + 1
    return cv2.GaussianBlur(x, (size, size), sigma, borderType=cv2.BORDER_REPLICATE)


def _defocus_blur(x: Array, _: Random, radius: int, sigma: float) -> Array:
    """Average over a disk with a smoothed outline."""
    y = np.arange(-max(8, radius), max(8, radius) + 1)
    disk = (y**2 + y[:, None] ** 2 <= radius**2).astype(np.float32)
    size = 3 if radius <= 8 else 5
    return cv2.filter2D(x, -1, cv2.GaussianBlur(disk / disk.sum(), (size, size), sigma))


def _glass_blur(x: Array, random: Random, sigma: float, reach: int, rounds: int) -> Array:
    """Smooth, copy each pixel from a neighbour, in turn from the last to the first, and smooth."""
    pixels = _bytes(_gaussian(x, sigma)).reshape(-1, 3)
    is_inner = np.zeros(x.shape[:2], bool)
    is_inner[reach + 1 : 1 - reach or None, reach + 1 : 1 - reach or None] = True
    inner, place = np.flatnonzero(is_inner), np.arange(len(pixels), dtype=np.int32)
    for _ in range(rounds):
        down, right = random.integers(-reach, reach, (2, len(inner)))
        source = place.copy()
        source[inner] += down * x.shape[1] + right
        # A source that comes later is a copy itself: its own source is taken until none is left.
        is_copy = is_inner.ravel() & is_inner.ravel()[source] & (source > place)
        while is_copy.any():
            is_copy, source = is_copy & is_copy[source], np.where(is_copy, source[source], source)
        pixels = pixels[source]
    return _gaussian(pixels.reshape(x.shape) / np.float32(255), sigma)


def _motion(x: Array, radius: int, sigma: float, degrees: float) -> Array:
    """Sum (H, W[, 3]) shifted along a line, with the weights of half a bell curve."""
    along, reach, turn = np.arange(2 * radius + 1), 2 * radius, math.radians(degrees)
    weights = np.exp(-(along**2) / (2 * sigma**2)).astype(np.float32)
    places = np.ceil(np.outer((math.sin(turn), math.cos(turn)), along) - 0.5).astype(int)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
    np.add.at(kernel, tuple(reach + places), weights / weights.sum())
    return cv2.filter2D(x, -1, kernel, borderType=cv2.BORDER_REPLICATE)


def _motion_blur(x: Array, random: Random, radius: int, sigma: float) -> Array:
    return _motion(x, radius, sigma, random.uniform(-45, 45))


def _zoom(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Enlarge the middle of (1, C, H, W) to that size."""
    height, width = x.shape[2:]
    h, w = math.ceil(height / factor), math.ceil(width / factor)
    middle = x[:, :, (height - h) // 2 :, (width - w) // 2 :][:, :, :h, :w]
    return resize(middle, (round(h * factor), round(w * factor)))[:, :, :height, :width]


def _zoom_blur(x: Array, _: Random, count: int, step: float) -> Array:
    image = torch.from_numpy(x).permute(2, 0, 1)[None]
    factors = np.arange(1, 1 + (count - 0.5) * step, step).tolist()
    total = image + sum(_zoom(image, factor) for factor in factors)
    return (total[0].permute(1, 2, 0) / (count + 1)).numpy()


def _snow(x: Array, random: Random, *parameters: Any) -> Array:
    mean, scale, zoom, least, radius, sigma, share = parameters
    flakes = mean + scale * random.standard_normal(x.shape[:2], np.float32)
    flakes = _zoom(torch.from_numpy(flakes)[None, None], zoom)[0, 0].numpy()
    flakes = np.where(flakes < least, 0, flakes).clip(0, 1)
    flakes = _motion(flakes, radius, sigma, random.uniform(-135, -45))
    flakes = ((flakes * 255).round() / 255)[..., None]  # they were bytes in between
    white = np.maximum(x, cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None] * 1.5 + 0.5)
    return share * x + (1 - share) * white + flakes + flakes[::-1, ::-1]


def _frost(x: Array, random: Random, share: float, ice: float, folder: Path) -> Array:
    """Mix with a part of a photograph, enlarged by 1.1, and more where the picture is larger."""
    with Image.open(folder / PHOTOGRAPHS[random.integers(len(PHOTOGRAPHS))]) as file:
        frost = np.asarray(file.convert("RGB"))
    scale = 1.1 * max(1, *np.divide(x.shape[:2], frost.shape[:2]))
    height, width = (math.ceil(n * scale) for n in frost.shape[:2])
    frost = cv2.resize(frost, (width, height), interpolation=cv2.INTER_CUBIC)
    top, left = random.integers(0, (height - x.shape[0], width - x.shape[1]))
    frost = frost[top : top + x.shape[0], left : left + x.shape[1]]
    return np.float32(share) * x + np.float32(ice / 255) * frost


def _plasma(size: int, decay: float, random: Random) -> Array:
    """Draw a height map (size, size) in 0..1 by the diamond-square algorithm; size is 2^n."""
    heights, step, scale = np.zeros((size, size), np.float32), size, 100.0

    def displaced(total: Array) -> Array:
        noise = random.random(total.shape, np.float32) * 2 - 1
        return total / 4 + np.float32(scale**2) * noise

    while step > 1:
        half = step // 2
        rows = heights[::step, ::step] + np.roll(heights[::step, ::step], -1, axis=0)
        heights[half::step, half::step] = displaced(rows + np.roll(rows, -1, axis=1))
        for h in (heights, heights.T):
            corners, middles = h[::step, ::step], h[half::step, half::step]
            pairs = middles + np.roll(middles, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
            h[::step, half::step] = displaced(pairs)
        step, scale = half, scale / decay
    heights -= heights.min()
    return heights / (heights.max() or 1)


def _fog(x: Array, random: Random, density: float, decay: float) -> Array:
    height, width = x.shape[:2]
    fog = _plasma(1 << (max(height, width) - 1).bit_length(), decay, random)
    brightest = x.max()
    return (x + density * fog[:height, :width, None]) * brightest / (brightest + density)


def _brightness(x: Array, _: Random, added: float) -> Array:
    """Raise the value of HSV; hue and saturation stay."""
    value = x.max(axis=2, keepdims=True)
    raised = (value + added).clip(0, 1)
    return np.where(value > 0, x * (raised / np.where(value > 0, value, 1)), raised)


def _contrast(x: Array, _: Random, factor: float) -> Array:
    means = x.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
    return (x - means) * factor + means


def _elastic_transform(x: Array, random: Random, alpha: float) -> Array:
    """Move pixels by smoothed noise."""
    (height, width), maps, most = x.shape[:2], [], 0.005 * x.shape[0]
    size = 2 * int(0.03 * width + 0.5) + 1, 2 * int(0.03 * height + 0.5) + 1
    for grid in np.meshgrid(np.arange(width), np.arange(height)):
        noise: Array = random.uniform(-most, most, x.shape[:2]).astype(np.float32)
        noise = cv2.GaussianBlur(noise, size, width / 100, None, height / 100, cv2.BORDER_REFLECT)
        maps.append((grid + alpha * noise).astype(np.float32))
    return cv2.remap(x, maps[0], maps[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _pixelate(x: Array, _: Random, factor: float) -> Array:
    image = Image.fromarray(_bytes(x))
    small = image.resize([max(1, int(n * factor)) for n in image.size], Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.NEAREST), np.float32) / 255


def _jpeg_compression(x: Array, _: Random, quality: int) -> Array:
    file = io.BytesIO()
    Image.fromarray(_bytes(x)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), np.float32) / 255


TABLE: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (_gaussian_noise, (0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
    "shot_noise": (_shot_noise, (60,), (25,), (12,), (5,), (3,)),
    "impulse_noise": (_impulse_noise, (0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
    "defocus_blur": (_defocus_blur, (3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "glass_blur": (_glass_blur, (0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": (_motion_blur, (10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": (_zoom_blur, (12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03)),
    "snow": (
        _snow,
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": (_frost, (1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    "fog": (_fog, (1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": (_brightness, (0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
    "contrast": (_contrast, (0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
    "elastic_transform": (_elastic_transform, (12.5,), (16.25,), (21.25,), (25,), (30,)),
    "pixelate": (_pixelate, (0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
    "jpeg_compression": (_jpeg_compression, (25,), (18,), (15,), (10,), (7,)),
}
"""Name -> function, and its parameters at strengths 1 to 5 as published."""
GROUPS = dict(
    zip(TABLE, ["noise"] * 3 + ["blur"] * 4 + ["weather"] * 4 + ["digital"] * 4, strict=True)
)
