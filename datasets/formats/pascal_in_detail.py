"""Labels of PASCAL in Detail: run lengths in one JSON file, ``trainval_merged.json``.

The file has hundreds of megabytes. It is read once, one annotation after another; the index that
stays in memory, around a hundred megabytes, holds the runs as they are in the file. A label is
painted when it is read.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from danet.errors import InputError

_SKIP = " \t\r\n,"


class DetailIndex(NamedTuple):
    """All annotations of the file, sorted by picture; arrays, so that processes share memory."""

    path: Path
    # Phase (train, val, test) -> names of its pictures, without suffix, in the file's order.
    phases: dict[str, tuple[str, ...]]
    position: dict[str, int]  # name -> row of ``sizes``
    sizes: np.ndarray  # int32 (images, 2): height and width
    first: np.ndarray  # int64 (images + 1): picture i has the annotations first[i]..first[i + 1]
    category: np.ndarray  # int32 (annotations)
    span: np.ndarray  # int64 (annotations, 2): start and end in ``runs``
    is_text: np.ndarray  # bool (annotations): whether the runs are COCO's text or plain numbers
    runs: np.ndarray  # uint8: the runs of all annotations as they stand in the file

    def size(self, name: str) -> tuple[int, int]:
        """Return the height and width of a picture."""
        height, width = self.sizes[self.position[name]].tolist()
        return height, width

    def labels(self, name: str) -> np.ndarray:
        """Paint the label of a picture: uint16 (H, W) of category ids, 0 where nothing is.

        Annotations are painted in the order of the file, each over those before.

        Raises:
            InputError: Runs that do not fill the picture.
        """
        image = self.position[name]
        height, width = self.size(name)
        canvas = np.zeros(height * width, np.uint16)  # (W * H,): COCO's runs go down the columns
        for row in range(int(self.first[image]), int(self.first[image + 1])):
            start, end = self.span[row]
            part = self.runs[start:end]
            try:
                runs = runs_of_text(part) if self.is_text[row] else np.frombuffer(part, "<i8")
                np.putmask(canvas, mask_of_runs(runs, canvas.size), self.category[row])
            except ValueError as error:
                raise InputError(
                    f"{self.path}: annotation of category {self.category[row]} in picture {name}: "
                    f"{error}"
                ) from error
        return canvas.reshape(width, height).T  # (H, W)


def runs_of_text(text: bytes | np.ndarray) -> np.ndarray:
    """Decode COCO's text form of run lengths to int64 (runs), the first of them background.

    A number is a sequence of characters, five bits in each from the low end, two's complement; bit
    5 says that more follow; 48 is added. From the fourth number on the difference to the number two
    places before is stored (the encoding of the COCO API, maskApi.c).

    Raises:
        ValueError: Characters that no encoder writes, or a text that ends inside a number.
    """
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not codes.size:
        return codes
    continues = (codes & 32) != 0
    if codes.min() < 0 or codes.max() > 63 or continues[-1]:
        raise ValueError("not a run-length text of COCO")
    last = np.nonzero(~continues)[0]  # (runs,), position of the last character of each number
    first = np.concatenate(([0], last[:-1] + 1))
    length = last - first + 1
    if length.max() > 8:
        raise ValueError("a run length of more than 40 bits")
    digit = np.arange(codes.size) - np.repeat(first, length)  # place within its number, from 0
    runs = np.add.reduceat((codes & 31) << (5 * digit), first)
    runs -= np.where(codes[last] & 16, np.int64(1) << (5 * length), 0)  # two's complement
    runs[1::2] = runs[1::2].cumsum()  # undoes the differences
    runs[2::2] = runs[2::2].cumsum()  # from 2 on: the first three numbers are plain
    return runs


def mask_of_runs(runs: np.ndarray, size: int) -> np.ndarray:
    """Return bool (size) from lengths of runs of background, object, background, ...

    Raises:
        ValueError: A run is negative, or the runs do not add up to ``size``.
    """
    if runs.size and runs.min() < 0:
        raise ValueError(f"a run has the length {runs.min()}")
    if runs.sum() != size:
        raise ValueError(f"the runs cover {runs.sum()} pixels, the picture has {size}")
    return np.repeat(np.arange(runs.size) % 2 == 1, runs)


def detail_index(path: Path) -> DetailIndex:
    """Return the index of a file, from memory if the file has not changed.

    Raises:
        InputError: It cannot be read or is not PASCAL in Detail.
    """
    try:
        status = path.stat()
        return _read_index(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise InputError(
            f"{path}: not the JSON of PASCAL in Detail ({reason}); expected images with image_id, "
            "file_name, height, width and phase, and annos_segmentation with image_id, "
            "category_id and segmentation"
        ) from error


@functools.lru_cache(maxsize=1)  # train and val lie in one file
def _read_index(path: Path, mtime_ns: int, size: int) -> DetailIndex:
    images: list[dict[str, Any]] = []
    owners: list[int] = []
    categories: list[int] = []
    is_text: list[bool] = []
    ends: list[int] = []
    runs = bytearray()
    for key, element in _elements(path.read_text(encoding="utf-8")):
        if key == "images":
            images.append(element)
        elif key == "annos_segmentation":
            counts = element["segmentation"]["counts"]
            is_text.append(isinstance(counts, str))
            runs += counts.encode("ascii") if is_text[-1] else np.asarray(counts, "<i8").tobytes()
            owners.append(element["image_id"])
            categories.append(element["category_id"])
            ends.append(len(runs))
    if not images or not owners:
        raise ValueError("no images" if not images else "no annos_segmentation")
    names = [Path(image["file_name"]).stem for image in images]
    rows = {image["image_id"]: row for row, image in enumerate(images)}
    if len(rows) < len(images) or len(set(names)) < len(names):
        raise ValueError("two images have one image_id or file_name")
    owner = np.array([rows[i] for i in owners], np.int64)
    order = np.argsort(owner, kind="stable")  # keeps the order in which a picture is painted
    span = np.stack((np.array([0, *ends[:-1]]), np.array(ends)), axis=1)
    phases: dict[str, list[str]] = {phase: [] for phase in ("train", "val", "test")}
    for name, image in zip(names, images, strict=True):
        phases.setdefault(image["phase"], []).append(name)
    return DetailIndex(
        path=path,
        phases={phase: tuple(of_phase) for phase, of_phase in phases.items()},
        position={name: row for row, name in enumerate(names)},
        sizes=np.array([(image["height"], image["width"]) for image in images], np.int32),
        first=np.searchsorted(owner[order], np.arange(len(images) + 1)),
        category=np.array(categories, np.int32)[order],
        span=span[order],
        is_text=np.array(is_text)[order],
        runs=np.frombuffer(runs, np.uint8),
    )


def _elements(text: str) -> Iterator[tuple[str, Any]]:
    """Yield (key, element) of every list in a JSON object, one element in memory at a time."""
    decode = json.JSONDecoder().raw_decode
    position = _after(text, 0, _SKIP)
    if text[position : position + 1] != "{":
        raise ValueError("it is no JSON object")
    position = _after(text, position + 1, _SKIP)
    while text[position : position + 1] != "}":
        key, position = decode(text, position)
        position = _after(text, position, _SKIP + ":")
        if text[position : position + 1] != "[":
            _, position = decode(text, position)
        else:
            position = _after(text, position + 1, _SKIP)
            while text[position : position + 1] != "]":
                element, position = decode(text, position)
                yield key, element
                position = _after(text, position, _SKIP)
            position += 1
        position = _after(text, position, _SKIP)


def _after(text: str, position: int, skip: str) -> int:
    """Return the position of the next character that is not in ``skip``."""
    while text[position : position + 1] and text[position] in skip:
        position += 1
    return position
