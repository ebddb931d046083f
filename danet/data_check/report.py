"""The results of a scan, for people (text, contact sheet) and for programs (JSON)."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from danet.data_check.overlap import FORBIDDEN, describe_shared, identical_files, shared_images
from danet.data_check.sample import dropped_notes
from danet.data_check.scan import SplitReport
from danet.datasets.base import SegmentationDataset
from danet.errors import InputError
from danet.types import IGNORE
from danet.visualization.overlay import add_title, arrange, overlay, with_legend

_TILE = (240, 320)
"""Height and width of a tile of the contact sheet, in pixels."""
_MAX_CLASSES = 20
"""How many classes without a pixel are listed; report.json has all."""


def class_weights(report: SplitReport) -> np.ndarray:
    """Return class weights by median frequency balancing, float64 (K,).

    Eigen and Fergus, Predicting Depth, Surface Normals and Semantic Labels with a Common
    Multi-Scale Convolutional Architecture, ICCV 2015, section 4.3.2: freq(c) is the number of
    pixels of class c divided by all pixels of the images in which c occurs; the weight of c is the
    median of all freq divided by freq(c). A class that does not occur gets 0 and is left out of
    the median.
    """
    weights = np.zeros(len(report.classes))
    seen = report.pixels > 0
    if seen.any():
        frequency = report.pixels[seen] / report.pixels_with[seen]
        weights[seen] = np.median(frequency) / frequency
    return weights


def report_duplicates(reports: Sequence[SplitReport], *, allow_overlap: bool) -> None:
    """Add duplicate images to the reports: a note within a split, a problem between splits."""
    groups = identical_files({path: n for report in reports for path, n in report.bytes_of.items()})
    for i, report in enumerate(reports):
        own = [[path for path in group if path in report.bytes_of] for group in groups]
        if twice := [paths for paths in own if len(paths) > 1]:
            shown = "; ".join(" = ".join(Path(path).name for path in paths) for paths in twice[:5])
            report.notes.append(f"{len(twice)} images are there more than once: {shown}")
        for other in reports[i + 1 :]:
            for image in shared_images(report.bytes_of, other.bytes_of, groups):
                text = describe_shared([image], report.split, other.split)
                if allow_overlap:
                    report.notes.append(text)
                else:
                    report.add_problem(f"{text}; {FORBIDDEN}")


def shared_names(reports: Sequence[SplitReport]) -> list[str]:
    """Return notes on names that images of several splits share; their contents may differ."""
    notes = []
    for i, one in enumerate(reports):
        names = {Path(path).stem for path in one.bytes_of}
        for other in reports[i + 1 :]:
            common = sorted(names & {Path(path).stem for path in other.bytes_of})
            if common:
                notes.append(
                    f"{len(common)} names are those of different images in {one.split} and "
                    f"{other.split}: {', '.join(common[:5])}"
                )
    return notes


def notes_of(report: SplitReport, *, is_training: bool) -> list[str]:
    """Return notes on a split that are not problems."""
    notes = list(report.notes)
    others = {mode: n for mode, n in report.modes.items() if mode != "RGB"}
    if others:
        shown = ", ".join(f"{number} {mode}" for mode, number in sorted(others.items()))
        notes.append(f"images that are turned into 8-bit RGB: {shown}")
    notes += dropped_notes("", report.num_images, report.dropped, report.quantized)
    if report.rotated:
        notes.append(
            f"{len(report.rotated)} images have an EXIF turn, which is not applied: "
            f"{', '.join(report.rotated[:5])}"
        )
    if report.all_ignored:
        notes.append(
            f"{len(report.all_ignored)} labels are ignored everywhere: "
            f"{', '.join(report.all_ignored[:5])}"
        )
    absent = [f"{i} ({report.classes[i]})" for i in np.flatnonzero(report.pixels == 0)]
    if absent and report.has_labels:
        effect = "and cannot be learnt" if is_training else "and have no score"
        more = f" and {len(absent) - _MAX_CLASSES} more" if len(absent) > _MAX_CLASSES else ""
        notes.append(f"classes that never occur {effect}: {', '.join(absent[:_MAX_CLASSES])}{more}")
    return notes


def describe(report: SplitReport, notes: Sequence[str]) -> str:
    """Return the statistics of a split as text, for people."""
    head = f"{report.split}: {report.num_images} images"
    if report.expected:
        head += f" (expected {' or '.join(map(str, report.expected))})"
    lines = [head]
    if report.sizes:
        lines.append(f"  width x height: {_sizes(report)}")
    total = int(report.pixels.sum()) + report.ignored
    if report.has_labels and total:
        width = max(map(len, (*report.classes, "class")))
        lines.append(f"  {'':>3} {'class':<{width}} {'pixels':>9} {'images':>8} {'weight':>9}")
        for i, weight in enumerate(class_weights(report)):
            share = f"{100 * report.pixels[i] / total:.3f} %"
            shown = f"{weight:.4g}" if weight else "-"
            name = f"{report.classes[i]:<{width}}"
            lines.append(f"  {i:>3} {name} {share:>9} {report.images_with[i]:>8} {shown:>9}")
        lines.append(f"  {'':>3} {'(ignored)':<{width}} {100 * report.ignored / total:>7.3f} %")
    lines += [f"  {'' if note.startswith('warning: ') else 'note: '}{note}" for note in notes]
    lines += [f"  problem: {problem}" for problem in report.problems]
    if report.num_problems > len(report.problems):
        lines.append(f"  ... and {report.num_problems - len(report.problems)} more problems")
    return "\n".join(lines)


def _sizes(report: SplitReport) -> str:
    """Return the smallest, median and largest size by area, or the only one."""
    by_area = sorted(report.sizes.elements(), key=lambda size: (size[0] * size[1], size))
    chosen = [by_area[0], by_area[len(by_area) // 2], by_area[-1]]
    shown = [f"{width} x {height}" for height, width in chosen]
    if len(report.sizes) == 1:
        return f"{shown[0]}, all"
    return f"smallest {shown[0]}, median {shown[1]}, largest {shown[2]}"


def weights_setting(report: SplitReport) -> str:
    """Return the class weights as a setting of a training."""
    return f"loss.main.class_weights=[{','.join(f'{w:.4g}' for w in class_weights(report))}]"


def as_json(report: SplitReport, notes: Sequence[str]) -> dict[str, Any]:
    """Return the statistics of a split as plain values, for programs."""
    return {
        "images": report.num_images,
        "expected": list(report.expected),
        "sizes": [
            {"width": width, "height": height, "images": number}
            for (height, width), number in sorted(report.sizes.items())
        ],
        "classes": [
            {
                "index": i,
                "name": name,
                "pixels": int(report.pixels[i]),
                "images": int(report.images_with[i]),
                "weight": round(float(weight), 6),
            }
            for i, (name, weight) in enumerate(
                zip(report.classes, class_weights(report), strict=True)
            )
        ],
        "ignored_pixels": report.ignored,
        "notes": list(notes),
        "problems": report.problems,
        "num_problems": report.num_problems,
    }


def contact_sheet(dataset: SegmentationDataset, indices: Iterable[int]) -> np.ndarray | None:
    """Return masks over their images with a legend, uint8 (H, W, 3); None if none can be read."""
    tiles, present = [], set()
    for index in indices:
        try:
            image, mask, name = dataset.read(index)
        except InputError:
            continue  # already among the problems
        present |= set(np.unique(mask).tolist()) - {IGNORE}
        tiles.append(add_title(_tile(image, mask, dataset), name))
    if not tiles:
        return None
    return with_legend(arrange(tiles), dataset.classes, dataset.palette, present)


def _tile(image: np.ndarray, mask: np.ndarray, dataset: SegmentationDataset) -> np.ndarray:
    """Scale a pair to fit a white tile; a small one is enlarged without smoothing."""
    factor = min(_TILE[0] / image.shape[0], _TILE[1] / image.shape[1])
    size = max(1, int(image.shape[1] * factor)), max(1, int(image.shape[0] * factor))
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST
    small = cv2.resize(image, size, interpolation=interpolation)
    labels = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
    tile = np.full((*_TILE, 3), 255, np.uint8)
    tile[: size[1], : size[0]] = overlay(small, labels, dataset.palette)
    return tile
