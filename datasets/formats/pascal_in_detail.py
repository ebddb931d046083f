"""Labels of PASCAL in Detail: run lengths in one JSON file, ``trainval_merged.json``.

The file has hundreds of megabytes; the index that stays in memory, around a hundred, holds the runs
as they are in the file. A label is painted when it is read.
"""

import functools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from danet.errors import InputError


class DetailIndex(NamedTuple):
    """The annotations of the file."""

    path: Path
    phases: dict[str, list[str]]
    """Phase (train, val, test) -> names of its pictures, without suffix, in the file's order."""
    sizes: dict[str, tuple[int, int]]
    """Name -> height and width."""
    annotations: dict[str, list[tuple[int, Any]]]
    """Name -> category and runs, COCO's text or a list of numbers, in the order of painting."""

    def labels(self, name: str) -> np.ndarray:
        """Paint the label of a picture: uint16 (H, W) of category ids, 0 where nothing is.

        Annotations are painted in the order of the file, each over those before.

        Raises:
            InputError: Runs that do not fill the picture.
        """
        height, width = self.sizes[name]
        canvas = np.zeros(height * width, np.uint16)  # (W * H,): COCO's runs go down the columns
        for category, counts in self.annotations[name]:
            try:
                runs = runs_of_text(counts) if isinstance(counts, str) else counts
                mask = mask_of_runs(np.array(runs, np.int64), canvas.size)
                np.putmask(canvas, mask, category)
            except ValueError as error:
                raise InputError(
                    f"{self.path}: annotation of category {category} in picture {name}: {error}"
                ) from error
        return canvas.reshape(width, height).T  # (H, W)


def runs_of_text(text: str) -> list[int]:
    """Decode COCO's text form of run lengths, the first of them background.

    A number is a sequence of characters, five bits in each from the low end, two's complement; bit
    5 says that more follow; 48 is added. From the fourth number on the difference to the number two
    places before is stored (the encoding of the COCO API, maskApi.c).

    Raises:
        ValueError: Characters that no encoder writes, or a text that ends inside a number.
    """
    runs: list[int] = []
    number = shift = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64 or shift > 35:  # 40 bits are more than any picture has
            raise ValueError("not a run-length text of COCO")
        number |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            number -= (1 << shift) * bool(digit & 16)
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = shift = 0
    if shift:
        raise ValueError("a run-length text of COCO that ends inside a number")
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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise InputError(
            f"{path}: not the JSON of PASCAL in Detail ({reason}); expected images with image_id, "
            "file_name, height, width and phase, and annos_segmentation with image_id, "
            "category_id and segmentation"
        ) from error


@functools.lru_cache(maxsize=1)  # train and val lie in one file
def _read_index(path: Path, mtime_ns: int, size: int) -> DetailIndex:
    with path.open(encoding="utf-8") as file:
        content = json.load(file, object_hook=_reduced)
    index = DetailIndex(path, {"train": [], "val": [], "test": []}, {}, defaultdict(list))
    names = {image["image_id"]: Path(image["file_name"]).stem for image in content["images"]}
    if len(set(names.values())) < len(content["images"]):
        raise ValueError("two images have one image_id or file_name")
    for image in content["images"]:
        name = names[image["image_id"]]
        index.phases.setdefault(image["phase"], []).append(name)
        index.sizes[name] = int(image["height"]), int(image["width"])
    for image_id, category, counts in content["annos_segmentation"]:
        index.annotations[names[image_id]].append((category, counts))
    return index


def _reduced(element: dict[str, Any]) -> Any:
    """Return what is needed of a JSON object, so that the parts of objects take no memory."""
    if "segmentation" in element and "image_id" in element:
        return element["image_id"], element["category_id"], element["segmentation"]["counts"]
    return element
