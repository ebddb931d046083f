"""Batches for training (without end) and for evaluation (each sample once)."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from danet.data.sampler import StepSampler
from danet.errors import InputError
from danet.types import Batch, Sample


def collate(samples: list[Sample]) -> Batch:
    """Stacks samples of one size; images become (B, 3, H, W), all stays uint8.

    Raises:
        InputError: The sizes differ.
    """
    sizes = {sample.image.shape[:2] for sample in samples}
    if len(sizes) > 1:
        shown = ", ".join(f"{width} x {height}" for height, width in sorted(sizes)[:3])
        raise InputError(
            f"the images of a batch have several sizes ({shown}): set data.crop and a transform "
            "that crops, such as data/transforms=street, or data.batch_size=1"
        )
    height, width = samples[0].mask.shape
    images = _empty((len(samples), 3, height, width))
    masks = _empty((len(samples), height, width))
    for sample, image, mask in zip(samples, images.numpy(), masks.numpy(), strict=True):
        image[:] = sample.image.transpose(2, 0, 1)
        mask[:] = sample.mask
    return Batch(image=images, mask=masks, name=tuple(sample.name for sample in samples))


def collate_by_size(samples: list[Sample]) -> list[Batch]:
    """Makes one batch per size of image, in order of appearance.

    Images are never padded to share a batch: attention looks at all positions, so padding would
    change the result of an image with its neighbours in the batch.
    """
    groups: dict[tuple[int, ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.image.shape].append(sample)
    return [collate(group) for group in groups.values()]


def _empty(shape: tuple[int, ...]) -> Tensor:
    """Makes a uint8 tensor; in a worker, in the memory through which it reaches the main process.

    A tensor that lies elsewhere is copied there when it is handed over, one more pass per batch.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _quiet_worker(_: int) -> None:
    """Keeps a worker on one core; OpenCV would start a pool of threads in each."""
    cv2.setNumThreads(0)


def train_batches(
    dataset: Dataset[Sample],
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yields batches without end from batch number ``start`` on; see StepSampler.

    Raises:
        InputError: The data set does not fill one batch.
    """
    sampler = StepSampler(
        len(dataset),  # type: ignore[arg-type]
        batch_size,
        seed=seed,
        start=start,
        rank=rank,
        world=world,
    )
    return iter(_Plain(_loader(dataset, sampler, collate, num_workers, pin_memory)))


class _EveryNth(Sampler[list[int]]):
    """Batches of rank, rank + world, rank + 2 world, ...: every sample on exactly one process."""

    def __init__(self, num_samples: int, batch_size: int, rank: int, world: int) -> None:
        self.indices = range(rank, num_samples, world)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield list(self.indices[start : start + self.batch_size])


def eval_batches(
    dataset: Dataset[Sample],
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterable[list[Batch]]:
    """Returns an iterable of batches, in lists of one per image size; no padding, no repeats."""
    sampler = _EveryNth(len(dataset), batch_size, rank, world)  # type: ignore[arg-type]
    return _Plain(_loader(dataset, sampler, collate_by_size, num_workers, pin_memory))


class _Plain:
    """A loader whose errors of workers are told without their traceback."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.loader
        except InputError as error:
            # torch puts the traceback of the worker in front of the message.
            raise InputError(str(error).rpartition("InputError: ")[2].strip()) from error


def _loader(
    dataset: Dataset[Sample], sampler: Any, collate_fn: Any, num_workers: int, pin_memory: bool
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_quiet_worker,
        # Its own generator: otherwise an iterator draws once from the global one, and a resumed run
        # would differ.
        generator=torch.Generator(),
    )
