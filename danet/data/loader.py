"""Batches for training (endless) and for evaluation (each sample once)."""

import errno
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from danet.data import workers
from danet.data.bad_samples import BadSample, BadSamples, LoadedSample, SkipBadSamples
from danet.data.sampler import StepSampler
from danet.errors import InputError, ProcessError, StorageError
from danet.types import Batch, Sample


def collate(samples: list[Sample]) -> Batch:
    """Stack samples of one size to uint8 images (B, 3, H, W) and masks (B, H, W).

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
    # Written in place: stacking first would copy every image once more.
    images = _empty((len(samples), 3, height, width))
    masks = _empty((len(samples), height, width))
    for sample, image, mask in zip(samples, images.numpy(), masks.numpy(), strict=True):
        image[:] = sample.image.transpose(2, 0, 1)  # (3, H, W)
        mask[:] = sample.mask
    return Batch(image=images, mask=masks, name=tuple(sample.name for sample in samples))


def collate_by_size(samples: list[Sample]) -> list[Batch]:
    """Return one batch per image size, in order of appearance.

    Images are never padded to a common size: attention depends on all positions, so the result of
    an image would depend on the others in its batch.
    """
    groups: dict[tuple[int, ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.image.shape].append(sample)
    return [collate(group) for group in groups.values()]


def _empty(shape: tuple[int, ...]) -> Tensor:
    """Return an uninitialised uint8 tensor; in a worker, in shared memory.

    Any other tensor is copied to shared memory on its way to the main process.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    # A private function, which torch's default_collate uses for the same purpose.
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class _LoadedBatch(NamedTuple):
    """A batch, and the bad samples that were replaced in it."""

    batch: Batch
    bad: tuple[BadSample, ...]


def _collate_loaded(loaded: list[LoadedSample]) -> _LoadedBatch:
    bad = tuple(one for each in loaded for one in each.bad)
    return _LoadedBatch(collate([each.sample for each in loaded]), bad)


class TrainBatches(Iterator[Batch]):
    """Endless batches of one process.

    Attributes:
        bad: The samples that could not be read; none unless they are skipped.
    """

    def __init__(self, loader: "WorkerErrors", bad: BadSamples | None, *, batch_size: int) -> None:
        self.loader = loader
        self.batch_size = batch_size
        self.bad = bad or BadSamples(0, 0.0, print)  # stays empty, so that nobody checks for None
        self._is_skipping = bad is not None
        self._items = iter(loader)

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            InputError: A sample cannot be read, or too many are skipped.
            ProcessError: A worker has died or hangs.
        """
        item = next(self._items)
        if not self._is_skipping:
            return cast(Batch, item)
        self.bad.record(self.batch_size, tuple(item.bad))
        return cast(Batch, item.batch)

    def count(self) -> dict[str, float]:
        """Return the number of replaced samples by its name in the log; empty without skipping."""
        return {"bad_samples": self.bad.replaced} if self._is_skipping else {}

    def explain(self, error: RuntimeError) -> ProcessError | StorageError | None:
        """Return the error that describes a dead worker; None if ``error`` has another cause.

        torch checks workers in a signal handler, so such an error may be raised anywhere.
        """
        return self.loader.explain(error)


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
    timeout: float = 0,
    on_bad_sample: str = "error",
    max_bad_share: float = 0.01,
    warn: Callable[[str], None] = print,
) -> TrainBatches:
    """Return endless batches from batch number ``start`` on; see StepSampler.

    Args:
        dataset: For training.
        batch_size: Per process.
        seed: Determines order and augmentation.
        start: Number of the first batch.
        rank: Number of this process.
        world: Number of processes.
        num_workers: Processes that read samples; 0 reads in this process.
        pin_memory: For CUDA.
        timeout: Seconds to wait for a batch of the workers; 0 for ever.
        on_bad_sample: ``error``, or ``skip`` to replace unreadable samples, see SkipBadSamples.
        max_bad_share: Largest share of bad samples, see BadSamples.
        warn: Called with one line per skipped sample.

    Raises:
        InputError: The data set does not fill one batch.
    """
    length = len(dataset)  # type: ignore[arg-type]
    sample = partial(StepSampler, length, batch_size, seed=seed, rank=rank, world=world)

    def in_flight(done: int) -> list[str]:
        # The order is a function of the seed, so a second sampler repeats it.
        batches = islice(sample(start=start + done), _PREFETCH * num_workers)
        return [_sample_name(dataset, key.index) for batch in batches for key in batch]

    loading = (num_workers, pin_memory, timeout)
    if on_bad_sample == "skip":
        # Replaced in the worker, so that no batch is short.
        skipping = SkipBadSamples(dataset)
        loader = _make_loader(skipping, sample(start=start), _collate_loaded, *loading)
        bad = BadSamples(length, max_bad_share, warn)
    else:
        loader, bad = _make_loader(dataset, sample(start=start), collate, *loading), None
    return TrainBatches(WorkerErrors(loader, in_flight), bad, batch_size=batch_size)


class _ShardSampler(Sampler[list[int]]):
    """Batches of rank, rank + world, rank + 2 world, ...: every sample on exactly one process."""

    # Not torch's DistributedSampler: it repeats samples to equalise the shards, and a score would
    # depend on the number of processes.

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
    timeout: float = 0,
) -> Iterable[list[Batch]]:
    """Return an iterable of lists of batches, one per image size; no padding, no repeats.

    An unreadable sample is an error whatever the value of ``data.on_bad_sample``: a score over
    fewer images would be wrong.
    """
    sampler = _ShardSampler(len(dataset), batch_size, rank, world)  # type: ignore[arg-type]

    def in_flight(done: int) -> list[str]:
        batches = islice(sampler, done, done + _PREFETCH * num_workers)
        return [_sample_name(dataset, index) for batch in batches for index in batch]

    loader = _make_loader(dataset, sampler, collate_by_size, num_workers, pin_memory, timeout)
    return WorkerErrors(loader, in_flight)


class WorkerErrors:
    """A loader that raises the errors of its workers as the project's own, without traceback.

    Args:
        loader: Of batches.
        in_flight: Returns the names of the samples being read after so many batches.
    """

    def __init__(self, loader: DataLoader[Any], in_flight: Callable[[int], list[str]]) -> None:
        self.loader = loader
        self.in_flight = in_flight
        self.done = 0
        self._workers: Sequence[BaseProcess] = ()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.done = 0
        try:
            batches = iter(self.loader)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # the workers' locks lie in shared memory
                raise workers.shared_memory_error() from error
            raise
        self._workers = getattr(batches, "_workers", ())  # private; absent without workers
        try:
            while True:
                self._require_workers()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except (ConnectionError, EOFError) as error:
                    # A connection breaks a little before its process has an exit code.
                    workers.wait_for_exit(self._workers)
                    self._require_workers(error)
                    raise
                self.done += 1
                yield batch
        except InputError as error:
            # torch puts the traceback of the worker before the message.
            raise InputError(str(error).rpartition("InputError: ")[2].strip()) from error
        except RuntimeError as error:
            explained = self.explain(error)
            if explained is None:
                raise
            raise explained from error
        finally:  # also when the generator is closed or collected
            workers.terminate(self._workers)

    def explain(self, error: RuntimeError) -> ProcessError | StorageError | None:
        """Return the error that describes a dead worker; None if ``error`` has another cause."""
        names = self.in_flight(self.done)
        return workers.explain(error, names, self.loader.timeout, self._exit_codes())

    def _require_workers(self, cause: Exception | None = None) -> None:
        """Raise ProcessError if a worker has exited."""
        # torch checks as well, but raises where the error may be swallowed, as in a destructor.
        if any(worker.exitcode is not None for worker in self._workers):
            raise workers.exit_error(self._exit_codes(), self.in_flight(self.done)) from cause

    def _exit_codes(self) -> dict[int | None, int | None]:
        return {worker.pid: worker.exitcode for worker in self._workers}


_PREFETCH = 2
"""Batches that each worker reads ahead."""


def _sample_name(dataset: Dataset[Sample], index: int) -> str:
    """Return the name of a sample in messages."""
    items = getattr(dataset, "items", None)
    return f"sample {index}" if items is None else str(items[index].name)


def _make_loader(
    dataset: Dataset[Any],
    sampler: Any,
    collate_fn: Any,
    num_workers: int,
    pin_memory: bool,
    timeout: float,
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Without workers torch accepts no other values.
        timeout=timeout if num_workers else 0,
        prefetch_factor=_PREFETCH if num_workers else None,
        worker_init_fn=workers.init_worker,
        # An iterator would draw once from the global generator, and a resumed run would differ.
        generator=torch.Generator(),
    )
