"""Batches for training (endless) and for evaluation (each sample once)."""

import errno
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate

from danet.data import workers
from danet.data.bad_samples import BadSamples, Reasons, SkipBadSamples
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
    # Copied, since torch refuses views with negative strides and warns of read-only arrays.
    return Batch(
        image=default_collate([sample.image.transpose(2, 0, 1).copy() for sample in samples]),
        mask=default_collate([sample.mask.copy() for sample in samples]),
        name=tuple(sample.name for sample in samples),
    )


def collate_by_size(samples: list[Sample]) -> list[Batch]:
    """Return one batch per image size, in order of appearance.

    Images are never padded to a common size: attention depends on all positions, so the result of
    an image would depend on the others in its batch.
    """
    groups: dict[tuple[int, ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.image.shape].append(sample)
    return [collate(group) for group in groups.values()]


def _collate_loaded(loaded: list[tuple[Sample, Reasons]]) -> tuple[Batch, Reasons]:
    bad = {index: reason for _, reasons in loaded for index, reason in reasons.items()}
    return collate([sample for sample, _ in loaded]), bad


class Loader:
    """torch's DataLoader, with the errors of its workers as the project's own, without traceback.

    Args:
        dataset: Of samples.
        sampler: Of batches of keys.
        collate_fn: Makes a batch of the samples.
        num_workers, pin_memory, timeout: See train_batches.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: Iterable[list[Any]],
        collate_fn: Callable[[list[Any]], Any],
        num_workers: int,
        pin_memory: bool,
        timeout: float,
    ) -> None:
        self._sampler = _PendingKeys(sampler)
        self._workers: Sequence[BaseProcess] = ()
        self.loader = DataLoader(
            dataset,
            batch_sampler=self._sampler,
            collate_fn=collate_fn,
            num_workers=num_workers,
            pin_memory=pin_memory,
            timeout=timeout if num_workers else 0,  # without workers torch accepts no other value
            worker_init_fn=workers.init_worker,
            # An iterator would draw once from the global generator, and a resumed run would differ.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Yield batches.

        Raises:
            InputError: A sample cannot be read.
            ProcessError: A worker has died or hangs.
        """
        try:
            batches = iter(self.loader)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # the workers' locks lie in shared memory
                raise workers.shared_memory_error() from error
            raise
        self._workers = getattr(batches, "_workers", ())  # private; absent without workers
        try:
            for batch in batches:
                self._sampler.pending.popleft()
                yield batch
                # torch checks as well, but raises where an error may be lost, as in a destructor.
                if exited := workers.exit_error(self._workers, self._pending_names):
                    raise exited
        except InputError as error:
            # torch puts the traceback of the worker before the message.
            raise InputError(str(error).rpartition("InputError: ")[2].strip()) from error
        except (ConnectionError, EOFError, RuntimeError) as error:
            explained = self.explain(error)
            if explained is None:
                raise
            raise explained from error
        finally:  # also when the generator is closed or collected
            workers.terminate(self._workers)

    def explain(self, error: Exception) -> ProcessError | StorageError | None:
        """Return the error that describes a dead worker; None if ``error`` has another cause.

        torch checks workers in a signal handler, so such an error may be raised anywhere.
        """
        return workers.explain(error, self._workers, self._pending_names, self.loader.timeout)

    def _pending_names(self) -> list[str]:
        """Return the names of the samples being read, the awaited first."""
        items = getattr(self.loader.dataset, "items", None)
        keys = [key for keys in self._sampler.pending for key in keys]
        indices = [key[0] if isinstance(key, tuple) else key for key in keys]
        return [f"sample {i}" if items is None else str(items[i].name) for i in indices]


class _PendingKeys:
    """A sampler of batches that keeps the keys of those that have not been returned."""

    def __init__(self, sampler: Iterable[list[Any]]) -> None:
        self.sampler = sampler
        self.pending: deque[list[Any]] = deque()

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # not of the endless one

    def __iter__(self) -> Iterator[list[Any]]:
        self.pending.clear()
        for keys in self.sampler:
            self.pending.append(keys)
            yield keys


class TrainBatches(Iterator[Batch]):
    """Endless batches of one process.

    Attributes:
        bad: The samples that could not be read; none unless they are skipped.
    """

    def __init__(self, loader: Loader, bad: BadSamples, *, is_skipping: bool) -> None:
        self.bad = bad
        self.explain = loader.explain
        self._is_skipping = is_skipping
        self._loaded: Iterator[tuple[Batch, Reasons]] = iter(loader)

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            InputError: A sample cannot be read, or too many are skipped.
            ProcessError: A worker has died or hangs.
        """
        batch, bad = next(self._loaded)
        self.bad.record(len(batch.name), bad)
        return batch

    def count(self) -> dict[str, float]:
        """Return the number of replaced samples by its name in the log; empty without skipping."""
        return {"bad_samples": self.bad.replaced} if self._is_skipping else {}


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
    sampler = StepSampler(length, batch_size, seed=seed, start=start, rank=rank, world=world)
    is_skipping = on_bad_sample == "skip"
    # Replaced in the worker, so that no batch is short.
    replacing = SkipBadSamples(dataset, max_retries=20 if is_skipping else 0)
    loader = Loader(replacing, sampler, _collate_loaded, num_workers, pin_memory, timeout)
    bad = BadSamples(length, max_bad_share, warn)
    return TrainBatches(loader, bad, is_skipping=is_skipping)


def eval_batches(
    dataset: Dataset[Sample],
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    timeout: float = 0,
) -> Loader:
    """Return an iterable of lists of batches, one per image size; no padding, no repeats.

    An unreadable sample is an error whatever the value of ``data.on_bad_sample``: a score over
    fewer images would be wrong.

    Args:
        dataset: Read once, with every sample on exactly one process.
        batch_size: Per process.
        rank: Number of this process.
        world: Number of processes.
        num_workers: Processes that read samples; 0 reads in this process.
        pin_memory: For CUDA.
        timeout: Seconds to wait for a batch of the workers; 0 for ever.
    """
    # Not torch's DistributedSampler: it repeats samples to equalise the shards, and a score would
    # depend on the number of processes.
    shard = range(rank, len(dataset), world)  # type: ignore[arg-type]
    sampler = BatchSampler(shard, batch_size, drop_last=False)
    return Loader(dataset, sampler, collate_by_size, num_workers, pin_memory, timeout)
