"""COCO's JSON: polygons and run lengths (cocodataset.org/#format-data, "Object Detection").

Annotations are painted in the order of the file, each over those before. The name of a
file or its folder says the split: ``instances_train2017.json``, ``train/_annotations.coco.json``.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pydantic import BaseModel, Field

from danet.datasets.exports import shapes as form
from danet.datasets.exports.shapes import Bitmap, Export, Picture, Shape
from danet.datasets.formats.run_lengths import mask_of_runs
from danet.datasets.layout import split_in
from danet.errors import InputError


class _Image(BaseModel):
    id: int | str
    file_name: str = Field(min_length=1)
    height: int
    width: int


class _Category(BaseModel):
    id: int
    name: str
    supercategory: str | None = None


class _Runs(BaseModel):
    counts: list[int] | str
    size: tuple[int, int]  # height, width


class _Annotation(BaseModel):
    id: int | str | None = None
    image_id: int | str
    category_id: int
    iscrowd: bool = False  # 0 or 1
    segmentation: _Runs | list[list[float]] | None = None


class _File(BaseModel):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation]


def find(root: Path) -> list[Path]:
    """Return the JSON files with images, annotations and categories."""
    return form.files_with(root, (".json",), '"images"', '"categories"')


def read(files: Sequence[Path], root: Path) -> Export:
    """Read all files; labels are the categories of the first, then further ones of others."""
    labels: dict[str, int] = {}
    pictures: list[Picture] = []
    for path in files:
        content = form.read_json(path, _File)
        categories = {category.id: category.name for category in content.categories}
        sizes = {image.id: (image.height, image.width) for image in content.images}
        for key, ids in ("images", sizes), ("categories", categories):
            if len(ids) < len(getattr(content, key)):
                raise InputError(f"{path}: two of its {key} have the same id")
        # Roboflow has a category for the group of all others, which no annotation is of.
        groups = {category.supercategory for category in content.categories if category.id}
        used = {annotation.category_id for annotation in content.annotations}
        names = [n for i, n in categories.items() if i in used or i or n not in groups]
        labels |= form.label_positions(dict.fromkeys(names), path)
        shapes = defaultdict[int | str, list[Shape]](list)
        for number, annotation in enumerate(content.annotations):
            where = f"annotation {number if annotation.id is None else annotation.id}"
            if annotation.category_id not in categories:
                raise InputError(
                    f"{path}, {where}: category_id={annotation.category_id} is not in categories: "
                    f"{', '.join(map(str, categories))}"
                )
            if annotation.image_id not in sizes:
                stated = f"image_id={annotation.image_id}"
                raise InputError(f"{path}, {where}: {stated} is not in images")
            label, size = categories[annotation.category_id], sizes[annotation.image_id]
            shapes[annotation.image_id].append(_shape(annotation, label, size, path, where))
        split = split_in(path.relative_to(root))
        pictures += [
            Picture(path, image.file_name, shapes[image.id], size=sizes[image.id], split=split)
            for image in content.images
        ]
    return Export([*labels], pictures)


def _shape(
    annotation: _Annotation, label: str, size: tuple[int, int], path: Path, where: str
) -> Shape:
    """Return an annotation as a shape; one without a segmentation has no area."""
    found, is_crowd = annotation.segmentation, annotation.iscrowd
    if isinstance(found, _Runs):
        if found.size != size:
            stated = f"segmentation.size={[*found.size]}"
            raise InputError(f"{path}, {where}: {stated}, and its picture has {[*size]}")
        return Shape(label, where, bitmap=partial(_decode, found, path, where), is_crowd=is_crowd)
    rings = [form.polygon(ring, f"{path}, {where} ({label})") for ring in found or ()]
    return Shape(label, where, rings, is_crowd=is_crowd)


def _decode(runs: _Runs, path: Path, where: str) -> Bitmap:
    height, width = runs.size
    try:
        inside = mask_of_runs(runs.counts, height * width)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path}, {where}: segmentation.counts: {error}") from error
    return Bitmap(inside.reshape(width, height).T)  # COCO's runs go down the columns
