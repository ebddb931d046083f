"""Images that two splits share: a network must not be scored on its training images."""

import functools
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from contextlib import suppress
from pathlib import Path

from danet.datasets.base import FileDataset, SegmentationDataset
from danet.errors import InputError

FORBIDDEN = (
    "what is trained on must not be scored; take it out of one split, or set "
    "data.allow_overlap=true to allow it on purpose"
)
_MAX_NAMES = 5
_MAX_READ = 2000  # images of both splits up to which a training compares contents, not only paths
Copies = list[tuple[int, str]]
"""Images that are the same: the number of the data set, and the path, of each."""


def find_copies(datasets: Sequence[FileDataset], *, read: bool = True) -> list[Copies]:
    """Return the images that stand in data sets more than once.

    They are one file, perhaps through links, or, with ``read``, files of equal contents; only files
    of equal length are read.
    """
    resolve = functools.cache(os.path.realpath)
    places: dict[str, list[int]] = defaultdict(list)
    for i, dataset in enumerate(datasets):
        for folder, name in (os.path.split(item.image) for item in dataset.items):
            places[f"{resolve(folder)}/{name}"].append(i)
    lengths = {path: os.path.getsize(path) for path in places if read and os.path.exists(path)}
    counts = Counter(lengths.values())
    groups: dict[Hashable, Copies] = defaultdict(list)
    for path, numbers in places.items():
        key: Hashable = path
        if counts[lengths.get(path, -1)] > 1:
            with suppress(OSError):  # reported by the scan
                key = hashlib.blake2b(Path(path).read_bytes()).digest()
        groups[key] += [(i, path) for i in numbers]
    return [group for group in groups.values() if len(group) > 1]


def describe_shared(groups: Sequence[Copies], pair: tuple[int, int], names: Sequence[str]) -> str:
    """Return which copies two data sets share, given their numbers and names; empty if none."""
    shared = [
        " and ".join(dict.fromkeys(path for i, path in group if i in pair))
        for group in groups
        if {i for i, _ in group}.issuperset(pair)
    ]
    if not shared:
        return ""
    more = f", as are {len(shared) - _MAX_NAMES} more" if len(shared) > _MAX_NAMES else ""
    images = "; ".join(shared[:_MAX_NAMES])
    return f"{images}: the same image in {names[0]} and {names[1]}{more}"


def refuse_overlap(train: SegmentationDataset, val: SegmentationDataset, *, allowed: bool) -> str:
    """Refuse splits that share images, unless this is allowed; return a note where they do.

    In data sets small enough to be read at a start, images of equal contents count as well;
    ``tools/check_data.py`` compares the contents of larger ones.
    """
    keys = f"data.train_split={train.split}", f"data.val_split={val.split}"
    text = ""
    if isinstance(train, FileDataset) and isinstance(val, FileDataset):
        copies = find_copies((train, val), read=len(train) + len(val) <= _MAX_READ)
        text = describe_shared(copies, (0, 1), keys)
    elif train.fingerprint() == val.fingerprint():
        text = f"{keys[0]} and {keys[1]} are the same images"
    if text and not allowed:
        raise InputError(f"{text}; {FORBIDDEN}")
    return text and f"data.allow_overlap=true: {text}; scores are of images that were trained on"
