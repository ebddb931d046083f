"""The fifteen corruptions of ImageNet-C, each at five strengths, for pictures of any size.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019; for any size and with motion blur as a sum of shifted pictures: Michaelis
et al., "Benchmarking Robustness in Object Detection", 2019. Where text and published code differ,
the code is followed: values are truncated to bytes, not rounded, and glass blur copies pixels.
"""

import functools
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from danet.errors import InputError
from danet.ops.resize import resize
from danet.seeds import mix
from danet.types import Sample

STRENGTHS = range(1, 6)
PHOTOGRAPHS = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
"""Of frost; the published code never draws the sixth."""


class Corrupted(Dataset[Sample]):
    """Data set whose pictures are corrupted after reading; masks are unchanged.

    What is random depends on corruption, strength and index alone. ``frost`` is the folder of
    PHOTOGRAPHS.
    """

    def __init__(self, dataset: Dataset[Sample], name: str, strength: int, frost: Path) -> None:
        self.dataset, self.name, self.strength, self.frost = dataset, name, strength, frost
        self.items = getattr(dataset, "items", None)  # with the names for messages

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        """Return a sample with a corrupted picture."""
        sample, seed = self.dataset[index], mix([*TABLE].index(self.name), self.strength, index)
        return sample._replace(
            image=corrupt(sample.image, self.name, self.strength, seed=seed, frost=self.frost)
        )


def corrupt(image: np.ndarray, name: str, strength: int, *, seed: int, frost: Path) -> np.ndarray:
    """Return a picture, uint8 (H, W, 3) RGB, with a corruption of strength 1 to 5."""
    function, parameters = TABLE[name][1], TABLE[name][strength + 1]
    places = (frost,) if name == "frost" else ()
    shares = image.astype(np.float32) / 255
    return _bytes(function(shares, np.random.default_rng(seed), *parameters, *places))


def require_photographs(folder: Path) -> None:
    """Raise InputError where one of PHOTOGRAPHS is missing in a folder."""
    missing = [name for name in PHOTOGRAPHS if not (folder / name).is_file()]
    if missing:
        others = ",".join(name for name in TABLE if name != "frost")
        raise InputError(
            f"frost={folder}: {missing[0]} is missing; `python scripts/fetch_weights.py name=frost "
            f"output={folder}` fetches the photographs, or leave frost out: 'corruptions=[{others}]'"
        )


def _bytes(shares: np.ndarray) -> np.ndarray:
    return (shares.clip(0, 1) * 255).astype(np.uint8)


# Below, x is float32 (H, W, 3) in 0..1; what is returned is clipped to that range.


def _gaussian_noise(x: np.ndarray, random: np.random.Generator, scale: float) -> np.ndarray:
    return x + random.standard_normal(x.shape, np.float32) * np.float32(scale)


def _shot_noise(x: np.ndarray, random: np.random.Generator, photons: float) -> np.ndarray:
    return (random.poisson(x * np.float32(photons)) / photons).astype(np.float32)


def _impulse_noise(x: np.ndarray, random: np.random.Generator, amount: float) -> np.ndarray:
    drawn = random.random(x.shape, np.float32)
    return np.where(drawn < amount / 2, 0, np.where(drawn > 1 - amount / 2, 1, x))


def _gaussian(x: np.ndarray, sigma: float) -> np.ndarray:
    size = 2 * int(4 * sigma + 0.5) + 1
    return cv2.GaussianBlur(x, (size, size), sigma, borderType=cv2.BORDER_REPLICATE)


def _defocus_blur(x: np.ndarray, _: Any, radius: int, sigma: float) -> np.ndarray:
    """Average over a disk whose outline is smoothed."""
    y = np.arange(-max(8, radius), max(8, radius) + 1)
    disk = (y**2 + y[:, None] ** 2 <= radius**2).astype(np.float32)
    size = 3 if radius <= 8 else 5
    return cv2.filter2D(x, -1, cv2.GaussianBlur(disk / disk.sum(), (size, size), sigma))


def _glass_blur(
    x: np.ndarray, random: np.random.Generator, sigma: float, reach: int, rounds: int
) -> np.ndarray:
    """Smooth, copy each pixel from a neighbour, in turn from the last to the first, and smooth."""
    pixels = _bytes(_gaussian(x, sigma))
    (height, width), inner = x.shape[:2], slice(reach + 1, 1 - reach or None)
    for _ in range(rounds):
        place = np.arange(height * width).reshape(height, width)
        source, is_inner = place.copy(), np.zeros_like(place, bool)
        is_inner[inner, inner] = True
        down, right = random.integers(-reach, reach, (2, *source[inner, inner].shape))
        source[inner, inner] += down * width + right
        source, is_inner = source.ravel(), is_inner.ravel()
        # A source behind its pixel is a copy already. Such chains are followed by pointer jumping.
        is_copy = is_inner & is_inner[source] & (source > place.ravel())
        left = np.flatnonzero(is_copy)
        while left.size:
            through = source[left]
            source[left], is_copy[left] = source[through], is_copy[through]
            left = left[is_copy[left]]
        pixels = pixels.reshape(-1, 3)[source].reshape(x.shape)
    return _gaussian(pixels / np.float32(255), sigma)


def _motion(x: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
    """Sum (H, W[, 3]) shifted along a line, with the weights of half a bell curve."""
    along, reach = np.arange(2 * radius + 1), 2 * radius
    weights = np.exp(-(along**2) / (2 * sigma**2)).astype(np.float32)
    rows, columns = (
        np.ceil(along * f(math.radians(degrees)) - 0.5).astype(int) for f in (math.sin, math.cos)
    )
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
    np.add.at(kernel, (reach + rows, reach + columns), weights / weights.sum())
    return cv2.filter2D(x, -1, kernel, borderType=cv2.BORDER_REPLICATE)


def _motion_blur(
    x: np.ndarray, random: np.random.Generator, radius: int, sigma: float
) -> np.ndarray:
    return _motion(x, radius, sigma, random.uniform(-45, 45))


def _zoom(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Enlarge the middle of (1, C, H, W) to the same size."""
    height, width = x.shape[2:]
    h, w = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - h) // 2, (width - w) // 2
    size = round(h * factor), round(w * factor)
    return resize(x[:, :, top : top + h, left : left + w], size)[:, :, :height, :width]


def _zoom_blur(x: np.ndarray, _: Any, end: float, step: float) -> np.ndarray:
    picture, factors = torch.from_numpy(x).permute(2, 0, 1)[None], np.arange(1, end, step)
    total = picture + sum(_zoom(picture, float(factor)) for factor in factors)
    return (total[0].permute(1, 2, 0) / (len(factors) + 1)).numpy()


def _snow(x: np.ndarray, random: np.random.Generator, *parameters: float) -> np.ndarray:
    mean, scale, zoom, least, radius, sigma, share = parameters
    flakes = mean + scale * random.standard_normal(x.shape[:2], np.float32)
    flakes = _zoom(torch.from_numpy(flakes)[None, None], zoom)[0, 0].numpy()
    flakes = np.where(flakes < least, 0, flakes).clip(0, 1)
    flakes = _motion(flakes, int(radius), sigma, random.uniform(-135, -45))
    flakes = ((flakes * 255).round() / 255)[..., None]  # stored as bytes in between
    white = np.maximum(x, cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None] * 1.5 + 0.5)
    return share * x + (1 - share) * white + flakes + flakes[::-1, ::-1]


@functools.lru_cache(len(PHOTOGRAPHS))
def _photograph(path: Path) -> np.ndarray:
    image = cv2.imread(str(path))
    if image is None:
        raise InputError(f"{path}: not readable as a picture; fetch it again, see frost")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _frost(
    x: np.ndarray, random: np.random.Generator, share: float, ice: float, folder: Path
) -> np.ndarray:
    photograph = _photograph(folder / PHOTOGRAPHS[random.integers(len(PHOTOGRAPHS))])
    size = np.array(photograph.shape[:2])
    size = np.ceil(size * 1.1 * max(1, *(x.shape[:2] / size))).astype(int)
    frost = cv2.resize(photograph, (int(size[1]), int(size[0])), interpolation=cv2.INTER_CUBIC)
    top, left = random.integers(0, size - x.shape[:2])
    frost = frost[top : top + x.shape[0], left : left + x.shape[1]]
    return np.float32(share) * x + np.float32(ice / 255) * frost


def _plasma(size: int, decay: float, random: np.random.Generator) -> np.ndarray:
    """Return a height map (size, size) in 0..1 by the diamond-square algorithm; size is 2^n."""
    heights, roll = np.zeros((size, size), np.float32), np.roll
    step, scale = size, 100.0

    def mean(total: np.ndarray) -> np.ndarray:
        noise = random.random(total.shape, np.float32) * 2 - 1
        return total / 4 + np.float32(scale**2) * noise

    while step >= 2:
        half = step // 2
        corners, middles = heights[::step, ::step], heights[half::step, half::step]
        rows = corners + roll(corners, -1, axis=0)
        middles[:] = mean(rows + roll(rows, -1, axis=1))
        above, right = roll(middles, 1, axis=0), roll(corners, -1, axis=1)
        heights[::step, half::step] = mean(middles + above + corners + right)
        left, below = roll(middles, 1, axis=1), roll(corners, -1, axis=0)
        heights[half::step, ::step] = mean(middles + left + corners + below)
        step, scale = half, scale / decay
    heights -= heights.min()
    return heights / heights.max()


def _fog(x: np.ndarray, random: np.random.Generator, density: float, decay: float) -> np.ndarray:
    height, width = x.shape[:2]
    fog = _plasma(1 << (max(height, width) - 1).bit_length(), decay, random)
    brightest = x.max()
    return (x + density * fog[:height, :width, None]) * brightest / (brightest + density)


def _brightness(x: np.ndarray, _: Any, added: float) -> np.ndarray:
    """Raise the value of HSV; hue and saturation stay."""
    value = x.max(axis=2, keepdims=True)
    raised = (value + added).clip(0, 1)
    return np.where(value > 0, x * (raised / np.where(value > 0, value, 1)), raised)


def _contrast(x: np.ndarray, _: Any, factor: float) -> np.ndarray:
    means = x.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
    return (x - means) * factor + means


def _elastic_transform(x: np.ndarray, random: np.random.Generator, alpha: float) -> np.ndarray:
    """Move pixels by smoothed noise."""
    height, width = x.shape[:2]
    sizes, most = [2 * int(0.03 * n + 0.5) + 1 for n in (width, height)], 0.005 * height
    maps = []
    for grid in np.meshgrid(np.arange(width), np.arange(height)):
        noise = random.uniform(-most, most, x.shape[:2]).astype(np.float32)
        sigmas = {"sigmaX": 0.01 * width, "sigmaY": 0.01 * height}
        moved = cv2.GaussianBlur(noise, sizes, **sigmas, borderType=cv2.BORDER_REFLECT)
        maps.append((grid + alpha * moved).astype(np.float32))
    return cv2.remap(x, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _pixelate(x: np.ndarray, _: Any, factor: float) -> np.ndarray:
    picture, (height, width) = Image.fromarray(_bytes(x)), x.shape[:2]
    small = picture.resize((int(width * factor), int(height * factor)), Image.Resampling.BOX)
    large = small.resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(large, np.float32) / 255


def _jpeg_compression(x: np.ndarray, _: Any, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(_bytes(x)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), np.float32) / 255


TABLE: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": ("noise", _gaussian_noise, (0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
    "shot_noise": ("noise", _shot_noise, (60,), (25,), (12,), (5,), (3,)),
    "impulse_noise": ("noise", _impulse_noise, (0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
    "defocus_blur": ("blur", _defocus_blur, (3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "glass_blur": ("blur", _glass_blur, (0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": ("blur", _motion_blur, (10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ("blur", _zoom_blur, (1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    "snow": (
        *("weather", _snow),
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ("weather", _frost, (1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    "fog": ("weather", _fog, (1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": ("weather", _brightness, (0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
    "contrast": ("digital", _contrast, (0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
    "elastic_transform": ("digital", _elastic_transform, (12.5,), (16.25,), (21.25,), (25,), (30,)),
    "pixelate": ("digital", _pixelate, (0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
    "jpeg_compression": ("digital", _jpeg_compression, (25,), (18,), (15,), (10,), (7,)),
}
"""Name -> group, function, and its parameters at strengths 1 to 5 as Michaelis et al. publish them."""
