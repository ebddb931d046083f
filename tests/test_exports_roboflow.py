"""Roboflow's "Semantic Segmentation Masks": a mask beside each picture, and _classes.csv.

The form is that of what Roboflow exports by this name (docs.roboflow.com).
"""

import numpy as np
import pytest
from conftest import save_picture
from exports_scene import LABELS, SIZES, THINGS, read, slow

from danet.datasets.exports import roboflow
from danet.datasets.exports.shapes import paint
from danet.errors import InputError

VALUES = {"background": 0, "plate": 3, "cup": 1, "fork": 200}
SPLITS = {"first.png": "train", "second.png": "valid", "third.png": "test"}
CSV = "Pixel Value, Class\n" + "".join(f"{v}, {name}\n" for name, v in VALUES.items())


def mask_of(name):
    table = np.array([0, *(VALUES[label] for label in LABELS)], np.uint8)
    return table[slow(THINGS[name], SIZES[name], LABELS)[0]]


def write(root, splits=SPLITS, csv=CSV):
    for name, split in splits.items():
        stem = f"{name[:-4]}_jpg.rf.0123abcd"
        save_picture(root / split / f"{stem}.jpg", np.zeros((*SIZES[name], 3), np.uint8))
        save_picture(root / split / f"{stem}_mask.png", mask_of(name))
        (root / split / "_classes.csv").write_text(csv)
    return root


def check_masks(export):
    assert export.labels == ["background", "cup", "plate", "fork"]
    assert export.is_complete
    for name in SIZES:
        (picture,) = [p for p in export.pictures if f"/{name[:-4]}_jpg" in p.name]
        values = np.array([VALUES[label] for label in export.labels])
        found = painted_mask(picture, SIZES[name], export.labels)
        np.testing.assert_array_equal(values[found - 1], mask_of(name))


def painted_mask(picture, size, labels):
    return paint(picture, size, labels).values.astype(int)


def test_every_pixel_has_the_class_of_its_value(tmp_path):
    export = roboflow.read(roboflow.find(write(tmp_path)), tmp_path)
    check_masks(export)
    assert [p.split for p in export.pictures] == ["test", "train", "val"]
    assert all(p.name.endswith(".jpg") for p in export.pictures)


def test_one_folder_has_no_split(tmp_path):
    export = roboflow.read(roboflow.find(write(tmp_path, dict.fromkeys(SIZES, "."))), tmp_path)
    check_masks(export)
    assert {p.split for p in export.pictures} == {None}


def test_a_mark_lines_of_windows_and_another_order_of_rows_change_nothing(tmp_path):
    write(tmp_path)
    head, *rows = CSV.splitlines()
    text = "\r\n".join([head, *rows[::-1], "", ""])
    (tmp_path / "valid/_classes.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    check_masks(roboflow.read(roboflow.find(tmp_path), tmp_path))


def test_a_picture_that_is_called_mask_is_a_picture(tmp_path):
    for name in ("face_mask.jpg", "face_mask_mask.png"):
        save_picture(tmp_path / name, np.zeros((6, 5), np.uint8))
    (tmp_path / "_classes.csv").write_text(CSV)
    (picture,) = roboflow.read(roboflow.find(tmp_path), tmp_path).pictures
    assert picture.name.endswith("face_mask.jpg")


CSVS = {
    "empty": (b"", r"expected a line 'Pixel Value, Class'"),
    "head": (b"filename, cup, plate\na.jpg, 1, 0\n", r"expected a line 'Pixel Value, Class'"),
    "no head": (b"0, background\n1, cup\n", r"expected a line .*found '0'"),
    "word": (b"Pixel Value, Class\nx, cup\n", r"expected a line .*'x'"),
    "one column": (b"Pixel Value, Class\n0\n", r"expected a line .*unpack"),
    "range": (b"Pixel Value, Class\n70000, cup\n", r"expected a line .*70000"),
    "negative": (b"Pixel Value, Class\n-1, cup\n", r"expected a line .*-1"),
    "twice": (b"Pixel Value, Class\n1, cup\n1, plate\n", r"expected a line .*1, 1"),
    "name twice": (b"Pixel Value, Class\n1, cup\n2, cup\n", r"label 'cup' is empty or there twice"),
    "no name": (b"Pixel Value, Class\n1,\n", r"label '' is empty"),
    "no utf-8": (b"\xff\xfePixel", r"not UTF-8 text"),
}


@pytest.mark.parametrize("kind", CSVS)
def test_a_broken_table_is_refused_in_a_line(tmp_path, kind):
    data, message = CSVS[kind]
    write(tmp_path, {"first.png": "train"})
    (tmp_path / "train/_classes.csv").write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read(roboflow, tmp_path)
    assert str(caught.value).count(str(tmp_path / "train/_classes.csv")) == 1
    assert "\n" not in str(caught.value)


def test_splits_with_other_classes_are_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "valid/_classes.csv").write_text(CSV.replace("200, fork", "2, fork"))
    with pytest.raises(InputError, match=r"valid/_classes\.csv: .*test/_classes\.csv: .*at once"):
        read(roboflow, tmp_path)


def test_a_value_that_is_in_no_row_is_refused(tmp_path):
    write(tmp_path, {"second.png": "train"}, CSV.replace("200, fork\n", ""))
    with pytest.raises(InputError, match=r"second_jpg.*_mask\.png: value 200; .* has 0\.\.1, 3"):
        read(roboflow, tmp_path)


def test_a_mask_of_another_size_is_refused(tmp_path):
    write(tmp_path, {"first.png": "train"})
    (picture,) = roboflow.read(roboflow.find(tmp_path), tmp_path).pictures
    with pytest.raises(InputError, match=r"first_jpg.*_mask\.png: a mask of 80 x 60 for picture"):
        painted_mask(picture, (61, 80), ["background", "cup", "plate", "fork"])


@pytest.mark.parametrize("data", [None, b"", b"\x89PNG\r\n\x1a\n\0\0"])
def test_a_mask_that_is_missing_or_cut_off_is_refused(tmp_path, data):
    write(tmp_path, {"first.png": "train"})
    mask = tmp_path / "train/first_jpg.rf.0123abcd_mask.png"
    mask.unlink() if data is None else mask.write_bytes(data)
    message = r"first_jpg.*\.jpg: its mask .*_mask\.png" if data is None else r"_mask\.png: not a r"
    with pytest.raises(InputError, match=message):
        read(roboflow, tmp_path)
