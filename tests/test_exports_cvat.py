"""CVAT's exports give what their objects say, and broken ones are named with the object.

Their form: docs.cvat.ai/docs/manual/advanced/xml_format, and
docs.cvat.ai/docs/dataset_management/formats/format-smask for masks.
"""

import os

import numpy as np
import pytest
from exports_tools1 import (
    COLORS,
    LABELS,
    SCENE,
    SIZE,
    TURNED,
    agrees,
    cvat_object,
    cvat_xml,
    painted,
    write_cvat,
    write_cvat_masks,
)
from PIL import Image

from danet.datasets.exports import cvat, voc_masks
from danet.errors import InputError

# Of pycocotools.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def read(root):
    return cvat.read(cvat.find(root), root)


def show(root, *lines, **changes):
    """Write one picture of some objects, and paint it."""
    (root / "annotations.xml").write_text(cvat_xml({"a.png": lines}, **changes))
    export = read(root)
    return painted(export.pictures[0], export.labels)


def test_objects_cover_what_a_slow_rasteriser_says(tmp_path):
    write_cvat(tmp_path)
    export = read(tmp_path)
    assert export.labels == ["background", *LABELS]
    assert export.colors == [(0, 0, 0), *COLORS]
    assert not export.is_complete
    assert [picture.split for picture in export.pictures] == ["train", "val", "test"]
    assert [picture.size for picture in export.pictures] == [SIZE] * 3
    for picture in export.pictures:
        agrees(picture, export.labels, SCENE[picture.name])


@pytest.mark.parametrize("item", TURNED, ids=lambda item: item[1])
def test_boxes_and_ellipses_turn_clockwise_by_degrees(tmp_path, item):
    (tmp_path / "a.xml").write_text(cvat_xml({"a.png": [cvat_object(*item)]}))
    export = read(tmp_path)
    agrees(export.pictures[0], export.labels, [item])


def test_masks_are_taken_bit_by_bit(tmp_path):
    rows = np.random.default_rng(0).integers(0, 2, (9, 13)).tolist()
    names, remarks = show(tmp_path, cvat_object("cat", "mask", (7, 4, rows)))
    assert ((names == "cat")[4:13, 7:20] == np.array(rows, bool)).all()
    assert (names == "cat").sum() == np.sum(rows)
    assert not remarks


def test_the_mask_of_the_documentation_has_the_form_of_its_wheel(tmp_path):
    runs = "3, 5, 7, 7, 5, 9, 3, 11, 2, 11, 2, 12, 1, 12, 1, 26, 1, 12, 1, 12, 2, 11, 3, 9, 5, 7, 7"
    line = '<mask label="cat" rle="%s, 5, 3" left="2" top="3" width="13" height="15" z_order="0"/>'
    names, _ = show(tmp_path, line % runs)
    wheel = (names == "cat")[3:18, 2:15]
    assert wheel[0].tolist() == [False] * 3 + [True] * 5 + [False] * 5
    assert wheel[7].all()


def test_a_higher_z_order_covers_and_equal_ones_keep_the_order_of_the_file(tmp_path):
    square = (4, 4, 30, 30, 0)
    lines = [cvat_object(*item) for item in (("cat", "box", square, 9), ("dog", "box", square, 10))]
    names, _ = show(tmp_path, lines[1], lines[0])
    assert {*names[6:28, 6:28].ravel()} == {"dog"}
    lines = [cvat_object(label, "box", square) for label in ("tree", "cat", "dog")]
    names, remarks = show(tmp_path, *lines)
    assert {*names[6:28, 6:28].ravel()} == {"dog"}
    assert remarks["overlap"] == (
        2,
        f"{tmp_path}/annotations.xml, image a.png, object 2 (box) (cat)",
    )


@pytest.mark.parametrize("kind", ["task", "project", "job"])
def test_labels_are_those_of_a_task_a_project_or_a_job(tmp_path, kind):
    (tmp_path / "annotations.xml").write_text(cvat_xml({}, labels=["dog", "cat"], kind=kind))
    assert read(tmp_path).labels == ["dog", "cat"]


def test_labels_of_several_files_follow_those_of_the_first(tmp_path):
    for name, labels in (("a", ["dog", "cat"]), ("b", ["tree", "cat"])):
        (tmp_path / f"{name}.xml").write_text(cvat_xml({f"{name}.png": [BOX]}, labels=labels))
    export = read(tmp_path)
    assert export.labels == ["dog", "cat", "tree"]
    assert export.colors == [COLORS[1], COLORS[0], COLORS[2]]
    assert [picture.name for picture in export.pictures] == ["a.png", "b.png"]


def test_labels_of_a_skeletons_points_are_none_and_files_without_colours_have_none(tmp_path):
    text = cvat_xml(
        {"a.png": ['<skeleton label="cat"><points label="1" points="1,2"/></skeleton>']}
    )
    point = "<label><name>1</name><type>points</type><parent>cat</parent></label></labels>"
    (tmp_path / "annotations.xml").write_text(text.replace("</labels>", point))
    export = read(tmp_path)
    assert export.labels == ["background", *LABELS]
    assert painted(export.pictures[0], export.labels)[1].keys() == {"no area"}
    (tmp_path / "annotations.xml").write_text(text.replace("#000000", ""))
    assert read(tmp_path).colors is None


def test_lines_points_and_cuboids_have_no_area_and_tags_are_of_pictures(tmp_path):
    names, remarks = show(
        tmp_path,
        *('<tag label="cat"></tag>', '<points label="cat" points="3,4"/>'),
        *('<polyline label="cat" points="3,4;9,9"/>', '<cuboid label="cat" xtl1="0"/>'),
    )
    assert (names == "").all()
    first = f"{tmp_path}/annotations.xml, image a.png, object 2 (points) (cat)"
    assert remarks == {"no area": (3, first)}


def test_byte_order_marks_and_line_ends_of_windows_change_nothing(tmp_path):
    write_cvat(tmp_path)
    before = [painted(p, read(tmp_path).labels)[0] for p in read(tmp_path).pictures]
    path = tmp_path / "annotations.xml"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    after = [painted(p, read(tmp_path).labels)[0] for p in read(tmp_path).pictures]
    assert all((a == b).all() for a, b in zip(after, before, strict=True))


def test_xml_of_other_tools_is_left_alone(tmp_path):
    voc = "<annotation><folder>x</folder><object><name>cat</name></object></annotation>"
    (tmp_path / "voc.xml").write_text(voc)
    (tmp_path / "empty.xml").touch()
    assert cvat.find(tmp_path) == []


def test_a_doctype_is_refused_before_an_entity_expands(tmp_path):
    lines = [f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12)]
    bomb = f"<!DOCTYPE x [<!ENTITY a0 'ha'>{''.join(lines)}]>\n<annotations><meta>&a11;</meta>"
    (tmp_path / "a.xml").write_text(f"{bomb}</annotations>")
    with pytest.raises(InputError, match=r"a\.xml: it has a DOCTYPE"):
        read(tmp_path)


BOX = cvat_object("cat", "box", (2, 2, 9, 9, 0))
POLYGON = cvat_object("cat", "polygon", [(2, 2), (9, 2), (9, 9)])
MASK = cvat_object("cat", "mask", (2, 2, [[1, 0], [1, 1]]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (BOX.replace("cat", "cow"), r"\(box\): label='cow' is not in meta, .*: background, cat"),
        (BOX.replace("label", "name"), r"\(box\): label='' is not in meta"),
        (BOX.replace("xbr", "x2"), r"\(box\): it has no xbr, only .*x2"),
        (BOX.replace('ytl="2"', 'ytl="2,5"'), r"\(box\), .*ytl='2,5'"),
        (
            BOX.replace('ytl="2"', 'ytl="nan"'),
            r"\(box\), .*ytl='nan'.*: the coordinate .* is no num",
        ),
        (BOX.replace('z_order="0"', 'z_order="up"'), r"\(box\), z_order='up'"),
        (POLYGON.replace("9.00,2.00", "9.00"), r"\(polygon\): its points are not pairs"),
        (POLYGON.replace("9.00,2.00", "9.00,inf"), r"\(polygon\): the coordinate .* is no number"),
        (POLYGON.replace("points", "pts"), r"\(polygon\): its points are not pairs"),
        (MASK.replace("0, 1", "0, 2"), r"\(mask\): rle is no mask of 2 x 2: .*cover 5 pixels"),
        (MASK.replace("0, 1", "0, x"), r"\(mask\): rle is no mask of 2 x 2"),
        (MASK.replace("rle", "runs"), r"\(mask\): rle is no mask of 2 x 2"),
        (MASK.replace('width="2"', 'width="-2"'), r"\(mask\): rle is no mask of -2 x 2"),
        (MASK.replace("left", "x"), r"\(mask\): it has no left"),
        (BOX.replace("</box>", ""), r"annotations\.xml: not XML that can be read"),
    ],
)
def test_broken_objects_are_named(tmp_path, line, message):
    where = "" if "not XML" in message else r"annotations\.xml, image a\.png, object 2 "
    with pytest.raises(InputError, match=where + message) as error:
        show(tmp_path, BOX, line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name="a.png" ', "", r"image 0 has no name"),
        (f'width="{SIZE[1]}"', "", r"image a\.png: it has no width"),
        (f'width="{SIZE[1]}"', 'width="wide"', r"image a\.png, .*width='wide'"),
        ("</annotations>", "", r": not XML that can be read \(no element found"),
        ("<image", "<track></track><image", r": this is 'CVAT for video': export it as 'CVAT for"),
        ("cat", "\udcff", r": not XML that can be read \('utf-8' codec"),
        ("<name>cat</name>", "<name></name>", r"label='cat' is not in meta"),
    ],
)
def test_broken_files_are_named(tmp_path, old, new, message):
    text = cvat_xml({"a.png": [BOX]}).replace(old, new)
    (tmp_path / "annotations.xml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"annotations\.xml.*" + message):
        read(tmp_path)


def read_masks(root):
    return voc_masks.read(voc_masks.find(root), root)


def test_exported_masks_are_read_bit_by_bit(tmp_path):
    truth = write_cvat_masks(tmp_path)
    export = read_masks(tmp_path)
    assert export.labels == [*LABELS, "background"]
    assert export.colors == [*COLORS, (0, 0, 0)]
    assert export.is_complete
    stems = [os.path.relpath(picture.name, tmp_path / "JPEGImages") for picture in export.pictures]
    splits = {stem: picture.split for stem, picture in zip(stems, export.pictures, strict=True)}
    assert splits == {"a": "train", "sub/b": "val", "c": "test"}
    for stem, picture in zip(stems, export.pictures, strict=True):
        names, _ = painted(picture, export.labels)
        assert (names == truth[f"{stem}.png"]).all()


def test_pictures_of_the_export_and_a_single_list_are_used(tmp_path):
    write_cvat_masks(tmp_path)
    lists = tmp_path / "ImageSets" / "Segmentation"
    for path in lists.iterdir():
        path.unlink()
    # A name with blanks has quotation marks; a picture without objects has no mask.
    (lists / "default.txt").write_bytes(b'\xef\xbb\xbfa\r\n"an empty one"\r\n')
    (tmp_path / "JPEGImages").mkdir()
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "JPEGImages" / "an empty one.jpg")
    export = read_masks(tmp_path)
    assert {picture.split for picture in export.pictures} == {None}
    *_, last = export.pictures
    assert last.name == f"{tmp_path}/JPEGImages/an empty one.jpg"
    assert (painted(last, export.labels)[0] == "").all()
    assert len(export.pictures) == 4


def spoil_mask(root):
    pixels = np.array(Image.open(root / "SegmentationClass" / "a.png"))
    pixels[3, 4] = 1, 2, 3
    Image.fromarray(pixels).save(root / "SegmentationClass" / "a.png")


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (
            "a.png",
            spoil_mask,
            r"a\.png: the colour \[1, 2, 3\] on 1 pixels, first at row 3, column 4",
        ),
        ("a.png", spoil_mask, r"is not in labelmap\.txt; the nearest .*; add it there$"),
        ("a.png", lambda path: path.write_bytes(b""), r"a\.png: not a readable label"),
        ("a.png", lambda path: path.write_bytes(path.read_bytes()[:90]), r"a\.png: not a readable"),
        ("a.png", lambda path: Image.new("RGB", (3, 2)).save(path), r"a\.png: a mask of 3 x 2 for"),
        (
            "../labelmap.txt",
            lambda path: path.write_bytes(b""),
            r"labelmap\.txt: it names no labels",
        ),
        ("../labelmap.txt", lambda path: path.write_text(HEAD + "cat:1,2"), r"labelmap.*'cat:1,2'"),
        (
            "../labelmap.txt",
            lambda path: path.write_text(HEAD + "a:1,2,3::\nb:1,2,3::"),
            r"the same",
        ),
        ("../labelmap.txt", lambda path: path.write_text(HEAD + "a:1,2,300::"), r"labelmap.* 300"),
        (
            "../labelmap.txt",
            lambda path: path.write_bytes(b"\xff\xfe"),
            r"labelmap\.txt.*not UTF-8",
        ),
        (
            *("../ImageSets/Segmentation/Train.txt", lambda path: path.write_bytes(b"")),
            r"Train\.txt: the list is empty",
        ),
    ],
)
def test_broken_masks_and_lists_are_named(tmp_path, name, spoil, message):
    write_cvat_masks(tmp_path)
    spoil(tmp_path if spoil is spoil_mask else tmp_path / "SegmentationClass" / name)
    with pytest.raises(InputError, match=message):
        painted(read_masks(tmp_path).pictures[0], read_masks(tmp_path).labels)


HEAD = "# label:color_rgb:parts:actions\n"
