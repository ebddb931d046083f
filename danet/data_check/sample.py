"""The look at some pairs before a training starts, and what their values hint at."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from danet.data_check.scan import Look, count_values, look
from danet.datasets.base import FileDataset, SegmentationDataset
from danet.datasets.folder import Folder
from danet.datasets.image_io import Levels
from danet.errors import InputError
from danet.types import IGNORE

_FEW = 16
"""Values of an image that can hardly show anything."""
_NAMED = 20
"""How many absent classes are named."""
_SHOWN = 5
"""How many problems are told in full."""


def check_sample(
    *datasets: SegmentationDataset,
    count: int = 32,
    training: SegmentationDataset | None = None,
    skipping: SegmentationDataset | None = None,
) -> list[str]:
    """Looks at the first, the last and ``count`` - 2 random pairs of each data set.

    The choice is the same every time. Data sets without files have nothing to look at.

    Args:
        datasets: To look at.
        count: Of pairs of each.
        training: The one of them that is trained on: its labels must hold several classes.
        skipping: The one of them whose bad pairs the training is going to skip.

    Returns:
        Notes: what a user should know and what stops nothing.

    Raises:
        InputError: Pairs are not usable, or their values say that a setting is missing.
    """
    notes: list[str] = []
    problems: list[str] = []
    looks: list[Look] = []
    alone: tuple[FileDataset, set[int], list[int]] | None = None
    files = [dataset for dataset in datasets if isinstance(dataset, FileDataset)]
    for dataset in files:
        found = [look(dataset, index) for index in choose(len(dataset), count)]
        looks += found
        notes += dataset.notes + describe_images(dataset, found)
        if dataset is training:
            seen = classes_in(found)
            notes += absent_classes(dataset, seen, len(found))
            if len(seen) < 2:
                alone = dataset, seen, [one.place for one in found]
        bad = [one.problem for one in found if one.problem]
        if dataset is skipping:
            notes += [f"data.on_bad_sample=skip: {problem}" for problem in bad]
        else:
            problems += bad
    if files:
        values = {int(value) for one in looks for value in one.values}
        notes += hints(files[0], values)
        wrong = mistaken_values(files[0], values)
        if wrong and not problems:
            raise InputError(wrong)
        if problems:
            raise InputError(_join(problems, wrong, len(looks)))
        if alone and (lonely := only_class(*alone)):  # which may look at all labels, so it is last
            raise InputError(lonely)
    return list(dict.fromkeys(notes))


def choose(length: int, count: int) -> list[int]:
    """Returns the first, the last and random other indices, in order, always the same ones."""
    if length <= count or count < 2:
        return list(range(min(length, count)))
    others = np.random.default_rng(0).choice(length - 2, count - 2, replace=False) + 1
    return [0, *sorted(others.tolist()), length - 1]


def _join(problems: Sequence[str], wrong: str | None, num_looks: int) -> str:
    """Writes the first problems, one a line, and what their values hint at."""
    lines = list(problems[:_SHOWN])
    if len(problems) > 1 or wrong:
        more = f"{len(problems)} of {num_looks} pairs that were looked at have a problem"
        lines.append(
            "; ".join(filter(None, (more, wrong))) + "; tools/check_data.py looks at all pairs"
        )
    return "\n".join(lines)


def describe_images(dataset: FileDataset, looks: Sequence[Look]) -> list[str]:
    """Tells what is done to images that are not plain RGB, and of labels without any class."""
    notes = []
    others = Counter(one.mode for one in looks if one.mode not in ("", "RGB"))
    if others:
        shown = ", ".join(f"{number} of mode {mode}" for mode, number in sorted(others.items()))
        notes.append(
            f"{dataset.split}: {shown} of {len(looks)} images become 8-bit RGB: grey is repeated, "
            "alpha is dropped, 16 bits are divided by 257"
        )
    notes += dropped_notes(
        f"{dataset.split}: ",
        len(looks),
        Counter(text for one in looks for text in one.dropped),
        [(dataset.items[one.place].name, one.levels) for one in looks if one.levels is not None],
    )
    turned = [dataset.items[one.place].name for one in looks if one.is_turned]
    if turned:
        notes.append(
            f"{dataset.split}: {len(turned)} of {len(looks)} images have an EXIF turn, which is "
            f"not applied, so that they lie as their masks do: {', '.join(turned[:_SHOWN])}"
        )
    empty = [
        dataset.items[one.place].name
        for one in looks
        if one.classes is not None and (one.classes == IGNORE).all()
    ]
    if empty:
        notes.append(
            f"{dataset.split}: {len(empty)} of {len(looks)} labels are ignored everywhere and "
            f"teach nothing: {', '.join(empty[:_SHOWN])}"
        )
    return notes


def dropped_notes(
    where: str, count: int, dropped: Mapping[str, int], squeezed: Sequence[tuple[str, Levels]]
) -> list[str]:
    """Tells what reading images leaves out, and of images of which hardly anything is left.

    Args:
        where: Begins each note.
        count: How many images were looked at.
        dropped: What is left out -> in how many images.
        squeezed: Images of more than 8 bits.
    """
    notes = [f"{where}{n} of {count} images: {text}" for text, n in sorted(dropped.items())]
    few = [(name, of) for name, of in squeezed if of.after <= _FEW and of.low < of.high]
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


def classes_in(looks: Iterable[Look]) -> set[int]:
    """Returns the classes that occur in labels."""
    found = (one.classes for one in looks if one.classes is not None)
    return {int(value) for classes in found for value in classes} - {IGNORE}


def absent_classes(dataset: FileDataset, seen: Collection[int], count: int) -> list[str]:
    """Tells of classes that occur in no label of so many that were looked at."""
    absent = [f"{i} ({name})" for i, name in enumerate(dataset.classes) if i not in seen]
    if not absent or not dataset.is_labelled:
        return []
    is_all = count == len(dataset)
    more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
    return [
        f"{dataset.split}: classes that never occur in "
        + (f"its {count} labels and cannot be learnt" if is_all else f"{count} labels looked at")
        + f": {', '.join(absent[:_NAMED])}{more}"
        + "; tools/check_data.py counts all labels" * (not is_all)
    ]


def only_class(dataset: FileDataset, seen: set[int], looked_at: Collection[int]) -> str:
    """Says that the labels of a split hold one class, or none; empty if they do not.

    Where a few labels hold only one, all others are looked at until there is another.
    """
    rest = sorted(set(range(len(dataset))) - set(looked_at)) if dataset.is_labelled else []
    for index in rest:
        seen = seen | _classes_of_label(dataset, index)
        if len(seen) > 1:
            return ""
    return one_class(dataset, seen)


def _classes_of_label(dataset: FileDataset, index: int) -> set[int]:
    """Returns the classes of one label; none of one that cannot be used."""
    item = dataset.items[index]
    try:
        labels = dataset.labels_of(item)
        values = count_values(labels)[0].astype(labels.dtype)
        classes = dataset.map_labels(values[None], Path(item.mask or ""))
    except InputError:
        return set()
    return set(classes.ravel().tolist()) - {IGNORE}


def one_class(dataset: FileDataset, seen: Collection[int]) -> str:
    """Says that all labels of a split hold one class, or none; there is nothing to learn."""
    if len(seen) > 1 or not dataset.is_labelled:
        return ""
    what = ", ".join(f"class {i} ({dataset.classes[i]})" for i in seen) or "ignored pixels"
    return (
        f"{dataset.split}: all {len(dataset)} labels hold {what} and nothing else, so there is "
        "nothing to learn; see whether these are the right files: tools/check_data.py with the "
        "same settings draws them"
    )


def mistaken_values(dataset: FileDataset, values: set[int]) -> str | None:
    """Says which setting the values of all labels together ask for; only for own pictures."""
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


def hints(dataset: FileDataset, values: set[int]) -> list[str]:
    """Tells of values that are allowed and still look like a mistake."""
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
