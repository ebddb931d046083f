"""Supervisely's JSON (developer.supervisely.com/getting-started/supervisely-annotation-format).

Their SDK (github.com/supervisely/supervisely, geometry) drops fractions of coordinates and fills
by OpenCV, which has the pixels of an outline in a figure: ours differ there alone.
"""

import base64
import io
import json
import zlib

import cv2
import numpy as np
import pytest
from exports_scene import LABELS, SIZES, THINGS, changed, check, painted, read
from PIL import Image

from danet.datasets.exports import supervisely
from danet.errors import InputError

COLORS = {"plate": "#FF0000", "cup": "#00fF07", "fork": "#0C22DE"}
SPLITS = {"first.png": "train", "second.png": "val", "third.png": "test"}


def png_of(mask, form="palette"):
    """A PNG as the SDK writes it, of two colours of which the first is transparent, or RGBA."""
    file = io.BytesIO()
    if form == "RGBA":
        pixels = np.full((*mask.shape, 4), 77, np.uint8)
        pixels[..., 3] = mask * 255
        Image.fromarray(pixels).save(file, "PNG")
    elif form == "grey":
        Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
    else:
        picture = Image.fromarray(mask.astype(np.uint8))
        picture.putpalette([0, 0, 0, 255, 255, 255])
        picture.save(file, "PNG", transparency=0, optimize=0)
    return file.getvalue()


def figure(thing, form="palette"):
    figure = {"id": 9, "classId": 3, "classTitle": thing.label, "labelerLogin": "me", "tags": []}
    if thing.bitmap is not None:
        data = png_of(thing.bitmap, form)
        data = data if form == "plain" else zlib.compress(data)
        bitmap = {"data": base64.b64encode(data).decode(), "origin": [*thing.corner]}
        return figure | {"geometryType": "bitmap", "shape": "bitmap", "bitmap": bitmap}
    # From coordinates of corners of pixels to numbers of pixels; here with the fraction left.
    points = {"exterior": [*thing.rings[0]], "interior": [[*hole] for hole in thing.holes]}
    return figure | {"geometryType": "polygon", "shape": "polygon", "points": points}


def annotation(name, figures, *tags):
    size = {"height": SIZES[name][0], "width": SIZES[name][1]}
    found = [{"name": tag, "value": None} for tag in tags]
    return {"description": "", "tags": found, "size": size, "objects": figures}


META = {
    "classes": [{"title": n, "shape": "any", "color": c, "id": 5} for n, c in COLORS.items()],
    "tags": [{"name": "train", "value_type": "none", "color": "#000000"}],
    "projectType": "images",
}


def write(root, form="palette", folders=None, tagged=False):
    """Writes a project; splits are names of data sets, or tags."""
    (root / "project").mkdir()
    (root / "project/meta.json").write_text(json.dumps(META))
    for name, split in SPLITS.items():
        folder = root / "project" / ("all" if tagged else split) / "ann"
        folder.mkdir(parents=True, exist_ok=True)
        figures = [figure(thing, form) for thing in THINGS[name]]
        content = annotation(name, figures, *[split] * tagged)
        (folder / f"{name}.json").write_text(json.dumps(content))
    return root


def path_of(root, name="second.png"):
    return root / "project" / SPLITS[name] / "ann" / f"{name}.json"


@pytest.mark.parametrize("form", ["palette", "RGBA", "grey", "plain"])
def test_polygons_and_bitmaps_give_the_labels_of_the_slow_painter(tmp_path, form):
    export = read(supervisely, write(tmp_path, form))
    assert export.labels == [*LABELS]
    assert export.colors == ((255, 0, 0), (0, 255, 7), (12, 34, 222))
    check(export, THINGS)
    assert {p.name.rpartition("/")[2]: p.split for p in export.pictures} == SPLITS
    assert str(tmp_path / "project/train/img/first.png") in [p.name for p in export.pictures]


def test_tags_of_pictures_are_splits(tmp_path):
    export = read(supervisely, write(tmp_path, tagged=True))
    assert {p.name.rpartition("/")[2]: p.split for p in export.pictures} == SPLITS


def test_figures_differ_from_those_of_the_sdk_on_their_outlines_alone(tmp_path):
    write(tmp_path)
    rng = np.random.default_rng(6)
    figures, masks = [], []
    for _ in range(8):
        angle = np.sort(rng.random(7)) * 2 * np.pi
        ring = np.stack([40 + 35 * np.cos(angle), 30 + 26 * np.sin(angle)], 1).round().astype(int)
        hole = (ring - (40, 30)) // 3 + (40, 30)
        thing = THINGS["first.png"][0]._replace(rings=(ring.tolist(),), holes=(hole.tolist(),))
        figures.append(figure(thing))
        mask, edge = np.zeros((60, 80), np.uint8), np.zeros((60, 80), np.uint8)
        cv2.fillPoly(mask, [ring], 1)
        cv2.fillPoly(mask, [hole], 0)
        cv2.polylines(edge, [ring, hole], True, 1)
        masks.append((mask, edge > 0))
    for found, (mask, edge) in zip(figures, masks, strict=True):
        path_of(tmp_path, "first.png").write_text(json.dumps(annotation("first.png", [found])))
        values = painted(read(supervisely, tmp_path), "first.png").values
        np.testing.assert_array_equal(values[~edge], mask[~edge])
        assert (values[edge] != mask[edge]).mean() < 0.8


def test_a_rectangle_has_the_pixels_of_both_corners(tmp_path):
    write(tmp_path)
    found = {"classTitle": "cup", "geometryType": "rectangle"}
    found["points"] = {"exterior": [[40, 30], [10, 20]], "interior": []}
    path_of(tmp_path).write_text(json.dumps(annotation("second.png", [found])))
    expected = np.zeros((48, 64), int)
    expected[20:31, 10:41] = 2
    values = painted(read(supervisely, tmp_path), "second.png").values
    np.testing.assert_array_equal(values, expected)


def test_lines_and_points_are_counted_and_not_painted(tmp_path):
    write(tmp_path)
    line = {"classTitle": "cup", "geometryType": "line", "points": {"exterior": [[1, 2], [3, 4]]}}
    node = {"classTitle": "cup", "geometryType": "graph", "nodes": {"a": {"loc": [1, 2]}}}
    path_of(tmp_path).write_text(json.dumps(annotation("second.png", [line, node])))
    found = painted(read(supervisely, tmp_path), "second.png")
    assert not found.values.any()
    assert found.remarks["no area"] == (2, f"{path_of(tmp_path)}, object 1 (cup)")


def test_a_bitmap_that_begins_outside_is_cut_and_counted(tmp_path):
    write(tmp_path)
    content = annotation("second.png", [figure(THINGS["second.png"][0])])
    content["objects"][0]["bitmap"]["origin"] = [-5, 40]
    path_of(tmp_path).write_text(json.dumps(content))
    found = painted(read(supervisely, tmp_path), "second.png")
    expected = THINGS["second.png"][0].bitmap[:8, 5:]
    np.testing.assert_array_equal(found.values[40:, :14] > 0, expected)
    assert found.remarks["outside"][0] == 1


def test_only_a_project_is_found(tmp_path):
    (tmp_path / "meta.json").write_text("{}")
    assert supervisely.find(tmp_path) == []
    (tmp_path / "meta.json").unlink()
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann/a.json").write_text('{"shapes": []}')
    assert supervisely.find(tmp_path) == []
    assert len(supervisely.find(write(tmp_path))) >= 4


def test_a_mark_at_the_beginning_and_lines_of_windows_change_nothing(tmp_path):
    write(tmp_path)
    for path in tmp_path.rglob("*.json"):
        text = json.dumps(json.loads(path.read_text()), indent=1).replace("\n", "\r\n")
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    check(read(supervisely, tmp_path), THINGS)


def data_of(data, *, pack=True):
    return base64.b64encode(zlib.compress(data) if pack else data).decode()


FIRST, SECOND = ("objects", 0), ("objects", 1)  # a bitmap, a polygon
DATA = (*FIRST, "bitmap", "data")
PNG = png_of(np.ones((9, 9), bool))
HUGE = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big")
HUGE += b"IHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
HUGE += zlib.crc32(HUGE[12:]).to_bytes(4, "big") + (9).to_bytes(4, "big") + b"IDAT" + bytes(99)
NO_MASK = r"object 1 \(cup\): its bitmap is no mask within the picture \("
BROKEN = {
    "no size": (("size", "height"), None, r"json: size\.height: Field required"),
    "size": (("size", "height"), "x", r"size\.height: .*integer.*found 'x'"),
    "no objects": (("objects",), None, r"objects: Field required"),
    "no class": ((*FIRST, "classTitle"), None, r"objects\.0\.classTitle: Field required"),
    "class": ((*FIRST, "classTitle"), "kniv", r"object 1 \(kniv\): meta\.json has no such class"),
    "no bitmap": ((*FIRST, "bitmap"), None, NO_MASK + "no key 'data'"),
    "no data": (DATA, None, NO_MASK + "no key 'data'"),
    "no origin": ((*FIRST, "bitmap", "origin"), None, NO_MASK + "no key 'origin'"),
    "origin": ((*FIRST, "bitmap", "origin"), [3], NO_MASK),
    "far": ((*FIRST, "bitmap", "origin"), [float("inf"), 2], NO_MASK),
    "no base64": (DATA, "???", NO_MASK),
    "no zlib": (DATA, data_of(b"abc", pack=False), NO_MASK),
    "cut off": (DATA, data_of(zlib.compress(PNG)[:40], pack=False), NO_MASK),
    "no png": (DATA, data_of(b"abc"), NO_MASK),
    "half a png": (DATA, data_of(PNG[:60]), NO_MASK),
    "bomb": (DATA, data_of(b"\x89PNG" + bytes(2**27)), NO_MASK),
    "giant": (DATA, data_of(HUGE), NO_MASK),
    "too large": (DATA, data_of(png_of(np.ones((49, 9), bool))), NO_MASK + "9 x 49 pixels"),
    "no points": ((*SECOND, "points"), None, r"object 2 \(fork\): points\.exterior is missing"),
    "odd": ((*SECOND, "points", "exterior"), [[1, 2], [3]], r"object 2 \(fork\): its points are"),
    "NaN": (
        (*SECOND, "points", "exterior", 0, 0),
        float("nan"),
        r"object 2 .*the coordinate .* is no",
    ),
    "hole": ((*SECOND, "points", "interior"), [3], r"object 2 \(fork\): its points are not"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_in_a_line_with_its_object(tmp_path, kind):
    place, value, message = BROKEN[kind]
    path = path_of(write(tmp_path))
    path.write_text(json.dumps(changed(json.loads(path.read_text()), place, value)))
    with pytest.raises(InputError, match=message) as caught:
        read(supervisely, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


METAS = {
    "no classes": (("classes",), None, r"meta\.json: classes: Field required"),
    "no title": (("classes", 0, "title"), None, r"classes\.0\.title: Field required"),
    "empty title": (("classes", 0, "title"), "", r"classes\.0\.title: .*at least 1 character"),
    "color": (("classes", 0, "color"), "red", r"classes\.0\.color: .*pattern.*found 'red'"),
}


@pytest.mark.parametrize("kind", METAS)
def test_a_broken_meta_json_is_refused(tmp_path, kind):
    place, value, message = METAS[kind]
    write(tmp_path)
    content = changed(json.loads(json.dumps(META)), place, value)
    (tmp_path / "project/meta.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read(supervisely, tmp_path)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe[", b'{"size": {"hei'], ids=str)
@pytest.mark.parametrize("place", ["project/meta.json", "project/val/ann/second.png.json"])
def test_a_file_that_is_no_json_is_refused(tmp_path, data, place):
    write(tmp_path)
    (tmp_path / place).write_bytes(data)
    with pytest.raises(InputError, match=rf"{place}: Invalid JSON: .*(EOF|expected)"):
        read(supervisely, tmp_path)


def test_a_small_text_never_unpacks_to_much_more_than_the_picture(tmp_path, monkeypatch):
    """64 x 48 pixels of five bytes and 64 KiB are the most that is asked of zlib."""
    asked = []

    class Spy:
        def decompress(self, data, limit):
            asked.append(limit)
            return real().decompress(data, limit)

    real = zlib.decompressobj
    monkeypatch.setattr(zlib, "decompressobj", Spy)
    read(supervisely, write(tmp_path))
    assert asked == [5 * 64 * 48 + 2**16] * 2
