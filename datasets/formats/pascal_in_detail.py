"""Labels of PASCAL in Detail: run lengths in one JSON file, ``trainval_merged.json``.

The file has hundreds of megabytes; the index that stays in memory, around a hundred, holds the runs
as they are in the file. A label is painted when it is read.
"""

import functools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from danet.datasets.formats.run_lengths import mask_of_runs
from danet.errors import InputError


class DetailIndex:
    """The annotations of the file; raises InputError if it is not PASCAL in Detail.

    Attributes:
        phases: Phase (train, val, test) -> names of its pictures, without suffix, as in the file.
        sizes: Name -> height and width.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.phases: dict[str, list[str]] = defaultdict(list)
        self.sizes: dict[str, tuple[int, int]] = {}
        # Name -> category and runs, COCO's text or a list of numbers, in the order of painting.
        self._annotations: dict[str, list[tuple[int, Any]]] = defaultdict(list)
        try:
            content = json.loads(path.read_text("utf-8"), object_hook=_reduced)
            names = {
                image["image_id"]: Path(image["file_name"]).stem for image in content["images"]
            }
            if len(set(names.values())) < len(content["images"]):
                raise ValueError("two images have one image_id or file_name")
            for image in content["images"]:
                name = names[image["image_id"]]
                self.phases[image["phase"]].append(name)
                self.sizes[name] = int(image["height"]), int(image["width"])
            for image_id, category, counts in content["annos_segmentation"]:
                self._annotations[names[image_id]].append((category, counts))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"no key {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{path}: not the JSON of PASCAL in Detail ({reason})") from error

    def labels(self, name: str) -> np.ndarray:
        """Paint the label of a picture: uint16 (H, W) of category ids, 0 where nothing is.

        Annotations are painted in the order of the file, each over those before. Runs that do not
        fill the picture raise InputError.
        """
        height, width = self.sizes[name]
        canvas = np.zeros(height * width, np.uint16)  # (W * H,): COCO's runs go down the columns
        for category, counts in self._annotations[name]:
            try:
                np.putmask(canvas, mask_of_runs(counts, canvas.size), category)
            except (ValueError, TypeError, OverflowError) as error:
                place = f"{self._path}: annotation of category {category} in picture {name}"
                raise InputError(f"{place}: {error}") from error
        return canvas.reshape(width, height).T  # (H, W)


@functools.lru_cache(maxsize=1)  # train and val lie in one file
def detail_index(path: Path, mtime_ns: int) -> DetailIndex:
    """Return the index of a file, from memory while its time of writing is the same."""
    return DetailIndex(path)


def _reduced(element: dict[str, Any]) -> Any:
    """Return what is needed of a JSON object, so that the parts of objects take no memory."""
    if "segmentation" in element and "image_id" in element:
        return element["image_id"], element["category_id"], element["segmentation"]["counts"]
    return element
