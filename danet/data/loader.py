"""Batches for training (endless) and for evaluation (each sample once)."""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate

from danet.data import workers
from danet.data.bad_samples import BadSamples, Loaded, Reasons, SkipBadSamples
from danet.data.class_mix import ClassMix
from danet.data.sampler import RareClassSampling, StepSampler
from danet.errors import InputError, ProcessError, StorageError
from danet.types import Batch, Sample, SampleKey


def collate(samples: list[Sample]) -> Batch:
    """Stack samples, all of one size, to images (B, N, H, W) and masks (B, H, W); see Batch."""
    sizes = {sample.image.shape[:2] for sample in samples}
    if len(sizes) > 1:
        shown = ", ".join(f"{width} x {height}" for height, width in sorted(sizes)[:3])
        raise InputError(
            f"the images of a batch have several sizes ({shown}): set data.crop and a transform "
            "that crops, such as data/transforms=street, or data.batch_size=1"
        )
    is_8_bit = all(sample.image.dtype == np.uint8 for sample in samples)
    kind = np.uint8 if is_8_bit else np.float32
    types = ["int32" if s.mask.dtype == "uint16" else s.mask.dtype for s in samples]
    masks = [s.mask.astype(dtype, order="C") for s, dtype in zip(samples, types, strict=True)]
    # Copied, since torch refuses views with negative strides and warns of read-only arrays.
    return Batch(
        image=default_collate([s.image.transpose(2, 0, 1).astype(kind, "C") for s in samples]),
        mask=default_collate(masks),
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


def _collate_loaded(loaded: list[Loaded]) -> tuple[Batch, Reasons, int]:
    bad = {index: reason for one in loaded for index, reason in one.bad.items()}
    return collate([one.sample for one in loaded]), bad, sum(one.num_read for one in loaded)


class Loader:
    """torch's DataLoader, with the errors of its workers as the project's own, without traceback.

    The arguments are those of the DataLoader; ``sampler`` yields batches of keys.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: Iterable[list[Any]],
        collate_fn: Callable[[list[Any]], Any],
        **settings: Any,
    ) -> None:
        self._sampler = sampler
        self._pending: deque[list[Any]] = deque()
        self._workers: Sequence[BaseProcess] = ()
        self._timeout = settings.pop("timeout", 0)
        self._make_loader = partial(
            DataLoader,
            dataset,
            collate_fn=collate_fn,
            timeout=self._timeout if settings.get("num_workers") else 0,  # else torch refuses it
            worker_init_fn=workers.init_worker,
            # An iterator would draw once from the global generator, and a resumed run would differ.
            generator=torch.Generator(),
            **settings,
        )
        self._items = getattr(dataset, "items", None)

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]  # not of the endless one

    def _recorded_keys(self) -> Iterator[list[Any]]:
        """Yield the keys of each batch, and keep those of batches that have not been returned."""
        self._pending.clear()
        for keys in self._sampler:
            self._pending.append(keys)
            yield keys

    def __iter__(self) -> Iterator[Any]:
        """Yield batches; raise ProcessError if a worker dies or hangs, InputError for bad files."""
        batches: Any = None
        try:
            batches = iter(self._make_loader(batch_sampler=self._recorded_keys()))
            self._workers = getattr(batches, "_workers", ())  # private; absent without workers
            for batch in batches:
                self._pending.popleft()
                yield batch
                # torch checks as well, but raises where an error may be lost, as in a destructor.
                if exited := workers.exit_error(self._workers, self._pending_names):
                    raise exited
        except InputError as error:
            # torch puts the traceback of the worker before the message.
            raise InputError(str(error).rpartition("InputError: ")[2].strip()) from error
        except (OSError, EOFError, RuntimeError) as error:
            if explained := self.explain(error):
                raise explained from error
            raise
        finally:  # also when the generator is closed or collected
            have_ended = workers.terminate(self._workers)
            if have_ended and batches is not None:
                # torch sets this private event to end the workers. One that died while it looked at
                # the event has left it locked, and setting it would wait for ever.
                batches._workers_done_event = threading.Event()

    def explain(self, error: Exception) -> ProcessError | StorageError | None:
        """Return the error that describes a dead worker; None if ``error`` has another cause.

        torch checks workers in a signal handler, so such an error may be raised anywhere.
        """
        return workers.explain(error, self._workers, self._pending_names, self._timeout)

    def _pending_names(self) -> list[str]:
        """Return the names of the samples being read, the awaited first."""
        indices = [i for keys in self._pending for key in keys for i in _indices(key)]
        items = self._items
        return [f"sample {i}" if items is None else str(items[i].name) for i in indices]


def _indices(key: SampleKey | int) -> list[int]:
    """Return the samples that are read for a key."""
    if not isinstance(key, SampleKey):
        return [key]
    return [key.index, *_indices(key.partner)] if key.partner else [key.index]


class TrainBatches(Iterator[Batch]):
    """Endless batches of one process; ``bad`` are its samples that could not be read."""

    def __init__(self, loader: Loader, bad: BadSamples) -> None:
        self.bad = bad
        self.explain = loader.explain
        self._loaded: Iterator[tuple[Batch, Reasons, int]] = iter(loader)

    def __next__(self) -> Batch:
        """Return the next batch; raise InputError or ProcessError, also if too many are skipped."""
        batch, bad, num_read = next(self._loaded)
        self.bad.record(num_read, bad)
        return batch


def train_batches(
    dataset: Dataset[Sample],
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    rare: RareClassSampling | None = None,
    class_mix: float | None = None,
    on_bad_sample: str = "error",
    max_bad_share: float = 0.01,
    warn: Callable[[str], None] = print,
    **settings: Any,
) -> TrainBatches:
    """Return endless batches of one process; raise InputError if the data set does not fill one.

    Which samples, and how they are augmented, is as of StepSampler, which gets the arguments of
    the same names. ``on_bad_sample`` is ``error``, or ``skip`` to replace samples that cannot be
    read, see SkipBadSamples; ``max_bad_share`` is their largest share, and ``warn`` is called with
    a line for each. Settings of the loader are ``num_workers``, the processes that read samples (0
    reads in this one), ``pin_memory`` for CUDA, and ``timeout``, the seconds to wait for a batch
    (0: any).
    """
    length = len(dataset)  # type: ignore[arg-type]
    sampler = StepSampler(
        *(length, batch_size),
        seed=seed,
        start=start,
        rank=rank,
        world=world,
        rare=rare,
        class_mix=class_mix,
    )
    # Replaced in the worker, so that no batch is short.
    replacing = SkipBadSamples(dataset, max_retries=20 if on_bad_sample == "skip" else 0)
    loader = Loader(ClassMix(replacing), sampler, _collate_loaded, **settings)
    return TrainBatches(loader, BadSamples(length, max_bad_share, warn))


def eval_batches(
    dataset: Dataset[Sample], *, batch_size: int, rank: int = 0, world: int = 1, **settings: Any
) -> Loader:
    """Return an iterable of lists of batches, one per image size; no padding, no repeats.

    Every sample is read once, on exactly one process. An unreadable one is an error whatever the
    value of ``data.on_bad_sample``: a score over fewer images would be wrong. The arguments are
    those of train_batches.
    """
    # Not torch's DistributedSampler: it repeats samples to equalise the shards, and a score would
    # depend on the number of processes.
    shard = range(rank, len(dataset), world)  # type: ignore[arg-type]
    sampler = BatchSampler(shard, batch_size, drop_last=False)
    return Loader(dataset, sampler, collate_by_size, **settings)
