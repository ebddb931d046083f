"""labelme's files give what their shapes say, and broken ones are named with the object.

Their form: github.com/wkentaro/labelme, labelme/_label_file.py and labelme/_utils/shape.py; that of
labelme2voc: examples/semantic_segmentation there.
"""

import json

import numpy as np
import pytest
from exports_tools1 import (
    LABELS,
    SCENE,
    SIZE,
    agrees,
    labelme_file,
    labelme_shape,
    painted,
    via_images,
    write_labelme,
    write_labelme_voc,
)
from PIL import Image

from danet.datasets.exports import labelme, voc_masks
from danet.errors import InputError

# Of pycocotools.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def read(root):
    return labelme.read(labelme.find(root), root)


def as_labelme(objects):
    return [("_background_" if item[0] == "background" else item[0], *item[1:]) for item in objects]


def write(root, *objects, **changes):
    """Write one file of shapes; return a function that paints them."""
    path = root / "a.json"
    path.write_text(json.dumps(labelme_file("a.png", objects, **changes)))
    return path


def paint_all(root):
    export = read(root)
    return [painted(picture, export.labels) for picture in export.pictures]


def test_shapes_cover_what_a_slow_rasteriser_says(tmp_path):
    write_labelme(tmp_path)
    export = read(tmp_path)
    assert export.labels == ["_background_", *LABELS]
    assert not export.is_complete
    assert [picture.size for picture in export.pictures] == [SIZE] * 3
    for picture, name in zip(export.pictures, ["a.png", "c.png", "sub/b.png"], strict=True):
        agrees(picture, export.labels, as_labelme(SCENE[name]))


def test_masks_are_taken_bit_by_bit(tmp_path):
    rows = np.random.default_rng(0).integers(0, 2, (9, 13)).tolist()
    write(tmp_path, ("cat", "mask", (7, 4, rows)))
    ((names, remarks),) = paint_all(tmp_path)
    assert ((names == "cat")[4:13, 7:20] == np.array(rows, bool)).all()
    assert (names == "cat").sum() == np.sum(rows)
    assert not remarks


def test_pictures_are_found_from_the_file_also_by_paths_of_windows(tmp_path):
    write_labelme(tmp_path)
    paths = [picture.file.parent / picture.name for picture in read(tmp_path).pictures]
    assert [path.resolve() for path in paths] == [
        tmp_path / name for name in ("a.png", "c.png", "sub/b.png")
    ]


def test_embedded_pictures_are_never_decoded(tmp_path):
    write(tmp_path, ("cat", "circle", (9, 9, 4)), imageData="not base64 at all!" * 100_000)
    ((names, _),) = paint_all(tmp_path)
    assert (names == "cat").any()


def test_a_file_without_shapes_is_a_picture_without_objects(tmp_path):
    write(tmp_path)
    ((names, remarks),) = paint_all(tmp_path)
    assert (names == "").all()
    assert not remarks


def test_lines_and_points_have_no_area_and_are_counted(tmp_path):
    shapes = [{"label": "cat", "points": [[3, 3]], "shape_type": "point", "flags": {}}]
    write(tmp_path, ("dog", "line", [(1, 1), (9, 9)]), shapes=shapes * 2)
    ((names, remarks),) = paint_all(tmp_path)
    assert (names == "").all()
    assert remarks["no area"] == (2, f"{tmp_path}/a.json, shape 0 (cat)")


def test_old_files_have_no_type_of_shape_and_no_size(tmp_path):
    points = [[2, 2], [20, 2], [20, 20]]
    content = {"shapes": [{"label": "cat", "points": points}], "imagePath": "a.png"}
    (tmp_path / "a.json").write_text(json.dumps(content))
    export = read(tmp_path)
    assert export.pictures[0].size is None
    agrees(export.pictures[0], export.labels, [("cat", "polygon", points)])


def test_byte_order_marks_and_line_ends_of_windows_change_nothing(tmp_path):
    path = write(tmp_path, ("cat", "circle", (9, 9, 4)))
    before = paint_all(tmp_path)[0][0]
    text = json.dumps(json.loads(path.read_text()), indent=2).replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert (paint_all(tmp_path)[0][0] == before).all()


def test_json_of_other_tools_is_left_alone(tmp_path):
    coco = {"images": [], "annotations": [], "categories": []}
    supervisely = {"size": {"height": 1, "width": 1}, "objects": [{"points": {"exterior": []}}]}
    others = {"via": via_images(), "coco": coco, "supervisely": supervisely, "empty": {}}
    for name, content in others.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "nothing.json").touch()
    assert labelme.find(tmp_path) == []


SQUARE = labelme_shape("cat", "box", (2, 2, 9, 9, 0))
MASK = labelme_shape("cat", "mask", (2, 2, [[1, 0], [1, 1]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": ""}, r"a\.json, shape 1 \(\): its label is empty"),
        ({"label": 7}, r"a\.json: shapes\.1\.label: .*string, found '7'"),
        ({"points": [[1, 2], [3]]}, r"a\.json: shapes\.1\.points\.1"),
        ({"points": [[1, 2], ["x", 3]]}, r"a\.json: shapes\.1\.points\.1\.0: .*number, found 'x'"),
        ({"points": [[1, 2], [float("nan"), 3]]}, r"a\.json, shape 1 \(cat\): the coordinate"),
        ({"points": [[1, 2]], "shape_type": "circle"}, r"shape 1 \(cat\): a circle has two points"),
        ({"shape_type": "blob"}, r"a\.json, shape 1 \(cat\): shape_type='blob'"),
        ({"points": None}, r"a\.json: shapes\.1\.points: .*array, found 'None'"),
        ({**MASK, "mask": "!!!"}, r"a\.json, shape 1 \(cat\): its mask is no PNG"),
        ({**MASK, "mask": None}, r"a\.json, shape 1 \(cat\): its mask is no PNG"),
        ({**MASK, "mask": MASK["mask"][:-40]}, r"a\.json, shape 1 \(cat\): its mask is no PNG"),
        ({**MASK, "points": [[2, 2], [9, 9]]}, r"\(cat\): its mask .*\(2, 2\).* \[8.0, 8.0\]"),
    ],
)
def test_broken_shapes_are_named(tmp_path, change, message):
    write(tmp_path, shapes=[SQUARE, {**SQUARE, **change}])
    with pytest.raises(InputError, match=message) as error:
        paint_all(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], r"a\.json: Invalid JSON: EOF"),
        (lambda data: data.replace(b"imagePath", b"path"), r"a\.json: imagePath: Field required"),
        (lambda data: data.replace(b'"cat"', b'"\xff\xfe"'), r"a\.json: Invalid JSON"),
        (
            lambda data: data.replace(b'"points"', b'"pts"'),
            r"a\.json: shapes\.0\.points: Field req",
        ),
    ],
)
def test_broken_files_are_named(tmp_path, spoil, message):
    path = write(tmp_path, ("cat", "box", (2, 2, 9, 9, 0)))
    (tmp_path / "b.json").write_bytes(path.read_bytes())
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        read(tmp_path)


def read_voc(root):
    return voc_masks.read(voc_masks.find(root), root)


@pytest.mark.parametrize("with_arrays", [True, False])
def test_exported_masks_are_read_bit_by_bit_with_ignored_pixels(tmp_path, with_arrays):
    truth = write_labelme_voc(tmp_path, with_arrays=with_arrays)
    export = read_voc(tmp_path)
    assert export.labels == ["_background_", *LABELS, "__ignore__"]
    assert export.is_complete
    for picture in export.pictures:
        names, _ = painted(picture, export.labels)
        assert (names == truth[picture.name.rpartition("/")[2]]).all()
    assert len(export.pictures) == 3


def test_old_exports_have_arrays_in_the_folder_of_classes(tmp_path):
    truth = write_labelme_voc(tmp_path)
    (tmp_path / "SegmentationClass").rename(tmp_path / "SegmentationClassPNG")
    (tmp_path / "SegmentationClassNpy").rename(tmp_path / "SegmentationClass")
    export = read_voc(tmp_path)
    assert [picture.file.suffix for picture in export.pictures] == [".npy"] * 3
    assert (painted(export.pictures[0], export.labels)[0] == truth["a.jpg"]).all()


def test_names_of_classes_may_begin_with_the_ignored_one_and_have_a_byte_order_mark(tmp_path):
    write_labelme_voc(tmp_path)
    before = read_voc(tmp_path)
    text = "\r\n".join(["__ignore__", "_background_", *LABELS])
    (tmp_path / "class_names.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_voc(tmp_path).labels == before.labels


def test_folders_of_splits_with_the_same_classes_are_one_export(tmp_path):
    write_labelme_voc(tmp_path / "train")
    write_labelme_voc(tmp_path / "val")
    export = read_voc(tmp_path)
    assert [picture.split for picture in export.pictures] == ["train"] * 3 + ["val"] * 3
    (tmp_path / "val" / "class_names.txt").write_text("_background_\ncow")
    with pytest.raises(InputError, match=r"val/class_names\.txt: its classes differ"):
        read_voc(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(SIZE, np.float32) + 0.5, r"a\.npy: a label must be an array of whole numbers"),
        (np.full(SIZE, 9, np.int32), r"a\.npy: it has the value 9; .* 0\.\.3"),
        (np.full(SIZE, -2, np.int32), r"a\.npy: a label must be .* with -2\.\.-2"),
        (np.zeros((4, 5), np.int32), r"a\.npy: a mask of 5 x 4 for picture .*a\.jpg, which has 56"),
        (np.zeros((*SIZE, 3), np.int32), r"a\.npy: a label must be an array"),
        (np.full(SIZE, "x"), r"a\.npy: (a label must be|not a readable array)"),
    ],
)
def test_broken_arrays_are_named(tmp_path, values, message):
    write_labelme_voc(tmp_path)
    np.save(tmp_path / "SegmentationClassNpy" / "a.npy", values)
    export = read_voc(tmp_path)
    with pytest.raises(InputError, match=message):
        painted(export.pictures[0], export.labels)


@pytest.mark.parametrize("kept", [0, 100])
def test_arrays_and_pictures_cut_off_are_named(tmp_path, kept):
    for name, with_arrays in [("SegmentationClassNpy/a.npy", True), ("SegmentationClass/a.png", 0)]:
        root = tmp_path / str(with_arrays)
        write_labelme_voc(root, with_arrays=with_arrays)
        (root / name).write_bytes((root / name).read_bytes()[:kept])
        export = read_voc(root)
        with pytest.raises(InputError, match=f"{name}: not a readable"):
            painted(export.pictures[0], export.labels)


def test_values_of_pictures_without_a_class_are_named(tmp_path):
    write_labelme_voc(tmp_path, with_arrays=False)
    Image.new("L", SIZE[::-1], 200).save(tmp_path / "SegmentationClass" / "a.png")
    export = read_voc(tmp_path)
    with pytest.raises(InputError, match=r"a\.png: it has the value 200; class_names\.txt"):
        painted(export.pictures[0], export.labels)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"class_names\.txt: it names no labels"),
        (b"_background_\ncat\ncat", r"class_names\.txt: the label 'cat' is empty or there twice"),
        (b"_background_\n\xff\xfe", r"class_names\.txt.*not UTF-8"),
        (b"[a, b]", r"class_names\.txt: not a list of names"),
    ],
)
def test_broken_names_of_classes_are_named(tmp_path, content, message):
    write_labelme_voc(tmp_path)
    (tmp_path / "class_names.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_voc(tmp_path)
