"""Exports of annotation tools as data sets: labels become classes, masks are painted once."""

import json
import os
import re

import exports_scene
import exports_tools1
import numpy as np
import pytest
import test_exports_coco
import test_exports_label_studio
import test_exports_roboflow
import test_exports_supervisely
import test_exports_yolo
from conftest import make_folder, save_picture
from pycocotools import mask as coco_mask
from test_config import compose

from danet.config.build import make_dataset
from danet.config.validate import check
from danet.datasets.annotations import Annotations
from danet.datasets.base import Reading
from danet.datasets.exports.index import FORMATS, open_export
from danet.datasets.exports.shapes import paint
from danet.errors import InputError
from danet.types import IGNORE

SIZE = (20, 30)
LABELS = ("car", "tram", "kiosk")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "danet" / "annotations"


def truth(number):
    """Returns values 0 (nothing) to 3 of a picture, (20, 30)."""
    return np.random.default_rng(number).integers(0, 4, SIZE)


def write(root, *, splits=(("train", 3), ("val", 2)), file="annotations/{}.json", **changes):
    """Writes a COCO export with an annotation for each label of a picture; returns its root."""
    for split, count in splits:
        images, annotations = [], []
        for i in range(count):
            name = f"{split}_{i}"
            pixels = np.random.default_rng([len(split), i]).integers(0, 256, (*SIZE, 3), np.uint8)
            save_picture(root / "pictures" / f"{name}.png", pixels)
            images.append(
                {"id": i, "file_name": f"{name}.png", "height": SIZE[0], "width": SIZE[1]}
            )
            for value, _ in enumerate(LABELS, start=1):
                inside = np.asfortranarray(truth([len(split), i]) == value, np.uint8)
                runs = coco_mask.encode(inside)
                runs["counts"] = runs["counts"].decode()
                annotations.append(
                    {
                        **{"id": len(annotations), "image_id": i, "category_id": 10 * value},
                        **{"iscrowd": int(value == 3), "segmentation": runs},
                    }
                )
        categories = [{"id": 10 * i, "name": name} for i, name in enumerate(LABELS, start=1)]
        content = {"images": images, "categories": categories, "annotations": annotations}
        path = root / file.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**content, **changes}))
    return root


def configured(root, *settings, split="train"):
    """Returns a data set as a training makes it."""
    words = ["data=annotations", f"data.root={root}", *settings]
    return make_dataset(check(compose(*words)), split, training=False)


def masks(dataset):
    return [dataset.read(i)[1] for i in range(len(dataset))]


def test_masks_are_those_of_the_export_and_classes_begin_with_the_background(tmp_path):
    dataset = configured(write(tmp_path / "set"))
    assert dataset.classes == ("background", *LABELS)
    expected = [truth([5, i]) for i in range(3)]
    for mask, values in zip(masks(dataset), expected, strict=True):
        np.testing.assert_array_equal(mask, values)
    assert [item.name for item in dataset.items] == [f"pictures/train_{i}" for i in range(3)]
    assert len(configured(tmp_path / "set", split="val")) == 2


@pytest.mark.parametrize(
    ("settings", "classes", "meaning"),
    [
        ("data.background=null", LABELS, [IGNORE, 0, 1, 2]),
        ("data.background=rest", ("rest", *LABELS), [0, 1, 2, 3]),
        ("data.crowd=ignore", ("background", *LABELS), [0, 1, 2, IGNORE]),
        ("data.labels={tram:car}", ("background", "car", "kiosk"), [0, 1, 1, 2]),
        ("data.labels={tram:null}", ("background", "car", "kiosk"), [0, 1, IGNORE, 2]),
        ("data.labels={car:vehicle,*:background}", ("background", "vehicle"), [0, 1, 0, 0]),
        ("data.classes=[background,kiosk] data.labels={*:null}", None, [0, IGNORE, IGNORE, 1]),
        ("data.classes=[kiosk,tram,background,car]", None, [2, 3, 1, 0]),
    ],
)
def test_labels_become_classes_as_set(tmp_path, settings, classes, meaning):
    dataset = configured(write(tmp_path / "set"), *settings.split())
    assert classes is None or dataset.classes == classes
    for i, mask in enumerate(masks(dataset)):
        np.testing.assert_array_equal(mask, np.array(meaning)[truth([5, i])])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "data.classes=[background,car]",
            r"lacks: tram \(5 object\(s\), first .*annotation 1\); k",
        ),
        ("data.classes=[car,tram,kiosk]", "has no background, the class of pixels without"),
        (
            "data.labels={cat:car}",
            "data.labels: cat is no label of .*; its labels are car, tram, k",
        ),
        ("data.format=yolo", "no annotations in the form of yolo below"),
        ("data.format=coko", "data.format=coko: expected auto or one of coco, "),
        (
            "data.annotations=other*.json",
            "data.annotations=other.*: no annotations of a known tool",
        ),
        ("data.crowd=thing", "data.crowd=thing: expected one of class, ignore"),
        ("data.cache_dir={root}/cache", "it lies below data.root"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, message):
    root = write(tmp_path / "set")
    with pytest.raises(InputError, match=message):
        configured(root, *settings.replace("{root}", str(root)).split())


def test_masks_are_painted_once_and_again_when_a_file_changes(tmp_path, cache):
    def painted():
        return {path: path.stat().st_mtime_ns for path in cache.rglob("*.png")}

    root = write(tmp_path / "set")
    configured(root)
    before = painted()
    configured(root, "data.labels={tram:null}", split="val")
    assert painted() == before
    assert len(before) == 5
    path = root / "annotations/val.json"
    path.write_text(path.read_text().replace('"tram"', '"bus"'))
    assert configured(root, "data.labels={tram:bus}").classes == (
        "background",
        "car",
        "bus",
        "kiosk",
    )
    # The masks of a training that runs meanwhile are still there.
    assert before.items() <= painted().items()
    assert len(painted()) == 10


def test_an_index_that_was_cut_off_is_written_again(tmp_path, cache):
    root = write(tmp_path / "set")
    expected = masks(configured(root))
    (index,) = cache.rglob("index.json")
    index.write_text(index.read_text()[:100])
    np.testing.assert_array_equal(masks(configured(root)), expected)


def test_pictures_that_are_missing_are_named_and_left_out_on_request(tmp_path):
    root = write(tmp_path / "set")
    (root / "pictures/train_1.png").unlink()
    with pytest.raises(InputError, match=r"1 of 5 pictures .*train.json: train_1.png; name their"):
        configured(root)
    dataset = configured(root, "data.allow_missing_images=true")
    assert len(dataset) == 2
    assert "left out: 1 of 5" in dataset.notes[0]


def test_pictures_may_lie_in_another_folder(tmp_path):
    root = write(tmp_path / "set")
    (root / "pictures").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"5 of 5 pictures .* data.images_dir=FOLDER$"):
        configured(root)
    assert len(configured(root, f"data.images_dir={tmp_path}/elsewhere")) == 3
    dataset = configured(root, "data.images_dir=../elsewhere")
    assert [item.name for item in dataset.items] == ["train_0", "train_1", "train_2"]


def test_of_pictures_with_one_name_the_path_decides_or_nothing(tmp_path):
    root = write(tmp_path / "set", splits=[("train", 1)])
    save_picture(root / "other/train_0.png", np.zeros((*SIZE, 3), np.uint8))
    with pytest.raises(InputError, match=r"train_0.png may be .*; remove one, or name the folder"):
        configured(root, "data.val_split=null")
    image = {"id": 0, "file_name": "C:\\x\\other\\train_0.png", "height": 20, "width": 30}
    write(root, splits=[("train", 1)], images=[image])
    (item,) = configured(root, "data.val_split=null").items
    assert item.image == str(root / "other/train_0.png")


def test_a_picture_of_another_size_is_named_with_both(tmp_path):
    root = write(tmp_path / "set")
    save_picture(root / "pictures/train_2.png", np.zeros((30, 20, 3), np.uint8))
    expected = r"train.json: train_2.png is 30 x 20 there, and .*train_2.png is 20 x 30 .*EXIF"
    with pytest.raises(InputError, match=expected):
        configured(root)


def test_a_picture_that_two_files_describe_is_refused_and_a_pattern_chooses(tmp_path):
    root = write(tmp_path / "set")
    write(root, file="annotations/person_{}.json")
    message = "person_train.json: train_0.png is described twice"
    with pytest.raises(InputError, match=message.replace("person_train", r"\w+")):
        configured(root)
    assert len(configured(root, "data.annotations=annotations/person_*.json")) == 3


def test_an_export_without_splits_is_divided_by_a_hash_and_by_lists(tmp_path):
    root = write(tmp_path / "set", splits=[("all", 10)])
    train, val = (configured(root, split=split) for split in ("train", "val"))
    assert (len(train), len(val)) == (8, 2)
    assert "by a hash" in val.division
    (root / "train.txt").write_text("pictures/all_3.png\npictures/all_5\n")
    (root / "val.txt").write_text("pictures/all_1.png\n")
    dataset = configured(root, "data.lists={train:train.txt,val:val.txt}")
    assert [item.name for item in dataset.items] == ["pictures/all_3", "pictures/all_5"]


def test_objects_that_overlap_leave_the_picture_or_have_no_area_are_counted(tmp_path):
    def annotation(number, category, *rings):
        return {"id": number, "image_id": 0, "category_id": category, "segmentation": [*rings]}

    root = write(
        tmp_path / "set",
        splits=[("train", 2)],
        annotations=[
            annotation(1, 10, [2, 2, 9, 2, 9, 9, 2, 9]),
            annotation(2, 20, [5, 5, 40, 5, 40, 9, 5, 9]),
            annotation(3, 30, [1, 1, 2, 2]),
            annotation(4, 30),
        ],
    )
    dataset = configured(root, "data.val_split=null")
    expected = np.zeros(SIZE, int)
    expected[2:9, 2:9], expected[5:9, 5:] = 1, 2
    np.testing.assert_array_equal(dataset.read(0)[1], expected)
    notes = "\n".join(dataset.notes)
    for text in (
        "1 object(s) over objects of other labels, which they hide in part, in 1 picture(s)",
        "1 object(s) partly or wholly outside their picture",
        "annotation 2 (tram)",
        "1 object(s) of fewer than three points, left out, in 1 picture(s)",
        "annotation 3 (kiosk)",
        "1 object(s) points or lines",
        "1 picture(s) without any object: pictures/train_1",
    ):
        assert text in notes


@pytest.mark.parametrize(("count", "ignored"), [(200, IGNORE), (300, 65535)])
def test_sets_of_many_labels_are_painted_in_16_bits(tmp_path, count, ignored):
    categories = [{"id": i, "name": f"label {i}"} for i in range(1, count + 1)]
    root = write(tmp_path / "set", categories=categories)
    dataset = configured(root, "data.labels={label 20:null}")
    expected = np.array([0, 10, ignored, 29])[truth([5, 0])]
    np.testing.assert_array_equal(masks(dataset)[0], expected)


def test_the_reader_of_folders_points_to_the_annotations(tmp_path):
    root = write(tmp_path / "set")
    with pytest.raises(InputError, match="there are annotations of coco: data=annotations reads"):
        make_folder(root=root, split="train", classes=["background", *LABELS])


def test_a_set_reads_without_a_config(tmp_path):
    root = write(tmp_path / "set")
    reading = Reading(cache_dir=str(tmp_path / "other"))
    classes = ["background", *LABELS]
    assert len(Annotations(root=root, split="val", classes=classes, reading=reading)) == 2
    assert os.path.isdir(tmp_path / "other" / "annotations")
    with pytest.raises(InputError, match=re.escape("split='vall' is not one of train, val, test")):
        Annotations(root=root, split="vall", classes=classes, reading=reading)


def coco_set(root):
    for name, size in exports_scene.SIZES.items():
        save_picture(root / "images" / name, np.zeros((*size, 3), np.uint8))
    test_exports_coco.write(root / "all.json", test_exports_coco.content_of(exports_scene.SIZES))


def label_studio_set(root):
    test_exports_label_studio.write(root, test_exports_label_studio.tasks())


def supervisely_set(root):
    test_exports_supervisely.write(root)
    for name, split in test_exports_supervisely.SPLITS.items():
        pixels = np.zeros((*exports_scene.SIZES[name], 3), np.uint8)
        save_picture(root / "project" / split / "img" / name, pixels)


def via_set(root):
    exports_tools1.write_pictures(root)
    images = exports_tools1.via_images()
    (root / "via.json").write_text(json.dumps(exports_tools1.via_project(images)))


EXPORTS = {
    **{
        "coco": coco_set,
        "cvat": exports_tools1.write_cvat,
        "labelme": exports_tools1.write_labelme,
    },
    **{"label_studio": label_studio_set, "roboflow": test_exports_roboflow.write},
    **{"supervisely": supervisely_set, "via": via_set, "yolo": test_exports_yolo.write},
    **{"voc_masks": exports_tools1.write_labelme_voc},
}


@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_of_each_format_trains_on_what_its_reader_paints(tmp_path, kind):
    """A format without a set here fails."""
    (root := tmp_path / "set").mkdir()
    EXPORTS[kind](root)
    index = open_export(root, tmp_path / "cache" / "danet")
    assert index.format == kind
    assert not index.missing
    export = FORMATS[kind].read(FORMATS[kind].find(root), root)
    assert len(export.pictures) == len(index.entries) == 3
    splits = {entry.split or "train" for entry in index.entries}
    datasets = [configured(root, "data.val_split=null", split=split) for split in splits]
    found = {item.image: (d, i) for d in datasets for i, item in enumerate(d.items)}
    seen = set()
    for picture, entry in zip(export.pictures, index.entries, strict=True):
        dataset, i = found[entry.image]
        image, mask, _ = dataset.read(i)
        values = paint(picture, image.shape[:2], export.labels).values
        names = np.array(["background", *export.labels], object)[values]
        for value, name in enumerate(dataset.classes):
            of_class = (name, "_background_") if name == "background" else (name,)
            np.testing.assert_array_equal(mask == value, np.isin(names.astype(str), of_class))
        np.testing.assert_array_equal(mask == IGNORE, names == "__ignore__")
        seen |= {*mask.ravel().tolist()} - {IGNORE}
    assert seen == {*range(len(dataset.classes))}


@pytest.mark.parametrize("data", [b"", b'{"images": [', b'\xff\xfe{\0"\0}\0', bytes(99)], ids=repr)
def test_a_cut_off_file_beside_whole_ones_is_named(tmp_path, data):
    root = write(tmp_path / "set")
    (root / "annotations/more.json").write_bytes(data)
    with pytest.raises(InputError, match=r"annotations/more\.json: it is cut off, or no UTF-8"):
        configured(root)


def test_files_and_pictures_that_are_not_used_are_noted(tmp_path):
    root = write(tmp_path / "set")
    (root / "captions.json").write_text('{"captions": []}')
    save_picture(root / "pictures/extra.png", np.zeros((*SIZE, 3), np.uint8))
    notes = "\n".join(configured(root).notes)
    assert f"1 file(s) of another form are not read: {root}/captions.json" in notes
    assert f"1 picture(s) that no annotation file has: {root}/pictures/extra.png" in notes


def test_a_split_that_the_export_lacks_is_refused_in_a_line_with_those_it_has(tmp_path):
    root = write(tmp_path / "set", splits=[("test", 2), ("val", 1)])
    with pytest.raises(InputError, match=r"'train' .*: the export has 2 of test, 1 of val; set d"):
        configured(root)
    assert len(configured(root, "data.train_split=test", split="test")) == 2


@pytest.mark.parametrize("kind", ["roboflow", "supervisely", "voc_masks", "yolo"])
def test_a_missing_picture_is_not_replaced_by_another_of_its_name(tmp_path, kind):
    (root := tmp_path / "set").mkdir()
    EXPORTS[kind](root)
    first = open_export(root, tmp_path / "cache").entries[0].image
    (root / "other").mkdir()
    os.rename(first, root / "other" / os.path.basename(first))
    index = open_export(root, tmp_path / "cache")
    assert len(index.entries) == 2
    assert os.path.splitext(first)[0] in index.missing[0]
