"""The look at some pairs before a training starts, and what their values hint at."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from danet.datasets.base import FileDataset, SegmentationDataset
from danet.datasets.folder import Folder
from danet.doctor.scan import Look, look
from danet.errors import InputError
from danet.types import IGNORE

_SHOWN = 5
"""How many problems are told in full."""


def check_sample(
    *datasets: SegmentationDataset, count: int = 32, skipping: SegmentationDataset | None = None
) -> list[str]:
    """Looks at the first, the last and ``count`` - 2 random pairs of each data set.

    The choice is the same every time. Data sets without files have nothing to look at.

    Args:
        datasets: To look at.
        count: Of pairs of each.
        skipping: The one of them whose bad pairs the training is going to skip.

    Returns:
        Notes: what a user should know and what stops nothing.

    Raises:
        InputError: Pairs are not usable, or their values say that a setting is missing.
    """
    notes: list[str] = []
    problems: list[str] = []
    looks: list[Look] = []
    files = [dataset for dataset in datasets if isinstance(dataset, FileDataset)]
    for dataset in files:
        found = [look(dataset, index) for index in choose(len(dataset), count)]
        looks += found
        notes += dataset.notes + describe_images(dataset, found)
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
    return list(dict.fromkeys(notes))


def choose(length: int, count: int) -> list[int]:
    """Returns the first, the last and random other indices, in order, always the same ones."""
    if length <= count:
        return list(range(length))
    others = np.random.default_rng(0).choice(length - 2, count - 2, replace=False) + 1
    return [0, *sorted(others.tolist()), length - 1]


def _join(problems: Sequence[str], wrong: str | None, num_looks: int) -> str:
    """Writes the first problems, one a line, and what their values hint at."""
    lines = list(problems[:_SHOWN])
    if len(problems) > 1 or wrong:
        more = f"{len(problems)} of {num_looks} pairs that were looked at have a problem"
        lines.append("; ".join(filter(None, (more, wrong))) + "; tools/check.py looks at all pairs")
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


def mistaken_values(dataset: FileDataset, values: set[int]) -> str | None:
    """Says which setting the values of all labels together ask for; only for own pictures."""
    num_classes = len(dataset.classes)
    if not isinstance(dataset, Folder) or dataset.colors or not values:
        return None
    label_map = dataset.label_map()
    if values == {0, IGNORE} and num_classes == 2 and label_map.get(IGNORE) == IGNORE:
        return (
            f"all labels hold the values 0 and {IGNORE} only, and {IGNORE} is ignored, so "
            f"{dataset.classes[1]} would never be learnt; set data.values={{0:0,255:1}}"
        )
    counted = values - {IGNORE}
    if not counted or dataset.values or dataset.labels_start_at or max(counted) != num_classes:
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
    if not isinstance(dataset, Folder) or dataset.colors or dataset.values or not counted:
        return []
    if dataset.labels_start_at == 0 and min(counted) == 1 and max(counted) < len(dataset.classes):
        return [
            f"no label that was looked at has the value 0 ({dataset.classes[0]}); if classes count "
            "from 1, set data.labels_start_at=1"
        ]
    return []
