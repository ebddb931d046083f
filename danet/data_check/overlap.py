"""Images that two splits share: a network must not be scored on its training images."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from danet.datasets.base import FileDataset, SegmentationDataset
from danet.errors import InputError

FORBIDDEN = (
    "what is trained on must not be scored; take it out of one split, or set "
    "data.allow_overlap=true to allow it on purpose"
)
_MAX_READ = 2000
"""Images of both splits together up to which a training compares contents, not only paths."""


def identical_files(paths: Mapping[str, int]) -> list[list[str]]:
    """Return groups of files with equal contents; unreadable files are left out.

    Args:
        paths: Path -> length in bytes; only files of equal length are read.
    """
    by_length: dict[int, list[str]] = defaultdict(list)
    for path, num_bytes in paths.items():
        by_length[num_bytes].append(path)
    groups: list[list[str]] = []
    for candidates in by_length.values():
        if len(candidates) > 1:
            by_hash: dict[bytes, list[str]] = defaultdict(list)
            for path in candidates:
                with suppress(OSError):  # reported by the scan
                    by_hash[hashlib.blake2b(Path(path).read_bytes()).digest()].append(path)
            groups += [group for group in by_hash.values() if len(group) > 1]
    return groups


def shared_images(
    one: Mapping[str, int], other: Mapping[str, int], groups: Sequence[Sequence[str]]
) -> list[list[str]]:
    """Return the images that two splits share, each as the list of its paths.

    Args:
        one: Mapping whose keys are the paths of the images of a split.
        other: The same for the other split.
        groups: Files with equal contents, of ``identical_files``.
    """
    inside = [[path for path in group if path in one or path in other] for group in groups]
    found = [
        group
        for group in inside
        if any(path in one for path in group) and any(path in other for path in group)
    ]
    grouped = {path for group in found for path in group}
    return found + [[path] for path in one if path in other and path not in grouped]


def describe_shared(images: Sequence[Sequence[str]], one: str, other: str) -> str:
    """Return which images two splits share, by the first one and the number of the others."""
    more = f", as are {len(images) - 1} more" if len(images) > 1 else ""
    return f"{' and '.join(images[0])}: the same image in {one} and {other}{more}"


def refuse_overlap(train: SegmentationDataset, val: SegmentationDataset, *, allowed: bool) -> str:
    """Refuse splits that share images, unless this is allowed.

    Images are the same if they are one file or, in data sets small enough to be read at a start,
    have equal contents; ``report_duplicates`` compares the contents of larger ones.

    Args:
        train: The split of training.
        val: The split that is scored.
        allowed: The setting ``data.allow_overlap``.

    Returns:
        A note on images that are shared and allowed; empty where nothing is shared.

    Raises:
        InputError: They share images.
    """
    keys = f"data.train_split={train.split}", f"data.val_split={val.split}"
    if isinstance(train, FileDataset) and isinstance(val, FileDataset):
        is_quick = len(train) + len(val) <= _MAX_READ
        first, second = (_paths(dataset, is_quick) for dataset in (train, val))
        equal = identical_files({**first, **second}) if is_quick else []
        images = shared_images(first, second, equal)
        text = describe_shared(images, *keys) if images else ""
    elif train.fingerprint() == val.fingerprint():
        text = f"{keys[0]} and {keys[1]} are the same images"
    else:
        text = ""
    if text and not allowed:
        raise InputError(f"{text}; {FORBIDDEN}")
    return text and f"data.allow_overlap=true: {text}; scores are of images that were trained on"


def _paths(dataset: FileDataset, with_size: bool) -> dict[str, int]:
    """Return path -> length in bytes, or 0 without; folders are resolved through links."""
    real: dict[str, str] = {}
    found = {}
    for item in dataset.items:
        folder, name = os.path.split(item.image)
        if folder not in real:
            real[folder] = os.path.realpath(folder)
        path = f"{real[folder]}/{name}"
        try:
            found[path] = os.stat(path).st_size if with_size else 0
        except OSError:  # reported by the scan
            continue
    return found
