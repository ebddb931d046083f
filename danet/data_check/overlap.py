"""Images that two splits share: what is trained on must not be scored."""

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
_READ = 2000
"""Images of both splits together up to which a training compares contents, and not only paths."""


def same_contents(paths: Mapping[str, int]) -> list[list[str]]:
    """Returns groups of files with equal bytes.

    Args:
        paths: Path -> bytes; only files of equal length are read, and none that cannot be.
    """
    by_length: dict[int, list[str]] = defaultdict(list)
    for path, num_bytes in paths.items():
        by_length[num_bytes].append(path)
    groups: list[list[str]] = []
    for candidates in by_length.values():
        if len(candidates) > 1:
            by_hash: dict[bytes, list[str]] = defaultdict(list)
            for path in candidates:
                with suppress(OSError):  # told where files are looked at
                    by_hash[hashlib.blake2b(Path(path).read_bytes()).digest()].append(path)
            groups += [group for group in by_hash.values() if len(group) > 1]
    return groups


def shared_images(
    one: Mapping[str, int], other: Mapping[str, int], groups: Sequence[Sequence[str]]
) -> list[list[str]]:
    """Returns the images that two splits share, each with all its paths in them.

    Args:
        one: Paths of the images of a split; values are not looked at.
        other: Those of the other.
        groups: Files with equal bytes, as ``same_contents`` gives them.
    """
    inside = [[path for path in group if path in one or path in other] for group in groups]
    found = [
        group
        for group in inside
        if any(path in one for path in group) and any(path in other for path in group)
    ]
    grouped = {path for group in found for path in group}
    return found + [[path] for path in one if path in other and path not in grouped]


def told(images: Sequence[Sequence[str]], one: str, other: str) -> str:
    """Says which images two splits share, by the first one."""
    more = f", as are {len(images) - 1} more" if len(images) > 1 else ""
    return f"{' and '.join(images[0])}: the same image in {one} and {other}{more}"


def refuse_overlap(train: SegmentationDataset, val: SegmentationDataset, *, allowed: bool) -> str:
    """Refuses to score what is trained on; ``tools/train.py`` and ``tools/check_data.py`` ask here.

    Images are the same if they are one file or, where there are few enough to be read at a start,
    have equal bytes; ``find_copies``, which has read all files, holds larger sets to the same.

    Args:
        train: The split of training.
        val: The split that is scored.
        allowed: The setting ``data.allow_overlap``.

    Returns:
        What stops nothing and is worth a line; empty where nothing is shared.

    Raises:
        InputError: They share images.
    """
    keys = f"data.train_split={train.split}", f"data.val_split={val.split}"
    if isinstance(train, FileDataset) and isinstance(val, FileDataset):
        is_quick = len(train) + len(val) <= _READ
        first, second = (_paths(dataset, is_quick) for dataset in (train, val))
        equal = same_contents({**first, **second}) if is_quick else []
        images = shared_images(first, second, equal)
        text = told(images, *keys) if images else ""
    elif train.fingerprint() == val.fingerprint():
        text = f"{keys[0]} and {keys[1]} are the same images"
    else:
        text = ""
    if text and not allowed:
        raise InputError(f"{text}; {FORBIDDEN}")
    return text and f"data.allow_overlap=true: {text}; scores are of images that were trained on"


def _paths(dataset: FileDataset, with_size: bool) -> dict[str, int]:
    """Returns the images with their bytes, or 0; two ways to one folder are one."""
    real: dict[str, str] = {}
    found = {}
    for item in dataset.items:
        folder, name = os.path.split(item.image)
        if folder not in real:
            real[folder] = os.path.realpath(folder)
        path = f"{real[folder]}/{name}"
        try:
            found[path] = os.stat(path).st_size if with_size else 0
        except OSError:  # told where files are looked at
            continue
    return found
