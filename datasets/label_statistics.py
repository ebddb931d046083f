"""Pixels of each class in each picture of a data set, counted once and kept in a file."""

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
from torch.utils.data import BatchSampler, Dataset
from tqdm import tqdm

from danet.data.loader import Loader
from danet.datasets.base import FileDataset, SegmentationDataset
from danet.datasets.cache import cache_folder
from danet.distributed.agreement import wait_patiently
from danet.distributed.collectives import from_first, is_first
from danet.errors import InputError
from danet.filesystem import atomic_write
from danet.types import ignore_index

_VERSION = b"1"  # raised when the file or a decoder of labels gives other numbers
_UNREADABLE = -1  # pixels of every class of a label that cannot be read


def class_pixels(
    dataset: FileDataset, labels: np.ndarray, counts: np.ndarray, path: Path
) -> np.ndarray:
    """Return the pixels of each class and, last, those ignored in a label (H, W), int64 (K + 1,).

    ``counts`` are the pixels of each value. Raises InputError for a value without a class.
    """
    values = np.flatnonzero(counts)
    try:
        classes = dataset.map_labels(values[None].astype(labels.dtype), path)[0]
    except InputError:
        dataset.map_labels(labels, path)  # the same error with the number of pixels and where
        raise
    ignored, kept = ignore_index(len(dataset.classes)), [*range(len(dataset.classes)), -1]
    # Of floats, which are exact up to 2^53.
    return np.bincount(classes, counts[values], ignored + 1)[kept].astype(np.int64)


def label_pixels(dataset: SegmentationDataset, *, num_workers: int, skip: bool) -> np.ndarray:
    """Return the pixels of each class in each picture of a data set, int32 (pictures, K).

    The first process counts them, with a progress bar, and the others receive them. They are kept
    in the cache folder, in a file whose name is a digest of how labels are decoded and of paths,
    sizes and times of all label files, so what is found there is never stale. A label that cannot
    be read has no pixels with ``skip``, else it raises InputError, as does a data set without any.
    """
    if not isinstance(dataset, FileDataset):
        name = type(dataset).__name__
        raise InputError(
            f"data.rare_class_temperature: {name} has no label files to count; set "
            "data.rare_class_temperature=null"
        )
    pixels = _find_or_count(dataset, num_workers, skip) if is_first() else np.empty(0)
    wait_patiently("the label statistics")
    return from_first(pixels)


def _find_or_count(dataset: FileDataset, num_workers: int, skip: bool) -> np.ndarray:
    path, shape = _path_of(dataset), (len(dataset), len(dataset.classes))
    try:
        with open(path, "rb") as file, np.load(file) as content:  # a zip, which has a checksum
            pixels: np.ndarray = content["pixels"]
        if pixels.shape == shape and pixels.dtype == np.int32:
            return pixels
    except Exception:  # none is there, or numpy and zipfile have many errors for a damaged one
        pass
    sampler = BatchSampler(range(shape[0]), 8, drop_last=False)
    batches = Loader(_Counted(dataset, skip), sampler, np.stack, num_workers=num_workers)
    pixels = np.zeros(shape, np.int32)
    with tqdm(total=shape[0], desc="counting pixels", unit="label", dynamic_ncols=True) as bar:
        for rows in batches:
            pixels[bar.n : bar.n + len(rows)] = rows
            bar.update(len(rows))
    if (pixels == _UNREADABLE).any():  # not kept: another run may have to report it
        return pixels.clip(0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for outdated in path.parent.glob(f"{path.name.split('-')[0]}-*"):
            outdated.unlink()
        with atomic_write(path, durable=True) as draft, open(draft, "wb") as target:
            np.savez_compressed(target, pixels=pixels)
    except OSError as error:
        reason = f"{path.parent}: {error.strerror or error}; the next start counts the labels again"
        print(f"warning: {reason}", file=sys.stderr, flush=True)
    return pixels


class _Counted(Dataset[np.ndarray]):
    """The pixels of each class of a picture, int32 (K,)."""

    def __init__(self, dataset: FileDataset, skip: bool) -> None:
        self.dataset, self.skip = dataset, skip
        self.items = dataset.items  # with the names for messages

    def __getitem__(self, index: int) -> np.ndarray:
        part, place = self.dataset.locate(index)
        item, num_classes = part.items[place], len(part.classes)
        try:
            labels = part.labels_of(item)
            counts = np.bincount(labels.ravel())
            pixels = class_pixels(part, labels, counts, Path(str(item.mask)))
        except (InputError, OSError):
            if not self.skip:
                raise
            return np.full(num_classes, _UNREADABLE, np.int32)
        return pixels[:-1].astype(np.int32)


def _path_of(dataset: FileDataset) -> Path:
    """Return the file of the statistics as the labels are now: ``<identity>-<state>.npz``."""
    folder = cache_folder(dataset.reading.cache_dir) / "label_statistics"
    identity, state = hashlib.sha256(_VERSION), hashlib.sha256()
    for part in dataset.parts:
        if folder.resolve().is_relative_to(part.root.resolve()):
            raise InputError(f"data.cache_dir={folder.parent}: it lies below {part.root}")
        identity.update(part.decoding())
    for item in dataset.items:
        identity.update(os.fsencode(str(item.mask)) + b"\0" + os.fsencode(item.name) + b"\0")
        try:
            # A copy over a file that keeps its size and the time of writing changes ctime.
            s = os.stat(str(item.mask))
            state.update(repr((s.st_size, s.st_mtime_ns, s.st_ctime_ns)).encode())
        except OSError:
            state.update(b"missing")  # an error when it is read
    return folder / f"{identity.hexdigest()[:32]}-{state.hexdigest()[:32]}.npz"
