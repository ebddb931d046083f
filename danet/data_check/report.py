"""The results of a scan, for people (text, contact sheet) and for programs (JSON)."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from danet.data_check.overlap import FORBIDDEN, describe_shared, find_copies
from danet.data_check.scan import SplitReport
from danet.datasets.base import FileDataset, SegmentationDataset
from danet.datasets.image_io import Levels
from danet.errors import InputError
from danet.visualization.overlay import Legend, compose

_TILE = (320, 240)  # width and height of a tile of the contact sheet, in pixels
_MAX_CLASSES = 20  # how many classes without a pixel are listed; report.json has all
_MAX_NAMES = 5
_LARGE_WEIGHT = 50
_MUCH = 25  # percent of pixels without a listed value from which on one may be missing
_FEW = 16  # distinct values at or below which an image can hardly show anything


def class_weights(report: SplitReport) -> np.ndarray:
    """Return class weights by median frequency balancing, float64 (K,).

    Eigen and Fergus, Predicting Depth, Surface Normals and Semantic Labels with a Common
    Multi-Scale Convolutional Architecture, ICCV 2015, section 4.3.2: freq(c) is the number of
    pixels of class c divided by all pixels of the images in which c occurs; the weight of c is the
    median of all freq divided by freq(c). A class that does not occur gets 0 and is left out of
    the median.
    """
    weights, seen = np.zeros(len(report.pixels)), report.pixels > 0
    if seen.any():
        frequency = report.pixels[seen] / report.pixels_with[seen]
        weights[seen] = np.median(frequency) / frequency
    return weights


def report_duplicates(reports: Sequence[SplitReport], *, allow_overlap: bool) -> None:
    """Add duplicate images to the reports: a note within a split, a problem between splits."""
    groups = find_copies([report.dataset for report in reports])
    for i, report in enumerate(reports):
        own = [[Path(path).name for k, path in group if k == i] for group in groups]
        if twice := [" = ".join(names) for names in own if len(names) > 1]:
            shown = "; ".join(twice[:_MAX_NAMES])
            report.notes.append(f"{len(twice)} images are there more than once: {shown}")
        for j in range(i + 1, len(reports)):
            names = report.dataset.split, reports[j].dataset.split
            text = describe_shared(groups, (i, j), names)
            if text and allow_overlap:
                report.notes.append(text)
            elif text:
                report.problems.append(f"{text}; {FORBIDDEN}")


def notes_of(report: SplitReport, *, absent: str = "", where: str = "") -> list[str]:
    """Return notes on the pairs of a split that are not problems; ``where`` begins each.

    ``absent`` is what it means that a class never occurs; without it such classes are left out.
    """
    dataset, count = report.dataset, len(report.pairs)
    pictures = [(pair.name, pair.remarks, pair.levels) for pair in report.usable]
    notes = [*report.notes, *picture_notes(pictures, where)]
    if changed := [pair.unlisted for pair in report.pairs if pair.unlisted]:
        share = 100 * sum(changed) / max(1, report.ignored + int(report.pixels.sum()))
        notes.append(
            f"{'warning: ' * (share > _MUCH)}{where}data.nearest=true: {sum(changed)} pixels "
            f"({share:.2f} %) in {len(changed)} of {count} labels count as the nearest value or "
            f"colour that is listed{'; is one missing there?' * (share > _MUCH)}"
        )
    classes = [f"{i} ({dataset.classes[i]})" for i in np.flatnonzero(report.pixels == 0)]
    if classes and absent and dataset.is_labelled:
        is_all = count == len(dataset)
        of = f"its {count} labels and {absent}" if is_all else f"{count} labels looked at"
        more = len(classes) - _MAX_CLASSES
        notes.append(
            f"{where}classes that never occur in {of}: {', '.join(classes[:_MAX_CLASSES])}"
            + f" and {more} more" * (more > 0)
            + "; tools/check_data.py counts all labels" * (not is_all)
        )
    return notes


def picture_notes(
    pictures: Sequence[tuple[str, Sequence[str], Levels | None]], where: str = ""
) -> list[str]:
    """Return notes on what reading images changes, and on images with few values left.

    ``pictures`` are name, remarks, and levels of those of more than 8 bits; ``where`` begins notes.
    """
    count, named = len(pictures), defaultdict[str, list[str]](list)
    for name, remarks, _ in pictures:
        for remark in remarks:
            named[remark].append(name)
    notes = [
        f"{where}{len(names)} of {count} images: {remark}: {', '.join(names[:_MAX_NAMES])}"
        for remark, names in sorted(named.items())
    ]
    few = [(n, of) for n, _, of in pictures if of and of.after <= _FEW and of.low < of.high]
    if few:
        notes.append(
            f"warning: {where}{len(few)} of {count} images keep {_FEW} values or fewer as 8 bits: "
            f"{', '.join(name for name, _ in few[:_MAX_NAMES])}; "
            f"data.channels={few[0][1].bands} data.range=auto keeps all values"
        )
    return notes


def record(report: SplitReport, notes: Sequence[str], *, show: int) -> dict[str, Any]:
    """Return the statistics of a split and its first problems as plain values, for programs."""
    dataset = report.dataset
    sizes = Counter(pair.size for pair in report.pairs if pair.size is not None)
    by_area = sorted(sizes.items(), key=lambda pair: math.prod(pair[0]))
    columns = report.pixels, report.images_with, class_weights(report).round(6)
    rows = zip(dataset.classes, *(column.tolist() for column in columns), strict=True)
    return {
        "images": len(dataset),
        "expected": list(dataset.expected.get(dataset.split, ())),
        "sizes": [
            {"width": width, "height": height, "images": number}
            for (height, width), number in by_area
        ],
        "classes": [
            {"index": i, "name": name, "pixels": pixels, "images": images, "weight": weight}
            for i, (name, pixels, images, weight) in enumerate(rows)
        ],
        "ignored_pixels": report.ignored,
        "notes": list(notes),
        "problems": report.problems[:show],
        "num_problems": len(report.problems),
    }


def describe(split: str, found: Mapping[str, Any]) -> str:
    """Return the record of a split as text, for people."""
    expected = " or ".join(map(str, found["expected"]))
    lines = [f"{split}: {found['images']} images" + (expected and f" (expected {expected})")]
    if sizes := [f"{size['width']} x {size['height']}" for size in found["sizes"]]:
        last = f" to {sizes[-1]}, {len(sizes)} sizes" if len(sizes) > 1 else ", all"
        lines.append(f"  width x height: {sizes[0]}{last}")
    classes, ignored = found["classes"], found["ignored_pixels"]
    if total := sum(row["pixels"] for row in classes) + ignored:
        width = max(len(row["name"]) for row in (*classes, {"name": "(ignored)"}))
        lines.append(f"  {'':>3} {'class':<{width}} {'pixels':>9} {'images':>8} {'weight':>9}")
        for row in classes:
            weight = f"{row['weight']:.4g}" if row["weight"] else "-"
            share = f"{100 * row['pixels'] / total:.3f} %"
            name = f"{row['index']:>3} {row['name']:<{width}}"
            lines.append(f"  {name} {share:>9} {row['images']:>8} {weight:>9}")
        lines.append(f"  {'':>3} {'(ignored)':<{width}} {100 * ignored / total:>7.3f} %")
    for note in found["notes"]:
        lines.append(f"  {'' if note.startswith('warning: ') else 'note: '}{note}")
    if found["num_problems"]:
        lines.append(f"  {found['num_problems']} problem(s), listed at the end")
    return "\n".join(lines)


def weights_setting(report: SplitReport) -> str:
    """Return the class weights as a setting of a training, with a caution about large ones."""
    weights = class_weights(report)
    setting, capped = (
        f"'loss.main.class_weights=[{','.join(f'{w:.4g}' for w in column)}]'"
        for column in (weights, weights.clip(max=_LARGE_WEIGHT))
    )
    large = ", ".join(report.dataset.classes[i] for i in np.flatnonzero(weights > _LARGE_WEIGHT))
    if not large:
        return setting
    return (
        f"{setting}\n  caution: weights above {_LARGE_WEIGHT} ({large}) let a few pixels decide "
        f"every step, and wrong labels among them do harm; capped: {capped}"
    )


def contact_sheet(dataset: SegmentationDataset, indices: Iterable[int]) -> np.ndarray | None:
    """Return masks over their images with a legend, uint8 (H, W, 3); None if none can be read."""
    bands = dataset.reading.bands if isinstance(dataset, FileDataset) else None
    tiles, masks, legend = [], [], Legend(dataset.classes, dataset.palette, bands=bands)
    for index in indices:
        try:
            image, mask, name = dataset.read(index)
        except InputError:
            continue  # already among the problems
        masks.append(np.unique(mask))
        drawn = Image.fromarray(legend.over(image, mask))
        # A small one is enlarged without smoothing, a large one is averaged.
        box = Image.Resampling.BOX
        tile = ImageOps.pad(drawn, _TILE, method=box, color="white", centering=(0, 0))
        tiles.append((name, np.asarray(tile)))
    if not tiles:
        return None
    return compose(tiles, legend, masks)
