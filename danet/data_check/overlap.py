"""Images that two splits share: a network must not be scored on its training images."""

import functools
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from danet.datasets.base import FileDataset, SegmentationDataset
from danet.errors import InputError

FORBIDDEN = (
    "what is trained on must not be scored; take it out of one split, or set "
    "data.allow_overlap=true to allow it on purpose"
)
_MAX_NAMES = 5
_MAX_READ = 2000
"""Images of both splits together up to which a training compares contents, not only paths."""


def group_copies(paths: Mapping[str, int]) -> list[list[str]]:
    """Group files by their contents; one that cannot be read is alone.

    Args:
        paths: Path -> length in bytes; only files of equal length are read.
    """
    lengths = Counter(paths.values())
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for path, num_bytes in paths.items():
        key: Hashable = path
        if lengths[num_bytes] > 1:
            with suppress(OSError):  # reported by the scan
                key = hashlib.blake2b(Path(path).read_bytes()).digest()
        groups[key].append(path)
    return list(groups.values())


def describe_shared(
    one: Mapping[str, int],
    other: Mapping[str, int],
    groups: Sequence[Sequence[str]],
    names: tuple[str, str],
) -> str:
    """Return which images two splits share; empty if they share none.

    Args:
        one: Mapping whose keys are the paths of the images of a split.
        other: The same for the other split.
        groups: All paths, grouped by contents.
        names: Of the splits.
    """
    shared = [
        " and ".join(path for path in group if path in one or path in other)
        for group in groups
        if not (one.keys().isdisjoint(group) or other.keys().isdisjoint(group))
    ]
    if not shared:
        return ""
    more = f", as are {len(shared) - _MAX_NAMES} more" if len(shared) > _MAX_NAMES else ""
    images = "; ".join(shared[:_MAX_NAMES])
    return f"{images}: the same image in {names[0]} and {names[1]}{more}"


def refuse_overlap(train: SegmentationDataset, val: SegmentationDataset, *, allowed: bool) -> str:
    """Refuse splits that share images, unless this is allowed.

    Images are the same if they are one file or, in data sets small enough to be read at a start,
    have equal contents; ``tools/check_data.py`` compares the contents of larger ones.

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
    text = ""
    if isinstance(train, FileDataset) and isinstance(val, FileDataset):
        is_quick = len(train) + len(val) <= _MAX_READ
        first, second = _lengths(train, read=is_quick), _lengths(val, read=is_quick)
        every = {**first, **second}
        groups = group_copies(every) if is_quick else [[path] for path in every]
        text = describe_shared(first, second, groups, keys)
    elif train.fingerprint() == val.fingerprint():
        text = f"{keys[0]} and {keys[1]} are the same images"
    if text and not allowed:
        raise InputError(f"{text}; {FORBIDDEN}")
    return text and f"data.allow_overlap=true: {text}; scores are of images that were trained on"


def _lengths(dataset: FileDataset, *, read: bool) -> dict[str, int]:
    """Return path -> length in bytes, or 0 without; folders are resolved through links."""
    resolve = functools.cache(os.path.realpath)
    found = {}
    for item in dataset.items:
        folder, name = os.path.split(item.image)
        with suppress(OSError):  # reported by the scan
            found[f"{resolve(folder)}/{name}"] = os.stat(item.image).st_size if read else 0
    return found
