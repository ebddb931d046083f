"""COCO's JSON is painted as its own API does, pixel by pixel (cocodataset.org/#format-data)."""

import json

import numpy as np
import pytest
from exports_scene import BLOB, LABELS, SIZES, THINGS, changed, check, painted, read, slow
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from test_pascal_context import runs_of

from danet.datasets.exports import coco
from danet.datasets.exports.shapes import paint
from danet.errors import InputError

IDS = {"plate": 7, "cup": 3, "fork": 90}


def whole(thing, size):
    """Returns a bitmap in its place in the picture."""
    (left, top), canvas = thing.corner, np.zeros(size, np.uint8)
    canvas[top : top + thing.bitmap.shape[0], left : left + thing.bitmap.shape[1]] = thing.bitmap
    return canvas


def segmentation(thing, size, form):
    """Returns polygons, or runs as a list of numbers or as text."""
    if thing.bitmap is None and not thing.holes:
        return [[float(n) for point in ring for n in point] for ring in thing.rings]
    mask = whole(thing, size) if thing.bitmap is not None else slow([thing], size, LABELS)[0] > 0
    if form == "list":
        return {"size": list(size), "counts": runs_of(mask > 0)}
    text = coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"]
    return {"size": list(size), "counts": text.decode()}


def content_of(names, form="text"):
    images = [
        {"id": i, "file_name": f"images/{name}", "height": SIZES[name][0], "width": SIZES[name][1]}
        for i, name in enumerate(names, start=5)
    ]
    annotations = [
        {
            **{"id": 100 * image["id"] + i, "image_id": image["id"]},
            **{"category_id": IDS[thing.label], "iscrowd": 0, "bbox": [0, 0, 1, 1], "area": 1},
            "segmentation": segmentation(thing, (image["height"], image["width"]), form),
        }
        for image, name in zip(images, names, strict=True)
        for i, thing in enumerate(THINGS[name])
    ]
    categories = [{"id": IDS[label], "name": label, "supercategory": "all"} for label in LABELS]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("form", ["text", "list"])
def test_all_kinds_of_segmentation_give_the_labels_of_the_slow_painter(tmp_path, form):
    write(tmp_path / "instances_default.json", content_of(SIZES, form))
    export = read(coco, tmp_path)
    assert export.labels == [*LABELS]
    assert not export.is_complete
    check(export, THINGS)
    assert [p.size for p in export.pictures] == [*SIZES.values()]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("form", ["text", "list"])
def test_every_annotation_is_bit_identical_to_that_of_pycocotools(tmp_path, form):
    path = tmp_path / "instances_default.json"
    content = content_of(SIZES, form)
    rng = np.random.default_rng(2)
    for i, size in enumerate(SIZES.values()):  # several parts, outside, touching, of few pixels
        for number in range(12):
            parts = [
                (rng.normal(0, 9, (points, 2)) + rng.random(2) * size[::-1]).ravel().tolist()
                for points in rng.integers(3, 9, rng.integers(1, 4))
            ]
            content["annotations"].append(
                {"id": 1000 * (i + 1) + number, "image_id": 5 + i, "category_id": 3}
                | {"iscrowd": 0, "segmentation": parts}
            )
    write(path, content)
    reference, export = COCO(str(path)), read(coco, tmp_path)
    for picture, image in zip(export.pictures, content["images"], strict=True):
        annotations = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        canvas = np.zeros(picture.size, int)
        for shape, annotation in zip(picture.shapes, annotations, strict=True):
            mask = reference.annToMask(annotation) > 0
            picture.shapes, before = [shape], picture.shapes
            value = 1 + export.labels.index(shape.label)
            values = paint(picture, picture.size, export.labels).values
            np.testing.assert_array_equal(values, mask * value, err_msg=shape.where)
            picture.shapes, canvas[mask] = before, value
        values = paint(picture, picture.size, export.labels).values
        np.testing.assert_array_equal(values, canvas)


def test_a_crowd_has_values_of_its_own(tmp_path):
    content = content_of(["second.png"])
    content["annotations"][0]["iscrowd"] = 1
    write(tmp_path / "a.json", content)
    values = painted(read(coco, tmp_path), "second.png").values
    assert set(np.unique(values)) == {0, 1, 3, 2 + len(LABELS)}  # cup
    assert (values == 2 + len(LABELS)).sum() < BLOB.sum()


@pytest.mark.parametrize(
    "places",
    [
        ("annotations/instances_train2017.json", "annotations/instances_val2017.json"),
        ("train/_annotations.coco.json", "valid/_annotations.coco.json"),
    ],
    ids=["official", "roboflow"],
)
def test_files_and_folders_name_the_splits(tmp_path, places):
    for place, name in zip(places, ("first.png", "second.png"), strict=True):
        write(tmp_path / place, content_of([name]))
    export = read(coco, tmp_path)
    assert [(p.name[7:], p.split) for p in export.pictures] == [
        ("first.png", "train"),
        ("second.png", "val"),
    ]
    assert export.labels == [*LABELS]


def test_categories_of_later_files_are_added_by_their_names(tmp_path):
    write(tmp_path / "train.json", content_of(["first.png"]))
    content = content_of(["second.png"])
    content["categories"] = [{"id": 3, "name": "cup"}, {"id": 7, "name": "plate"}]
    content["categories"] += [{"id": 90, "name": "knife"}]
    write(tmp_path / "val.json", content)
    export = read(coco, tmp_path)
    assert export.labels == [*LABELS, "knife"]
    values = painted(export, "second.png").values
    assert set(np.unique(values)) == {0, 1, 2, 4}


def test_an_annotation_without_area_is_counted(tmp_path):
    content = content_of(["first.png"])
    content["annotations"][1]["segmentation"] = []
    content["annotations"][2]["segmentation"] = [[1.0, 2.0, 3.0, 4.0]]
    write(tmp_path / "a.json", content)
    remarks = painted(read(coco, tmp_path), "first.png").remarks
    assert remarks["no area"] == (1, f"{tmp_path}/a.json, annotation 501 (cup)")
    assert remarks["points"] == (1, f"{tmp_path}/a.json, annotation 502 (fork)")


def test_only_files_of_this_form_are_found(tmp_path):
    write(tmp_path / "instances.json", content_of(SIZES))
    write(tmp_path / "tasks.json", [{"id": 1, "data": {"image": "a.png"}, "annotations": []}])
    write(tmp_path / "labelme.json", {"version": "5", "shapes": [], "imagePath": "a.png"})
    write(tmp_path / "ds/ann/a.png.json", {"size": {}, "objects": []})
    assert coco.find(tmp_path) == [tmp_path / "instances.json"]


def test_a_mark_at_the_beginning_and_lines_of_windows_change_nothing(tmp_path):
    text = json.dumps(content_of(SIZES), indent=1).replace("\n", "\r\n")
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    check(read(coco, tmp_path), THINGS)


FIRST = ("annotations", 0)
RUNS = (*FIRST, "segmentation")
BROKEN = {
    "no images": (("images", 0, "file_name"), None, r"a\.json: images\.0\.file_name: Field req"),
    "size": (("images", 0, "height"), "big", r"images\.0\.height: .*integer.*found 'big'"),
    "category": ((*FIRST, "category_id"), 8, r"annotation 500: category_id=8 is not in categor"),
    "image": ((*FIRST, "image_id"), 77, r"annotation 500: image_id=77 is not in images"),
    "runs": ((*RUNS, "counts"), [5, 5], r"annotation 500: .*counts: the runs cover 10 pixels"),
    "text": ((*RUNS, "counts"), "zz!", r"annotation 500: .*counts: not a run-length text"),
    "size of runs": ((*RUNS, "size"), [61, 80], r"500: segmentation.size=\[61, 80\].*\[60, 80\]"),
    "giant runs": (RUNS, {"size": [2**20] * 2, "counts": [0, 2**40]}, r"annotation 500: .*size="),
    "odd": (RUNS, [[1, 2, 3, 4, 5, 6, 7]], r"annotation 500 \(plate\): 7 coordinates"),
    "NaN": (RUNS, [[1, 2, 3, 4, 5, float("nan")]], r"annotation 500 \(plate\): the coordinate"),
    "far": (RUNS, [[1, 2, 3, 4, 5, 1e9]], r"annotation 500 \(plate\): the coordinate"),
    "words": (RUNS, [["a", 2, 3, 4, 5, 6]], r"annotations\.0\.segmentation.*number"),
    "label": (("categories", 0, "name"), " ", r"a\.json: the label ' ' is empty"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_in_a_line_with_its_place(tmp_path, kind):
    path, value, message = BROKEN[kind]
    write(tmp_path / "a.json", changed(content_of(["first.png"]), path, value))
    with pytest.raises(InputError, match=message) as caught:
        read(coco, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "a.json") in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe{", b'{"images": [{"id": 1,'], ids=str)
def test_a_file_that_is_no_json_is_refused(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.json: Invalid JSON: .*(EOF|expected|invalid)"):
        coco.read([tmp_path / "a.json"], tmp_path)


def test_the_group_of_all_categories_by_roboflow_is_no_label(tmp_path):
    content = content_of(SIZES)
    content["categories"].insert(0, {"id": 0, "name": "all", "supercategory": "none"})
    write(tmp_path / "_annotations.coco.json", content)
    assert read(coco, tmp_path).labels == [*LABELS]


@pytest.mark.parametrize("kind", ["images", "categories"])
def test_an_id_that_is_there_twice_is_refused(tmp_path, kind):
    content = content_of(SIZES)
    content[kind][1]["id"] = content[kind][0]["id"]
    write(tmp_path / "a.json", content)
    with pytest.raises(InputError, match=f"a.json: two of its {kind} have the same id"):
        read(coco, tmp_path)
