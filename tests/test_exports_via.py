"""VIA's files give what their regions say, and broken ones are named with the region.

Their form: gitlab.com/vgg/via, via-2.x.y/CodeDoc.md, "Description of VIA Project JSON File".
"""

import json
from copy import deepcopy

import pytest
from exports_tools1 import (
    LABELS,
    TURNED,
    VIA_SCENE,
    agrees,
    labelme_file,
    painted,
    via_images,
    via_project,
)

from danet.datasets.exports import via
from danet.errors import InputError

# Of pycocotools.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def read(root, content=None):
    if content is not None:
        (root / "via.json").write_text(json.dumps(content))
    return via.read(via.find(root), root)


@pytest.mark.parametrize("form", [via_images, lambda: via_project(via_images())])
def test_regions_cover_what_a_slow_rasteriser_says(tmp_path, form):
    export = read(tmp_path, form())
    assert export.labels == ["background", *LABELS]
    assert not export.is_complete
    assert [picture.name for picture in export.pictures] == [*VIA_SCENE]
    for picture in export.pictures:
        agrees(picture, export.labels, VIA_SCENE[picture.name])


def test_ellipses_turn_clockwise_by_radians_and_old_ones_lie_straight(tmp_path):
    content = via_images({"a.png": [TURNED[1]]})
    export = read(tmp_path, content)
    agrees(export.pictures[0], export.labels, [TURNED[1]])
    (image,) = content.values()
    del image["regions"][0]["shape_attributes"]["theta"]
    export = read(tmp_path, content)
    straight = (*TURNED[1][2][:4], 0)
    agrees(export.pictures[0], export.labels, [("dog", "ellipse", straight)])


def test_regions_of_the_first_version_are_numbered(tmp_path):
    content = via_images()
    before = read(tmp_path, content)
    for image in content.values():
        image["regions"] = {str(i): region for i, region in enumerate(image["regions"])}
    after = read(tmp_path, content)
    for one, other in zip(after.pictures, before.pictures, strict=True):
        assert (painted(one, after.labels)[0] == painted(other, before.labels)[0]).all()


@pytest.mark.parametrize(
    ("label", "found"),
    [
        (lambda name: {"beast": name}, ["background", *LABELS]),  # the only one
        (lambda name: {"note": "-", "Type": name}, ["background", *LABELS]),  # a known name
        (lambda name: {"type": "x", "label": name}, ["background", *LABELS]),  # label before type
        (lambda name: {"class": {"cat": name == "cat", "dog": name != "cat"}}, ["cat", "dog"]),
        (lambda _: {}, ["object"]),
        (lambda _: {"class": ""}, ["object"]),
    ],
)
def test_the_label_is_the_attribute_that_the_docstring_says(tmp_path, label, found):
    assert read(tmp_path, via_images(label=label)).labels == found


def test_of_unknown_attributes_the_one_that_most_regions_have_is_the_label(tmp_path):
    content = via_images(label=lambda name: {"beast": name})
    next(iter(content.values()))["regions"][0]["region_attributes"]["aspect"] = "front"
    assert read(tmp_path, content).labels == ["background", *LABELS]


def test_lines_and_points_have_no_area_and_are_counted(tmp_path):
    content = via_images({"a.png": [("dog", "line", [(2, 2), (9, 9)])]})
    region = next(iter(content.values()))["regions"]
    point = {"shape_attributes": {"name": "point", "cx": 1, "cy": 2}}
    region.append({**point, "region_attributes": {"class": "cat"}})
    export = read(tmp_path, content)
    names, remarks = painted(export.pictures[0], export.labels)
    assert (names == "").all()
    assert remarks == {"no area": (2, f"{tmp_path}/via.json, a.png, region 0 (dog)")}


def test_files_of_folders_named_after_splits_are_of_these(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "via_region_data.json").write_text(json.dumps(via_images()))
    assert [picture.split for picture in read(tmp_path).pictures] == ["train"] * 3 + ["val"] * 3


def test_pictures_without_regions_have_no_objects(tmp_path):
    export = read(tmp_path, via_images({"a.png": [], "b.png": [TURNED[1]]}))
    assert (painted(export.pictures[0], export.labels)[0] == "").all()
    assert len(export.pictures) == 2


def test_byte_order_marks_and_line_ends_of_windows_change_nothing(tmp_path):
    before = read(tmp_path, via_images())
    text = json.dumps(via_images(), indent=1).replace("\n", "\r\n")
    (tmp_path / "via.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    after = read(tmp_path)
    for one, other in zip(after.pictures, before.pictures, strict=True):
        assert (painted(one, after.labels)[0] == painted(other, before.labels)[0]).all()


def test_json_of_other_tools_is_left_alone(tmp_path):
    coco = {"images": [{"file_name": "a"}], "annotations": [], "categories": []}
    others = {"labelme": labelme_file("a.png", VIA_SCENE["a.png"]), "coco": coco, "none": {}}
    for name, content in others.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "empty.json").touch()
    assert via.find(tmp_path) == []


SHAPE, LABEL = "shape_attributes", "region_attributes"


@pytest.mark.parametrize("form", [dict, via_project], ids=["annotations", "project"])
@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, {SHAPE: {"name": "polygon", "all_points_x": [1, 2]}}, r"a\.png, region 0: its points"),
        (0, {SHAPE: {"name": "blob"}}, r"a\.png, region 0: a shape of the kind 'blob'"),
        (0, {SHAPE: {"name": "rect", "x": 1, "y": 2}}, r"a\.png, region 0: it has no width"),
        (2, {SHAPE: {"name": "circle", "cx": "a", "cy": 2, "r": 3}}, r"a\.png, region 2, cx='a'"),
        (2, {SHAPE: {"name": "circle", "cx": 1e999, "cy": 2, "r": 3}}, r"region 2, cx=inf.*no num"),
        (1, {SHAPE: {}}, r"a\.png4\.regions\.1\.shape_attributes\.name: Field required"),
        (
            1,
            {SHAPE: {"name": "polygon", "all_points_x": "1"}},
            r"regions\.1.*all_points_x: .*array",
        ),
        (1, {LABEL: {"class": ""}}, r"a\.png, region 1: class='' is not one label; choose one"),
        (1, {LABEL: {}}, r"a\.png, region 1: class=None is not one label"),
        (1, {LABEL: {"class": {"cat": True, "dog": True}}}, r"a\.png, region 1: class=\{'cat'"),
        (1, {LABEL: "cat"}, r"a\.png4\.regions\.1\.region_attributes: .*, found 'cat'"),
    ],
)
def test_broken_regions_are_named(tmp_path, form, index, change, message):
    images = deepcopy(via_images())
    images["a.png4"]["regions"][index] |= change
    with pytest.raises(InputError, match=r"via\.json.*" + message) as error:
        read(tmp_path, form(images))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], r"via\.json: Invalid JSON: EOF"),
        (lambda data: data.replace(b'"filename": "a.png"', b'"x": 1'), r"a\.png4\.filename: Field"),
        (lambda data: data.replace(b'"cat"', b'"\xff\xfe"'), r"via\.json: Invalid JSON"),
        (lambda data: b"[" + data + b"]", r"via\.json: .*object"),
    ],
)
def test_broken_files_are_named(tmp_path, spoil, message):
    path = tmp_path / "via.json"
    path.write_bytes(spoil(json.dumps(via_images()).encode()))
    with pytest.raises(InputError, match=message):
        read(tmp_path)
