"""Inspecting some pairs before a training starts, and suspicious label values."""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from danet.data_check.report import notes_of
from danet.data_check.scan import SplitReport, inspect_pair
from danet.datasets.base import FileDataset, SegmentationDataset
from danet.datasets.folder import Folder
from danet.errors import InputError
from danet.types import IGNORE, ignore_index

_MAX_PROBLEMS = 5  # how many kinds of problems are quoted, and further files that have one


def check_sample(
    *datasets: SegmentationDataset,
    count: int = 32,
    training: SegmentationDataset | None = None,
    skipping: SegmentationDataset | None = None,
) -> list[str]:
    """Inspect the first, the last and ``count`` - 2 other pairs of each split, always the same.

    Data sets without files are skipped. Returns notes for the user; raises InputError if pairs are
    not usable, or their label values show that a setting is missing. Labels of the one that is
    for ``training`` must hold several classes; bad pairs of ``skipping`` are only noted.
    """
    notes, reports = list[str](), list[SplitReport]()
    for dataset in datasets:
        if not isinstance(dataset, FileDataset):
            continue
        report = SplitReport(dataset)
        for index in sample_indices(len(dataset), count):
            report.add(inspect_pair(dataset, index))
        reports.append(report)
        absent = "cannot be learnt" if dataset is training else ""
        notes += notes_of(report, absent=absent, where=f"{dataset.split}: ")
        if dataset is skipping:
            notes += [f"data.on_bad_sample=skip: {text}" for text in _kinds_of_problems([report])]
    if not reports:
        return []
    setting, is_needed = suggest_setting(reports)
    bad = [report for report in reports if report.dataset is not skipping]
    if count := sum(len(report.problems) for report in bad):
        lines = _kinds_of_problems(bad)[:_MAX_PROBLEMS]
        if count > 1 or is_needed:
            looked_at = sum(len(report.pairs) for report in reports)
            more = f"{count} of {looked_at} pairs that were looked at have a problem; "
            more += f"{setting}; " if is_needed else ""
            lines.append(f"{more}tools/check_data.py looks at all pairs")
        raise InputError("\n".join(lines))
    if is_needed:
        raise InputError(setting)
    for report in reports:  # last: it may read all labels
        if report.dataset is training and (problem := find_single_class(report)):
            raise InputError(problem)
    return list(dict.fromkeys([*notes, setting] if setting else notes))


def _kinds_of_problems(reports: Sequence[SplitReport]) -> list[str]:
    """Return the first problem of each kind, with the names of others that differ in numbers."""
    kinds = defaultdict[str, list[tuple[str, str]]](list)
    for report in reports:
        for pair in report.pairs:
            text = pair.problem or ""
            for path in report.dataset.items[pair.index][:2]:
                text = text.replace(path or "\0", "")
            if text:
                kinds[re.sub(r"[\d\[\], ]+", " ", text)].append((str(pair.problem), pair.name))
    texts = []
    for (problem, _), *others in kinds.values():
        names = ", ".join(name for _, name in others[:_MAX_PROBLEMS])
        more = f"\nand {len(others)} more: {names}{', ...' * (len(others) > _MAX_PROBLEMS)}"
        texts.append(problem + more * bool(others))
    return texts


def sample_indices(length: int, count: int) -> list[int]:
    """Return the first, the last and random other indices, sorted, always the same ones."""
    if length <= count or count < 2:
        return list(range(min(length, count)))
    others = np.random.default_rng(0).choice(length - 2, count - 2, replace=False) + 1
    return [0, *sorted(others.tolist()), length - 1]


def find_single_class(report: SplitReport) -> str:
    """Return the problem that all labels of a split hold at most one class; empty if more.

    Labels that the report lacks are read until there is a second class.
    """
    dataset = report.dataset
    seen = set(np.flatnonzero(report.pixels).tolist())
    rest = {*range(len(dataset))} - {pair.index for pair in report.pairs}
    while rest and len(seen) < 2 and dataset.is_labelled:
        pixels = inspect_pair(dataset, rest.pop()).pixels
        seen |= set() if pixels is None else set(np.flatnonzero(pixels[:-1]).tolist())
    if len(seen) > 1 or not dataset.is_labelled:
        return ""
    what = ", ".join(f"class {i} ({dataset.classes[i]})" for i in seen) or "ignored pixels"
    return (
        f"{dataset.split}: all {len(dataset)} labels hold {what} and nothing else, so there is "
        "nothing to learn; see whether these are the right files: tools/check_data.py with the "
        "same settings draws them"
    )


def suggest_setting(reports: Sequence[SplitReport]) -> tuple[str, bool]:
    """Return the setting that the values of all labels call for, and whether nothing else is right.

    The text is empty where there is none; only Folder has such settings.
    """
    dataset, values = reports[0].dataset, set[int]().union(*(report.values for report in reports))
    if not isinstance(dataset, Folder) or dataset.labels.colors or dataset.labels.labels_start_at:
        return "", False
    names, ignored = dataset.classes, ignore_index(len(dataset.classes))
    counted = values - {ignored}
    if values == {0, IGNORE} and dataset.label_map().get(IGNORE) == ignored:
        lost = ", ".join(names[1:4]) + ", ..." * (len(names) > 4)
        return (
            f"all labels hold the values 0 and {IGNORE} only, and {IGNORE} is ignored, so {lost} "
            "would never be learnt; set 'data.values={0:0,255:1}'"
        ), True
    if not counted or dataset.labels.values:
        return "", False
    if min(counted) == 1 and max(counted) == len(names):
        return (
            f"the labels hold values 1..{len(names)} and no 0, for {len(names)} classes: set "
            "data.labels_start_at=1"
        ), True
    if max(counted) >= len(names) and len(counted.intersection(range(len(names)))) < 2:
        for seen in map(sorted, (counted, values)):
            if len(seen) == len(names):
                pairs = ",".join(f"{value}:{i}" for i, value in enumerate(seen))
                shown = ", ".join(map(str, seen))
                return f"the labels hold {shown} only: set 'data.values={{{pairs}}}'", True
    if max(counted) == len(names):
        return (
            f"the labels hold 0 and {len(names)}, one value more than the {len(names)} classes: "
            "add the missing class, or set data.labels_start_at=1 if 0 means no class"
        ), True
    if min(counted) == 1 and max(counted) < len(names):
        return (
            f"no label that was looked at has the value 0 ({names[0]}); if classes count from 1, "
            "set data.labels_start_at=1"
        ), False
    return "", False
