"""Label files that are not as they must be: each is refused or accepted by both tools.

L03 stands in test_content.py, L13 in tests/test_losses.py, marked ``bad_input``.
"""

import numpy as np
import pytest
from PIL import Image
from starts import KINDS

from danet.datasets.folder import Folder

both = pytest.mark.parametrize("site", list(KINDS), indirect=True)
TWO = ["data.classes=[background,cat]"]
COLORS = np.random.default_rng(1).integers(0, 250, (11, 3), dtype=np.uint8)


@both
def test_L01_value_one_too_large(site):
    mask = np.full((44, 60), 3, np.uint8)
    mask[7:9, 5:8] = 12
    Image.fromarray(mask).save(site.label())
    parts = ["label value 12 on 6 pixels, first at row 7, column 5", "11 classes, with values 0.."]
    if site.kind == "folder":
        parts.append("count from 0")
    site.refused(site.label(), *parts)


def test_L02_values_from_one_on(site):
    site.relabel(lambda mask: mask + 1)
    site.refused("label value 11", "values 1..11 and no 0", "data.labels_start_at=1")
    assert site.accepted(settings=["data.labels_start_at=1"]) == ""
    site.relabel(lambda mask: np.where(mask == 11, 4, mask))
    hint = "has the value 0 (a); if classes count from 1, set data.labels_start_at=1"
    assert hint in site.accepted()


@both
def test_L04_colour_mask(site):
    with Image.open(site.label()) as picture:
        mask = np.array(picture)
    Image.fromarray(COLORS[mask]).save(site.label())
    red, green, blue = min(map(tuple, COLORS.tolist()))
    shown = f"with 11 colours: [{red},{green},{blue}], ["
    site.refused(site.label(), "one channel", shown, ", ...", "data.colors=[[")


def test_L05_colour_outside_the_table(site):
    site.relabel(lambda mask: COLORS[mask])
    settings = [f"data.colors={COLORS.tolist()}"]
    site.accepted(settings=settings)
    with Image.open(site.label()) as picture:
        pixels = np.array(picture)
    near = COLORS[4].astype(int) + np.array((0, 1, 0))
    pixels[9, 3:5] = near
    Image.fromarray(pixels).save(site.label())
    place = f"the colour {near.tolist()} on 2 pixels, first at row 9, column 3"
    nearest = f"nearest known one is {COLORS[4].tolist()}"
    site.refused(site.label(), place, nearest, settings=settings)


@both
def test_L06_palette(site):
    mask = np.arange(44 * 60, dtype=np.uint32).reshape(44, 60) % 11
    mask[0] = {"folder": 255, "camvid": 11}[site.kind]
    picture = Image.fromarray(mask.astype(np.uint8))
    picture.putpalette([v for c in range(256) for v in (c, 255 - c, 7)])
    picture.save(site.label())
    assert site.accepted() == ""
    if site.kind == "folder":
        data = Folder(root=site.root, split="train", classes=list("abcdefghijk"))
        assert np.array_equal(data[2].mask, mask)


def blank(mode, size=(60, 44), **how):
    """Returns what saves a label of zeros."""
    return lambda path: Image.new(mode, size).save(path, **how)


def made(content):
    return lambda path: path.write_bytes(content)


def cut(lost):
    return lambda path: path.write_bytes(path.read_bytes()[:-lost])


WRONG = [
    ("L07", blank("RGBA"), "one channel of class indices, this has 4 (mode RGBA)"),
    ("L07", blank("LA"), "one channel of class indices, this has 2 (mode LA)"),
    ("L09", blank("L", format="JPEG"), "JPEG is lossy", "use PNG"),
    ("L10", blank("L", (61, 44)), "the label is 61 x 44 and its image ", "train_2.png is 60 x 44"),
    ("L14", cut(1), "not a readable label", "cut off"),
    ("L14", cut(40), "not a readable label", "cut off"),
    ("L15", made(b""), "not a readable", "the file is empty"),
    ("L15", made(b"just some text"), "not a readable", "begins with b'just some text'"),
    ("L15", made(b"<html><body>404"), "not a readable", "begins with b'<html><body>404'"),
    ("L16", blank("F", format="TIFF"), "whole numbers", "float32"),
]
"""Row, what writes the label, what is said of it."""


@both
@pytest.mark.parametrize(
    ("write", "parts"),
    [pytest.param(w, p, id=row, marks=pytest.mark.bad_input(row)) for row, w, *p in WRONG],
)
def test_a_label_is_refused_with_its_path(site, write, parts):
    write(site.label())
    site.refused(f"{site.label()}: ", *parts)


@both
def test_L08_sixteen_bits(site):
    wide = np.zeros((44, 60), np.uint16)
    wide[3, 4] = 10
    Image.fromarray(wide).save(site.label())
    site.accepted()
    wide[3, 4] = 1000
    Image.fromarray(wide).save(site.label())
    site.refused("label value 1000 on 1 pixels, first at row 3, column 4")


@both
def test_L11_turned_image_whose_label_is_turned_in_place(site):
    exif = Image.Exif()
    exif[0x0112] = 6
    site.image().unlink()
    Image.new("RGB", (60, 44)).save(site.image(suffix=".jpg"), exif=exif)
    site.accepted("an EXIF turn, which is not applied")
    Image.new("L", (44, 60)).save(site.label())
    parts = ("is 44 x 60 and its image", "is 60 x 44", "turn the image to 44 x 60", "pixels lie")
    site.refused(*parts)


@both
def test_L12_label_that_is_ignored_everywhere(site):
    ignored = {"folder": 255, "camvid": 11}[site.kind]
    Image.fromarray(np.full((44, 60), ignored, np.uint8)).save(site.label())
    site.accepted("ignored everywhere", "train_2")


@pytest.mark.parametrize("array", [np.zeros((44, 60)), np.zeros((1, 44, 60), np.uint8)], ids=str)
def test_L16_floats_in_an_array_file(site, array):
    for path in sorted((site.root / "masks").rglob("*.png")):
        np.save(path.with_suffix(".npy"), np.zeros((44, 60), np.uint8))
    path = site.label(suffix=".npy")
    np.save(path, array)
    parts = (f"{path}: a label must be an array of whole numbers", str(array.dtype), "(height, wid")
    site.refused(*parts, settings=["data.mask_suffix=.npy"])


@both
def test_L17_class_that_never_occurs(site):
    site.plant(values=range(9))
    names = {"folder": "9 (j), 10 (k)", "camvid": "9 (Pedestrian), 10 (Bicyclist)"}[site.kind]
    site.accepted(f"classes that never occur in its 4 labels and cannot be learnt: {names}")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (["data.classes=[a,b,a]"], "the name 'a' stands there twice"),
        (["data.colors=[[1,2,3],[1,2,3]]", *TWO], "stands there twice, at positions 0 and"),
        (["data.classes=[a b]"], "data.num_classes=1: expected a whole number of at least 2"),
        (["data.colors=[[1,2,3],[1,2,4],[0,0,0]]", "data.classes=[a b,c]"], "3 colours for 2 cla"),
        (["data.num_classes=3", "data.classes=[a b,c]"], "data.num_classes=3, but Folder has 2"),
    ],
)
def test_L18_doubled_names_and_colours_and_lost_commas(site, settings, part):
    site.plant(values=(0, 1))
    site.refused(part, settings=settings)
