"""Benchmark the loader: pictures per second of one process, from files and from the cache.

Measured in turns, in one run: the bare decoding of a pair, our whole path from files
(``data/transforms=street``) and from the cache, and the naive order, which scales the whole
picture, then crops, changes colours with albumentations, and converts to floats. Ratios:

    from files    bare decoding over ours: the share of the decoder's rate that is reached
    from cache    from files over from cache: how many times as fast
    naive order   naive over ours from files
"""

import tempfile
from collections.abc import Callable
from itertools import count
from multiprocessing import active_children
from pathlib import Path
from typing import Any, NamedTuple

import albumentations as A
import cv2
import hydra
import numpy as np
import torch
from PIL import Image

from bench.measure import Options, Row, seconds
from danet.cli import CONFIGS
from danet.config import schema
from danet.config.build import make_dataset
from danet.config.validate import check
from danet.data.loader import collate, train_batches
from danet.datasets.base import SegmentationDataset
from danet.datasets.image_io import read_image, read_labels
from danet.types import IGNORE, Sample, SampleKey

NUM_CLASSES = 19
MEAN, DEVIATION = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])


class Case(NamedTuple):
    """Pictures of one kind."""

    suffix: str
    size: tuple[int, int]
    """Height and width."""
    crop: int
    num_pictures: int
    repeats: int


def run(options: Options) -> list[Row]:
    """Measure PNG of Cityscapes' size, JPEG of VOC's, and the memory growth of a worker."""
    cases = [Case("png", (1024, 2048), 768, 8, 48), Case("jpg", (375, 500), 480, 40, 400)]
    if options.quick:
        cases = [Case("png", (128, 256), 96, 3, 3), Case("jpg", (60, 80), 64, 3, 3)]
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # as in a worker
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for case in cases:
            rows += _rates(case, Path(name) / case.suffix, options)
        rows.append(_growth(cases[-1], Path(name), 100 if options.quick else 2000))
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])
    return rows


def _rates(case: Case, root: Path, options: Options) -> list[Row]:
    write_pictures(case, root)
    cold = make(case, root)
    cached = make(case, root, f"data.cache_dir={root.parent / 'cache'}", "data.cache=disk")
    for i in range(len(cached)):
        cached.read(i)
    steps = [_bare(cold), _ours(cold), _ours(cached), _naive(case, cold)]
    repeats = max(case.repeats, case.num_pictures)
    bare, files, cache, naive = seconds(steps, options.device, repeats=repeats)
    name = f"{case.size[1]}x{case.size[0]} {case.suffix} crop {case.crop}"

    def row(what: str, ours: float, reference: float | None, note: str) -> Row:
        rate = f"{1 / ours:.1f} images/s"
        times = None if reference is None else reference * 1e3
        return Row("data", name, what, "ms", ours * 1e3, times, f"{rate}; {note}")

    return [
        row("bare decoding", bare, None, "image and label"),
        row("from files", files, bare, f"{bare / files:.0%} of the bare decode rate"),
        row("from cache", cache, files, f"{files / cache:.1f} times the rate from files"),
        row("naive order", files, naive, f"the naive order {1 / naive:.1f} images/s"),
    ]


def make(case: Case, root: Path, *settings: str) -> SegmentationDataset:
    """Make the training set of a config, as tools/train.py does."""
    schema.register()
    classes = ",".join(f"c{i}" for i in range(NUM_CLASSES))
    overrides = [
        *(
            "data=folder",
            "data/transforms=street",
            f"data.root={root}",
            f"data.classes=[{classes}]",
        ),
        *(f"data.crop=[{case.crop},{case.crop}]", *settings),
    ]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = hydra.compose("train", overrides=overrides)
    return make_dataset(check(composed), "train", training=True)


def _bare(dataset: Any) -> Callable[[], object]:
    """Return a step that decodes the image and the label of a pair, and nothing else."""
    numbers = count()

    def step() -> object:
        item = dataset.items[next(numbers) % len(dataset)]
        return read_image(Path(item.image)), read_labels(Path(item.mask))

    return step


def _ours(dataset: SegmentationDataset) -> Callable[[], object]:
    """Return a step from a draw to a batch of one."""
    numbers = count()

    def step() -> object:
        number = next(numbers)
        return collate([dataset[SampleKey(number % len(dataset), number)]])

    return step


def _naive(case: Case, dataset: Any) -> Callable[[], object]:
    """Return a step of full resize, crop, mirror and colours, then float; with our decoders."""
    numbers, rng = count(), np.random.default_rng(0)
    change = A.Compose(
        [
            A.PadIfNeeded(case.crop, case.crop, fill=0, fill_mask=IGNORE),
            A.RandomCrop(case.crop, case.crop),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter((0.7, 1.3), (0.7, 1.3), (0.7, 1.3), (-0.05, 0.05), p=0.8),
            A.GaussianBlur(blur_limit=(3, 5), p=0.1),
        ]
    )

    def step() -> object:
        image, mask, name = dataset.read(next(numbers) % len(dataset))
        factor = rng.uniform(0.5, 2.0)
        size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
        image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
        result = change(image=image, mask=mask)
        floats = ((result["image"] - MEAN) / DEVIATION).astype(np.float32)
        planes = torch.from_numpy(np.ascontiguousarray(floats.transpose(2, 0, 1)))
        return Sample(planes.numpy(), torch.from_numpy(result["mask"]).long().numpy(), name)

    return step


def _growth(case: Case, root: Path, samples: int) -> Row:
    """Read with one worker, from the cache; return the growth of its memory after a tenth."""
    dataset = make(case, root / case.suffix, f"data.cache_dir={root / 'cache'}", "data.cache=disk")
    batch_size = min(4, len(dataset))
    batches = train_batches(dataset, batch_size=batch_size, seed=0, num_workers=1)
    held = []
    for number in range(samples // batch_size):
        next(batches)
        if number in (samples // batch_size // 10, samples // batch_size - 1):
            held.append(sum(_private(child.pid) for child in active_children()))
    del batches
    growth = (held[1] - held[0]) / 2**20
    return Row("data", f"one worker, {samples} samples", "growth", "MiB", growth)


def _private(process: int | None) -> int:
    """Return the bytes of private memory of a process (Linux)."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{process}/status has no RssAnon")


def write_pictures(case: Case, root: Path) -> None:
    """Write images/train and masks/train: pictures that compress like photographs.

    2048 x 1024 PNGs have some 2.4 MB, 500 x 375 JPEGs some 85 kB; labels are regions, grey PNGs
    for the first, palette PNGs for the second.
    """
    for folder in ("images", "masks"):
        (root / folder / "train").mkdir(parents=True)
    for i in range(case.num_pictures):
        rng = np.random.default_rng(i)
        path = root / "images" / "train" / f"{i:03}.{case.suffix}"
        options = {"quality": 95, "subsampling": 0} if case.suffix == "jpg" else {}
        Image.fromarray(_photo(case.size, rng)).save(path, **options)
        label = Image.fromarray(_regions(case.size, rng))
        if case.suffix == "jpg":
            label = Image.frombytes("P", label.size, label.tobytes())
            label.putpalette([value for value in range(256) for _ in range(3)])
        label.save(root / "masks" / "train" / f"{i:03}.png")


def _photo(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return noise of all scales, fainter at finer ones, and grain; uint8 (H, W, 3)."""
    height, width = size
    total = np.full((height, width, 3), 118, np.float32)
    for level in range(1, 8):
        grid = rng.normal(size=(2**level, 2 ** (level + 1), 3)).astype(np.float32)
        total += 60 / 1.7**level * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    grain = rng.normal(size=(height, width, 3)).astype(np.float32)
    return np.clip(total + 7 * cv2.GaussianBlur(grain, (0, 0), 0.8), 0, 255).astype(np.uint8)


def _regions(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return the index of the largest of smooth random fields, one per class; uint8 (H, W)."""
    best, regions = np.full(size, -np.inf, np.float32), np.zeros(size, np.uint8)
    for index in range(NUM_CLASSES):
        grid = rng.normal(size=(8, 16)).astype(np.float32)
        field = cv2.resize(grid, size[::-1], interpolation=cv2.INTER_CUBIC)
        regions[field > best] = index
        np.maximum(best, field, out=best)
    return regions
