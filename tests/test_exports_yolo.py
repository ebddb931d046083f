"""YOLO's polygons and boxes, smaller ones over larger (docs.ultralytics.com/datasets/segment).

That smaller objects hide larger ones is what ``polygons2masks_overlap`` of Ultralytics does: it
sorts masks by their area, the largest first, and later ones win.
"""

import numpy as np
import pytest
from conftest import save_picture
from exports_scene import LABELS, POLYGONS, SIZES, check, read

from danet.datasets.exports import yolo
from danet.datasets.exports.shapes import paint
from danet.errors import InputError

YAML = "train: images/train\nval: images/val\nnc: 3\nnames: [plate, cup, fork]\n"
SPLITS = {"first.png": "train", "second.png": "val", "third.png": "val"}


def line_of(thing, size):
    numbers = [
        f"{n / side:.9f}" for x, y in thing.rings[0] for n, side in ((x, size[1]), (y, size[0]))
    ]
    return " ".join([str(LABELS.index(thing.label)), *numbers])


def write(root, *, labels="labels", order=-1, yaml=YAML):
    """Writes an export whose lines are in no order of painting; the third has no text file."""
    for name, split in SPLITS.items():
        save_picture(root / "images" / split / name, np.zeros((*SIZES[name], 3), np.uint8))
        path = root / labels / split / name.replace(".png", ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [line_of(thing, SIZES[name]) for thing in POLYGONS[name]][::order]
        if lines:
            path.write_text("\n".join(lines) + "\n")
    (root / "data.yaml").write_text(yaml)
    return root


@pytest.mark.parametrize("order", [-1, 1])
def test_smaller_objects_are_over_larger_ones_in_any_order_of_lines(tmp_path, order):
    export = read(yolo, write(tmp_path, order=order))
    assert export.labels == [*LABELS]
    check(export, POLYGONS)
    assert {p.name.rpartition("/")[2]: p.split for p in export.pictures} == SPLITS


def test_a_line_of_four_numbers_is_a_box_of_centre_and_size(tmp_path):
    write(tmp_path)
    path = tmp_path / "labels/train/first.txt"
    path.write_text("1 0.5 0.5 0.25 0.5\n")
    picture = next(p for p in read(yolo, tmp_path).pictures if p.name.endswith("first.png"))
    values = paint(picture, (60, 80), LABELS).values
    expected = np.zeros((60, 80), int)
    expected[15:45, 30:50] = 2
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize(
    "yaml",
    [
        YAML.replace("[plate, cup, fork]", "\n  0: plate\n  1: cup\n  2: fork"),
        YAML.replace("train: images", "train: ../images"),  # Roboflow
        YAML.replace("train: images/train", "train: train.txt"),
        "path: .\n" + YAML + "test:\n",
        "path: /somewhere/else\n" + YAML.replace("\n", "\r\n"),
        "names: [plate, cup, fork]\n",
    ],
    ids=["numbered", "roboflow", "list", "path", "elsewhere", "names alone"],
)
def test_other_forms_of_the_yaml_say_the_same(tmp_path, yaml):
    write(tmp_path, yaml=yaml)
    (tmp_path / "train.txt").write_text("\ufeff./images/train/first.png\r\n", encoding="utf-8")
    export = read(yolo, tmp_path)
    check(export, POLYGONS)
    assert {p.name.rpartition("/")[2]: p.split for p in export.pictures} == SPLITS


def test_the_name_of_a_picture_is_no_split(tmp_path):
    for place in ("images/train_7.png", "test_8.png"):
        save_picture(tmp_path / place, np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "data.yaml").write_text("names: [a, b]\n")
    assert [p.split for p in read(yolo, tmp_path).pictures] == [None, None]


def test_labels_lie_beside_pictures_where_no_folder_is_called_images(tmp_path):
    for name, size in SIZES.items():
        save_picture(tmp_path / "data" / name, np.zeros((*size, 3), np.uint8))
        lines = [line_of(thing, size) for thing in POLYGONS[name]]
        (tmp_path / "data" / name).with_suffix(".txt").write_text("\r\n".join(lines))
    (tmp_path / "data.yaml").write_text("train: data\nnames: [plate, cup, fork]")
    check(read(yolo, tmp_path), POLYGONS)


def test_a_mark_at_the_beginning_of_a_file_changes_nothing(tmp_path):
    write(tmp_path)
    for path in (tmp_path / "data.yaml", tmp_path / "labels/train/first.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    check(read(yolo, tmp_path), POLYGONS)


def test_an_empty_file_is_a_picture_without_objects(tmp_path):
    write(tmp_path)
    (tmp_path / "labels/train/first.txt").write_text("\n")
    check(read(yolo, tmp_path), {**POLYGONS, "first.png": []})


LINES = {
    "class": ("3 0.1 0.1 0.2 0.2 0.1 0.3", r"line 2: class 3, and data.yaml names 0\.\.2"),
    "word": ("cup 0.1 0.1 0.2 0.2 0.1 0.3", r"line 2: expected a class and coordinates.*'cup'"),
    "odd": ("0 0.1 0.1 0.2 0.2 0.1", r"line 2: 5 coordinates; expected x and y of each point"),
    "pixels": ("0 12 10 200 20 10 30", r"line 2: coordinates from 10 to 200; expected shares"),
    "NaN": ("0 0.1 nan 0.2 0.2 0.1 0.3", r"line 2: the coordinate .* is no number"),
    "NaN of a box": ("0 0.1 nan 0.2 0.2", r"line 2: the coordinate .* is no number"),
    "NaN first": (
        "0 nan 0.1 0.2 0.2",
        r"line 2: (coordinates from nan|the coordinate .* is no number)",
    ),
}


@pytest.mark.parametrize("kind", LINES)
def test_a_broken_line_is_refused_with_its_number(tmp_path, kind):
    line, message = LINES[kind]
    write(tmp_path)
    path = tmp_path / "labels/train/first.txt"
    path.write_text(f"1 0.5 0.5 0.25 0.5\n{line}\n")
    with pytest.raises(InputError, match=message) as caught:
        read(yolo, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


FILES = {
    "labels": ("labels/train/first.txt", b"\xff\xfe0 1", r"first\.txt: .*not UTF-8"),
    "list": ("train.txt", b"\xff\xfe\x00", r"train\.txt: .*not UTF-8"),
    "yaml": ("data.yaml", b"names: [a, b\n", r"data\.yaml: not YAML"),
    "no utf-8": ("data.yaml", b"names: [\xff]\n", r"data\.yaml: not YAML"),
    "number": ("data.yaml", b"names: 3\n", r"data\.yaml: names='3': expected the names"),
    "gap": ("data.yaml", b"names: {0: a, 2: b}\n", r"data\.yaml: names has the keys 0, 2; e"),
    "twice": ("data.yaml", b"names: [a, b, a]\n", r"data\.yaml: the label 'a' is .*twice"),
    "empty": ("data.yaml", b"names: [a, '']\n", r"data\.yaml: the label '' is empty"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_file_is_refused_by_its_name(tmp_path, kind):
    place, data, message = FILES[kind]
    write(tmp_path, yaml=YAML.replace("train: images/train", "train: train.txt"))
    (tmp_path / "train.txt").write_text("images/train/first.png")
    (tmp_path / place).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read(yolo, tmp_path)
    assert "\n" not in str(caught.value)


def test_an_export_without_pictures_is_refused(tmp_path):
    (tmp_path / "data.yaml").write_text(YAML)
    with pytest.raises(InputError, match=r"data\.yaml: no pictures are where train, val"):
        read(yolo, tmp_path)


def test_what_ultralytics_paints_last_is_what_is_seen(tmp_path):
    """Three squares in each other, written from the smallest to the largest."""
    save_picture(tmp_path / "images/a.png", np.zeros((60, 80, 3), np.uint8))
    (tmp_path / "labels").mkdir()
    lines = [f"{i} 0.5 0.5 {0.2 * (i + 1)} {0.2 * (i + 1)}" for i in range(3)]
    (tmp_path / "labels/a.txt").write_text("\n".join(lines))
    (tmp_path / "data.yaml").write_text("names: [plate, cup, fork]")
    (picture,) = read(yolo, tmp_path).pictures
    values = paint(picture, (60, 80), LABELS).values
    assert [values[30, 40], values[20, 40], values[14, 40]] == [1, 2, 3]


def test_names_that_yaml_would_change_are_texts(tmp_path):
    write(tmp_path, yaml=YAML.replace("[plate, cup, fork]", "[yes, null, 1]"))
    assert yolo.read(yolo.find(tmp_path), tmp_path).labels == ["yes", "null", "1"]


def test_a_text_file_without_a_picture_is_a_picture_that_is_missing(tmp_path):
    write(tmp_path)
    (tmp_path / "labels/train/lost.txt").write_text("0 0.1 0.1 0.2 0.1 0.2 0.2\n")
    (tmp_path / "labels/train/classes.txt").write_text("plate\n")
    names = [picture.name for picture in yolo.read(yolo.find(tmp_path), tmp_path).pictures]
    assert len(names) == 4
    assert names[-1] == str(tmp_path / "images/train/lost")
