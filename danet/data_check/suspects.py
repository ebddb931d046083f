"""Labels that a trained network contradicts: regions and pictures for people to look at again.

Regions as in Rottmann and Reese, "Automated Detection of Label Errors in Semantic Segmentation
Datasets via Deep Learning and Uncertainty Quantification", WACV 2023, ranked by the loss of their
labels: -log of the self-confidence of Northcutt et al., "Confident Learning", JAIR 2021.
"""

import heapq
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from danet.bands import as_input
from danet.data.workers import init_worker
from danet.datasets.base import FileDataset
from danet.errors import InputError
from danet.evaluation.inference import Whole
from danet.types import Sample, ignore_index
from danet.visualization.overlay import Legend, SegmentedImage, panels_of, resize
from danet.visualization.report import css_colors, data_uri, render

_FLOOR = 1e-4  # of a probability, so that a few pixels do not decide the mean of a region
_THIN = 75  # regions thinner than this part of the shorter side are the usual errors at borders
_SMALL = 1600  # regions have at least this part of the picture
_MANY = 0.05, 4  # shares of contradicted pixels above this, and this many times the median
_PER_PICTURE = 3  # regions, so that one picture does not fill the list
_KEPT = 500  # pictures of a split


class Region(NamedTuple):
    """Connected pixels whose labels a network contradicts, or all such pixels of a picture."""

    box: tuple[int, ...]  # x, y, width and height, in pixels
    pair: tuple[int, int] | None  # most frequent label and prediction; None of a mixed picture
    pixels: int
    share: float  # of the picture
    score: float  # mean loss, at most 9.2, times the fourth root of the share


Suspect = tuple[FileDataset, int, Region]  # with the data set and the index of the picture


@torch.inference_mode()
def predict(model: nn.Module, sample: Sample) -> tuple[np.ndarray, ...]:
    """Return a picture, its prediction, its mask, and the loss of each pixel, float32 (H, W)."""
    image, mask, _ = sample
    device = next(model.parameters()).device
    pixels = torch.from_numpy(np.array(as_input(image))).to(device)  # it may be read-only
    scores = Whole()(model, pixels.permute(2, 0, 1)[None])[0]  # (K, H, W)
    labels = torch.from_numpy(mask.astype(np.int64)).to(device).clamp(max=len(scores) - 1)
    loss = scores.gather(0, labels[None])[0].clamp(min=_FLOOR).log().neg()
    return image, scores.argmax(dim=0).cpu().numpy().astype(mask.dtype), mask, loss.cpu().numpy()


def find_regions(
    num_classes: int, prediction: np.ndarray, mask: np.ndarray, loss: np.ndarray
) -> list[Region]:
    """Return all contradicted pixels as one, then the regions by descending score; (H, W) each."""
    wrong = (mask != prediction) & (mask != ignore_index(num_classes))
    side = 2 * max(1, min(mask.shape) // (2 * _THIN)) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    opened = cv2.morphologyEx(wrong.view(np.uint8), cv2.MORPH_OPEN, disc)
    _, numbers, boxes, _ = cv2.connectedComponentsWithStats(opened, connectivity=4)
    kept = np.flatnonzero(boxes[1:, cv2.CC_STAT_AREA] >= mask.size / _SMALL) + 1
    regions = []
    for chosen in (kept, *kept) if len(kept) else ():
        inside = np.isin(numbers, chosen)
        pairs = mask[inside].astype(np.int64) * num_classes + prediction[inside]
        values, counts = np.unique(pairs, return_counts=True)
        is_mixed = chosen is kept and 2 * counts.max() < len(pairs)
        pair = None if is_mixed else divmod(int(values[counts.argmax()]), num_classes)
        box, share = tuple(cv2.boundingRect(inside.view(np.uint8))), len(pairs) / mask.size
        score = float(loss[inside].mean()) * share**0.25
        regions.append(Region(box, pair, len(pairs), share, score))
    return regions[:1] + sorted(regions[1:], key=lambda region: -region.score)


def _read(dataset: FileDataset, index: int) -> Sample | None:
    with suppress(InputError):  # the scan reports it
        return dataset[index]
    return None


def find_suspects(
    model: nn.Module, dataset: FileDataset, indices: Sequence[int], *, num_workers: int = 0
) -> list[Suspect]:
    """Return what a network, fused for inference, contradicts in pictures, highest scores first.

    A picture has up to three regions. It is one entry as a whole if its contradicted pixels are of
    many classes and far more than usual, as where a mask is shifted.
    """
    shares, found = list[float](), list[tuple[float, int, list[Region]]]()
    samples: Iterable[Sample | None] = DataLoader(
        indices,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=partial(_read, dataset),
        num_workers=num_workers,
        worker_init_fn=init_worker,
    )
    shown = tqdm(samples, desc=f"{dataset.split}, network", unit="image", dynamic_ncols=True)
    for index, sample in zip(indices, shown, strict=True):
        if sample is None:
            continue
        _, *maps = predict(model, sample)
        regions = find_regions(len(dataset.classes), *maps)[: 1 + _PER_PICTURE]
        best = max((region.score for region in regions), default=0.0)
        found = heapq.nlargest(_KEPT, [*found, (best, index, regions)])
        shares.append(regions[0].share if regions else 0.0)
    limit = max(_MANY[0], _MANY[1] * float(np.median(shares or [0])))
    suspects: list[Suspect] = []
    for _, index, regions in found:
        is_whole = any(region.pair is None and region.share > limit for region in regions)
        suspects += [(dataset, index, r) for r in (regions[:1] if is_whole else regions[1:])]
    return sorted(suspects, key=lambda suspect: -suspect[2].score)


def page(model: nn.Module, suspects: Sequence[Suspect], legend: Legend) -> str:
    """Return a page with image, label and prediction of each suspect side by side."""
    entries = []
    for dataset, index, region in suspects:
        x, y, width, height = region.box
        *arrays, loss = predict(model, dataset[index])
        rows, columns = loss.shape
        side = max(2 * max(width, height), min(rows, columns) // 3)
        left = max(0, min(x + (width - side) // 2, columns - side))
        top = max(0, min(y + (height - side) // 2, rows - side))
        cut = (array[top : top + side, left : left + side] for array in arrays)
        factor = 360 / min(side, columns)  # to a width for the page
        shown = panels_of(resize(SegmentedImage("", *cut), factor), legend)
        corners = np.rint(factor * np.array([x - left, y - top, width, height])).astype(int)
        for _, panel in shown:
            cv2.rectangle(panel, corners.tolist(), (0, 0, 0), 4)  # seen on bright and on dark
            cv2.rectangle(panel, corners.tolist(), (255, 255, 255), 2)
        panels = [data_uri(panel) for _, panel in shown]
        entries.append((dataset, dataset.items[index], region, panels))
    values = {"legend": legend, "colors": css_colors(legend), "entries": entries}
    return render("suspects.html", title="Suspicious labels", **values)
