"""Predictions in the formats of annotation tools: COCO, labelme, and CVAT for images 1.1.

None has polygons with holes. In COCO a line leads to each hole and back. In the others polygons are
painted one over another, each after those around it, and a hole of background is a polygon, too.
"""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, SubElement, tostring

import cv2
import numpy as np
from tqdm import tqdm

from danet.datasets.labels import is_background
from danet.filesystem import atomic_write, write_file
from danet.prediction.polygons import Region, as_one_line, find_regions
from danet.prediction.results import Results
from danet.prediction.sources import Source
from danet.types import ignore_index
from danet.visualization.overlay import Legend


class Outlined(NamedTuple):
    """A picture with the regions that were predicted in it, as ``find_regions`` gives them."""

    path: str  # by which the file names the picture
    size: tuple[int, int]  # H and W
    regions: list[Region]


def write_annotations(
    results: Results, sources: Sequence[Source], kinds: Sequence[str], tolerance: float
) -> None:
    """Write the files of annotation tools for all pictures that have results, from ``index``.

    ``kinds`` are some of POLYGONS. Files of labelme that are there already are kept: they may have
    been corrected.
    """
    background = [i for i, name in enumerate(results.legend.classes) if is_background(name)]
    pictures, kept, unknown = [], 0, ignore_index(len(results.legend.classes))
    done = [source for source in sources if results.find_done(source)] if kinds else []
    for source in tqdm(done, "polygons", unit="image", disable=not kinds):
        # Bytes are decoded, since cv2.imread fails on Windows for names that are not ASCII.
        content = np.fromfile(results.folder / "index" / f"{source.name}.png", np.uint8)
        classes: Any = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
        regions = find_regions(classes, [*background, unknown], tolerance)
        regions = [region for region in regions if region.class_index != unknown]
        # Results are named after pictures below the folder, most of them without the suffix.
        name = Path(source.name).with_name(source.path.name).as_posix()
        pictures.append(Outlined(name, classes.shape, regions))
        file = (results.folder / "labelme" / f"{source.name}.json").resolve()
        if "labelme" in kinds and file.exists():
            kept += 1
        elif "labelme" in kinds:
            image = source.path.parent.resolve() / source.path.name
            is_near = image.anchor == file.anchor  # not on another drive of Windows
            path = Path(os.path.relpath(image, file.parent)) if is_near else image
            shown = pictures[-1]._replace(path=path.as_posix())
            _write_whole(file, to_labelme(shown, results.legend))
    if "coco" in kinds:
        _write_whole(results.folder / "coco/annotations.json", to_coco(pictures, results.legend))
    if "cvat" in kinds:
        _write_whole(results.folder / "cvat/annotations.xml", to_cvat(pictures, results.legend))
    if kept:
        text = f"note: {kept} files in {results.folder / 'labelme'} were there already and are kept"
        print(f"{text}; remove those that are to be written again", file=sys.stderr)


def _write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all."""
    with atomic_write(path) as temporary:
        write_file(temporary, content)


def to_coco(pictures: Iterable[Outlined], legend: Legend) -> str:
    """Return COCO's JSON (cocodataset.org/#format-data): an object per region but background."""
    objects = [index for index, name in enumerate(legend.classes) if not is_background(name)]
    ids = {index: number for number, index in enumerate(objects, start=1)}
    images, annotations = list[Any](), list[Any]()
    for number, (path, (height, width), regions) in enumerate(pictures, start=1):
        images.append({"id": number, "file_name": path, "height": height, "width": width})
        for region in regions:
            if region.class_index in ids:
                low, high = region.outer.min(axis=0), region.outer.max(axis=0)
                line: dict[str, Any] = {"id": len(annotations) + 1, "image_id": number}
                line |= {"category_id": ids[region.class_index], "iscrowd": 0, "area": region.area}
                line["bbox"] = np.concatenate((low, high - low))
                annotations.append({**line, "segmentation": [as_one_line(region).ravel()]})
    categories = [{"id": ids[index], "name": legend.classes[index]} for index in objects]
    content = {"categories": categories, "images": images, "annotations": annotations}
    return json.dumps({"info": {}, "licenses": [], **content}, default=np.ndarray.tolist)


def to_labelme(picture: Outlined, legend: Legend) -> str:
    """Return JSON of labelme 5 (github.com/wkentaro/labelme), whose name for background it uses."""
    names = ["_background_" if is_background(name) else name for name in legend.classes]
    common: dict[str, Any] = {"group_id": None, "shape_type": "polygon", "flags": {}}
    content: dict[str, Any] = {"version": "5.0.0", "flags": {}, "imagePath": picture.path}
    content |= {"imageData": None, "imageHeight": picture.size[0], "imageWidth": picture.size[1]}
    content["shapes"] = [{"label": names[i], "points": p, **common} for i, p, *_ in picture.regions]
    return json.dumps(content, default=np.ndarray.tolist)


def to_cvat(pictures: Iterable[Outlined], legend: Legend) -> bytes:
    """Return XML of CVAT for images 1.1 (docs.cvat.ai, "XML annotation format")."""
    root = Element("annotations")
    SubElement(root, "version").text = "1.1"
    labels = SubElement(SubElement(SubElement(root, "meta"), "task"), "labels")
    for name, color in zip(legend.classes, legend.palette, strict=True):
        label = SubElement(labels, "label")
        SubElement(label, "name").text = name
        SubElement(label, "color").text = f"#{bytes(color).hex()}"
    for number, (path, (height, width), regions) in enumerate(pictures):
        size = {"width": str(width), "height": str(height)}
        image = SubElement(root, "image", {"id": str(number), "name": path, **size})
        for region in regions:
            facts = {"label": legend.classes[region.class_index], "source": "auto", "occluded": "0"}
            points = ";".join(f"{x},{y}" for x, y in region.outer.tolist())
            SubElement(image, "polygon", facts, points=points, z_order=str(region.depth))
    return tostring(root, "utf-8", xml_declaration=True)
