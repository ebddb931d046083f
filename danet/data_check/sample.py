"""Inspecting some pairs before a training starts, and suspicious label values."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from danet.data_check.scan import PairReport, count_values, inspect_pair
from danet.datasets.base import FileDataset, SegmentationDataset
from danet.datasets.folder import Folder
from danet.datasets.image_io import Levels
from danet.errors import InputError
from danet.types import IGNORE

_FEW = 16
"""Distinct values at or below which an image can hardly show anything."""
_MAX_CLASSES = 20
"""How many absent classes are listed."""
_MAX_PROBLEMS = 5
"""How many problems are quoted in full."""


def check_sample(
    *datasets: SegmentationDataset,
    count: int = 32,
    training: SegmentationDataset | None = None,
    skipping: SegmentationDataset | None = None,
) -> list[str]:
    """Inspect the first, the last and ``count`` - 2 random pairs of each data set.

    The choice is always the same. Data sets without files are skipped.

    Args:
        datasets: The splits.
        count: Pairs of each.
        training: The one of them that is trained on: its labels must hold several classes.
        skipping: The one of them whose bad pairs the training is going to skip.

    Returns:
        Notes for the user that do not stop the training.

    Raises:
        InputError: Pairs are not usable, or their label values show that a setting is missing.
    """
    notes: list[str] = []
    problems: list[str] = []
    pairs: list[PairReport] = []
    scarce: tuple[FileDataset, set[int], list[int]] | None = None
    files = [dataset for dataset in datasets if isinstance(dataset, FileDataset)]
    for dataset in files:
        found = [inspect_pair(dataset, index) for index in sample_indices(len(dataset), count)]
        pairs += found
        notes += dataset.notes + describe_images(dataset, found)
        if dataset is training:
            seen = classes_in(found)
            notes += absent_classes(dataset, seen, len(found))
            if len(seen) < 2:
                scarce = dataset, seen, [pair.pair_index for pair in found]
        bad = [pair.problem for pair in found if pair.problem]
        if dataset is skipping:
            notes += [f"data.on_bad_sample=skip: {problem}" for problem in bad]
        else:
            problems += bad
    if files:
        values = {int(value) for pair in pairs for value in pair.values}
        notes += suspicious_values(files[0], values)
        suggestion = suggest_setting(files[0], values)
        if suggestion and not problems:
            raise InputError(suggestion)
        if problems:
            raise InputError(_join(problems, suggestion, len(pairs)))
        if scarce and (problem := find_single_class(*scarce)):  # last: it may read all labels
            raise InputError(problem)
    return list(dict.fromkeys(notes))


def sample_indices(length: int, count: int) -> list[int]:
    """Return the first, the last and random other indices, sorted, always the same ones."""
    if length <= count or count < 2:
        return list(range(min(length, count)))
    others = np.random.default_rng(0).choice(length - 2, count - 2, replace=False) + 1
    return [0, *sorted(others.tolist()), length - 1]


def _join(problems: Sequence[str], suggestion: str | None, num_pairs: int) -> str:
    """Return the first problems, one a line, and the suggestion."""
    lines = list(problems[:_MAX_PROBLEMS])
    if len(problems) > 1 or suggestion:
        more = f"{len(problems)} of {num_pairs} pairs that were looked at have a problem"
        lines.append(
            "; ".join(filter(None, (more, suggestion))) + "; tools/check_data.py looks at all pairs"
        )
    return "\n".join(lines)


def describe_images(dataset: FileDataset, pairs: Sequence[PairReport]) -> list[str]:
    """Return notes on images that are not plain 8-bit RGB and on labels without any class."""
    notes = []
    others = Counter(pair.mode for pair in pairs if pair.mode not in ("", "RGB"))
    if others:
        shown = ", ".join(f"{number} of mode {mode}" for mode, number in sorted(others.items()))
        notes.append(
            f"{dataset.split}: {shown} of {len(pairs)} images become 8-bit RGB: grey is repeated, "
            "alpha is dropped, 16 bits are divided by 257"
        )
    notes += dropped_notes(
        f"{dataset.split}: ",
        len(pairs),
        Counter(text for pair in pairs for text in pair.dropped),
        [
            (dataset.items[pair.pair_index].name, pair.levels)
            for pair in pairs
            if pair.levels is not None
        ],
    )
    rotated = [dataset.items[pair.pair_index].name for pair in pairs if pair.is_rotated]
    if rotated:
        notes.append(
            f"{dataset.split}: {len(rotated)} of {len(pairs)} images have an EXIF turn, which is "
            f"not applied, so that they lie as their masks do: {', '.join(rotated[:_MAX_PROBLEMS])}"
        )
    empty = [
        dataset.items[pair.pair_index].name
        for pair in pairs
        if pair.classes is not None and (pair.classes == IGNORE).all()
    ]
    if empty:
        notes.append(
            f"{dataset.split}: {len(empty)} of {len(pairs)} labels are ignored everywhere and "
            f"teach nothing: {', '.join(empty[:_MAX_PROBLEMS])}"
        )
    return notes


def dropped_notes(
    where: str, count: int, dropped: Mapping[str, int], quantized: Sequence[tuple[str, Levels]]
) -> list[str]:
    """Return notes on parts of images that are not read and on images with few values left.

    Args:
        where: Begins each note.
        count: Number of images that were inspected.
        dropped: Part that is not read -> number of images.
        quantized: Names and values of images of more than 8 bits.
    """
    notes = [f"{where}{n} of {count} images: {text}" for text, n in sorted(dropped.items())]
    few = [(name, of) for name, of in quantized if of.after <= _FEW and of.low < of.high]
    if few:
        name, worst = min(few, key=lambda pair: pair[1].after)
        low, high = min(of.low for _, of in few), max(of.high for _, of in few)
        notes.append(
            f"warning: {where}{len(few)} of {count} images keep {_FEW} values or fewer as 8 bits: "
            f"{name} has {worst.before}, {worst.low} to {worst.high}, and keeps {worst.after}; "
            "save all images with 8 bits first, stretched alike, as by "
            f"numpy.interp(image, [{low}, {high}], [0, 255]).astype('uint8')"
        )
    return notes


def classes_in(pairs: Iterable[PairReport]) -> set[int]:
    """Return the classes that occur in labels."""
    found = (pair.classes for pair in pairs if pair.classes is not None)
    return {int(value) for classes in found for value in classes} - {IGNORE}


def absent_classes(dataset: FileDataset, seen: Collection[int], count: int) -> list[str]:
    """Return a note on classes that occur in none of the ``count`` labels that were inspected."""
    absent = [f"{i} ({name})" for i, name in enumerate(dataset.classes) if i not in seen]
    if not absent or not dataset.is_labelled:
        return []
    is_all = count == len(dataset)
    more = f" and {len(absent) - _MAX_CLASSES} more" if len(absent) > _MAX_CLASSES else ""
    return [
        f"{dataset.split}: classes that never occur in "
        + (f"its {count} labels and cannot be learnt" if is_all else f"{count} labels looked at")
        + f": {', '.join(absent[:_MAX_CLASSES])}{more}"
        + "; tools/check_data.py counts all labels" * (not is_all)
    ]


def find_single_class(dataset: FileDataset, seen: set[int], inspected: Collection[int]) -> str:
    """Return the problem that all labels hold at most one class; empty if they do not.

    Args:
        dataset: The split.
        seen: Classes of the labels that were inspected.
        inspected: Their indices; the others are read until there is a second class.
    """
    rest = sorted(set(range(len(dataset))) - set(inspected)) if dataset.is_labelled else []
    for index in rest:
        seen = seen | _classes_of_label(dataset, index)
        if len(seen) > 1:
            return ""
    return describe_single_class(dataset, seen)


def _classes_of_label(dataset: FileDataset, index: int) -> set[int]:
    """Return the classes of one label; none if it cannot be used."""
    item = dataset.items[index]
    try:
        labels = dataset.labels_of(item)
        values = count_values(labels)[0].astype(labels.dtype)
        classes = dataset.map_labels(values[None], Path(item.mask or ""))
    except InputError:
        return set()
    return set(classes.ravel().tolist()) - {IGNORE}


def describe_single_class(dataset: FileDataset, seen: Collection[int]) -> str:
    """Return the problem that all labels hold at most the class ``seen``; empty if more."""
    if len(seen) > 1 or not dataset.is_labelled:
        return ""
    what = ", ".join(f"class {i} ({dataset.classes[i]})" for i in seen) or "ignored pixels"
    return (
        f"{dataset.split}: all {len(dataset)} labels hold {what} and nothing else, so there is "
        "nothing to learn; see whether these are the right files: tools/check_data.py with the "
        "same settings draws them"
    )


def suggest_setting(dataset: FileDataset, values: set[int]) -> str | None:
    """Return the setting that the values of all labels call for; only for the class Folder."""
    num_classes = len(dataset.classes)
    if not isinstance(dataset, Folder) or dataset.labels.colors or not values:
        return None
    labels, label_map = dataset.labels, dataset.label_map()
    is_ignored = label_map.get(IGNORE) == IGNORE and not labels.labels_start_at
    if values == {0, IGNORE} and is_ignored:
        lost = ", ".join(dataset.classes[1:4]) + ", ..." * (num_classes > 4)
        return (
            f"all labels hold the values 0 and {IGNORE} only, and {IGNORE} is ignored, so {lost} "
            "would never be learnt; set data.values={0:0,255:1}"
        )
    counted = values - {IGNORE}
    if not counted or labels.values or labels.labels_start_at or max(counted) != num_classes:
        return None
    if min(counted) == 1:
        return (
            f"the labels hold values 1..{num_classes} and no 0, for {num_classes} classes: set "
            "data.labels_start_at=1"
        )
    return (
        f"the labels hold 0 and {num_classes}, one value more than the {num_classes} classes: "
        "add the missing class, or set data.labels_start_at=1 if 0 means no class"
    )


def suspicious_values(dataset: FileDataset, values: set[int]) -> list[str]:
    """Return a note if the values are allowed but probably count classes from 1."""
    counted = values - {IGNORE}
    if not isinstance(dataset, Folder) or not counted:
        return []
    labels = dataset.labels
    if labels.colors or labels.values or labels.labels_start_at:
        return []
    if min(counted) == 1 and max(counted) < len(dataset.classes):
        return [
            f"no label that was looked at has the value 0 ({dataset.classes[0]}); if classes count "
            "from 1, set data.labels_start_at=1"
        ]
    return []
