"""Batches for training (without end) and for evaluation (each sample once)."""

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
from danet.data.bad_samples import Bad, BadSamples, Read, Replacing
from danet.data.sampler import StepSampler
from danet.errors import InputError, ProcessError, StorageError
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


class _Noted(NamedTuple):
    """A batch, and the bad samples that others took the place of."""

    batch: Batch
    bad: tuple[Bad, ...]


def _collate_reads(reads: list[Read]) -> _Noted:
    """Makes a batch of samples, and one list of what was replaced."""
    return _Noted(collate([read.sample for read in reads]), tuple(b for r in reads for b in r.bad))


class TrainBatches(Iterator[Batch]):
    """The batches of one process, without end.

    Attributes:
        bad: The samples that could not be read; none unless they are skipped.
    """

    def __init__(self, loader: "_Plain", bad: BadSamples | None, *, batch_size: int) -> None:
        self.loader = loader
        self.batch_size = batch_size
        self.bad = bad or BadSamples(0, 0.0, print)
        self._is_skipping = bad is not None
        self._items = iter(loader)

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
            InputError: A sample cannot be read, or too many of those that are skipped.
            ProcessError: A worker has died or hangs.
        """
        item = next(self._items)
        if not self._is_skipping:
            return cast(Batch, item)
        self.bad.note(self.batch_size, tuple(item.bad))
        return cast(Batch, item.batch)

    def count(self) -> dict[str, float]:
        """Returns how many samples were replaced so far, by the name it has in the log."""
        return {"bad_samples": self.bad.replaced} if self._is_skipping else {}

    def explain(self, error: RuntimeError) -> ProcessError | StorageError | None:
        """Says what became of a worker; None where an error is about something else.

        torch notices at once, so such an error may be raised in the midst of anything.
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
    tell: Callable[[str], None] = print,
) -> TrainBatches:
    """Yields batches without end from batch number ``start`` on; see StepSampler.

    Args:
        dataset: Of the training.
        batch_size: See StepSampler, as for the next four.
        seed: Decides order and augmentation.
        start: Number of the first batch.
        rank: This process.
        world: How many there are.
        num_workers: Processes that read; 0 reads in this one.
        pin_memory: For CUDA.
        timeout: Seconds that a batch may be waited for, with workers; 0 for ever.
        on_bad_sample: ``error``, or ``skip``: another sample takes the place of one that cannot be
            read; see Replacing.
        max_bad_share: Of the samples that may be bad; see BadSamples.
        tell: Is given a line for each sample that is skipped.

    Raises:
        InputError: The data set does not fill one batch.
    """
    length = len(dataset)  # type: ignore[arg-type]
    sample = partial(StepSampler, length, batch_size, seed=seed, rank=rank, world=world)

    def in_flight(done: int) -> list[str]:
        draws = islice(sample(start=start + done), _PREFETCH * num_workers)
        return [_name(dataset, draw.item) for batch in draws for draw in batch]

    loading = (num_workers, pin_memory, timeout)
    if on_bad_sample == "skip":
        loader = _loader(Replacing(dataset), sample(start=start), _collate_reads, *loading)
        bad = BadSamples(length, max_bad_share, tell)
    else:
        loader, bad = _loader(dataset, sample(start=start), collate, *loading), None
    return TrainBatches(_Plain(loader, in_flight), bad, batch_size=batch_size)


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
    timeout: float = 0,
) -> Iterable[list[Batch]]:
    """Returns an iterable of batches, in lists of one per image size; no padding, no repeats.

    A sample that cannot be read is an error whatever ``data.on_bad_sample`` says: a score over
    other images than it claims would be a wrong one.
    """
    sampler = _EveryNth(len(dataset), batch_size, rank, world)  # type: ignore[arg-type]

    def in_flight(done: int) -> list[str]:
        batches = islice(sampler, done, done + _PREFETCH * num_workers)
        return [_name(dataset, index) for batch in batches for index in batch]

    loader = _loader(dataset, sampler, collate_by_size, num_workers, pin_memory, timeout)
    return _Plain(loader, in_flight)


class _Plain:
    """A loader whose errors of workers are told without their traceback.

    Args:
        loader: Of batches.
        in_flight: Names of the samples that are being read when so many batches have come.
    """

    def __init__(self, loader: DataLoader[Any], in_flight: Callable[[int], list[str]]) -> None:
        self.loader = loader
        self.in_flight = in_flight
        self.done = 0
        self._readers: Sequence[BaseProcess] = ()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.done = 0
        try:
            batches = iter(self.loader)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # the workers' locks lie in shared memory
                raise workers.no_room() from error
            raise
        self._readers = getattr(batches, "_workers", ())
        try:
            while True:
                self._require_readers()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except (ConnectionError, EOFError) as error:
                    workers.await_end(self._readers)
                    self._require_readers(error)
                    raise
                self.done += 1
                yield batch
        except InputError as error:
            # torch puts the traceback of the worker in front of the message.
            raise InputError(str(error).rpartition("InputError: ")[2].strip()) from error
        except RuntimeError as error:
            told = self.explain(error)
            if told is None:
                raise
            raise told from error
        finally:
            workers.end(self._readers)

    def explain(self, error: RuntimeError) -> ProcessError | StorageError | None:
        """Says what became of a worker; None where an error is about something else."""
        names = self.in_flight(self.done)
        return workers.explain(error, names, self.loader.timeout, self._codes())

    def _require_readers(self, cause: Exception | None = None) -> None:
        """Raises ProcessError if a worker is gone: torch does, but where it may be swallowed."""
        if any(reader.exitcode is not None for reader in self._readers):
            raise workers.lost(self._codes(), self.in_flight(self.done)) from cause

    def _codes(self) -> dict[int | None, int | None]:
        return {reader.pid: reader.exitcode for reader in self._readers}


_PREFETCH = 2
"""Batches that each worker reads ahead."""


def _name(dataset: Dataset[Sample], index: int) -> str:
    """Returns what messages call a sample."""
    items = getattr(dataset, "items", None)
    return f"sample {index}" if items is None else str(items[index].name)


def _loader(
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
        timeout=timeout if num_workers else 0,
        prefetch_factor=_PREFETCH if num_workers else None,
        worker_init_fn=workers.start,
        # Its own generator: otherwise an iterator draws once from the global one, and a resumed run
        # would differ.
        generator=torch.Generator(),
    )
