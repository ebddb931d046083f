"""Polygons are the class map: exactly at tolerance 0, else but for pixels near its borders.

All is drawn by ``winding``, a literal count of crossings in float64. Where the winding number of a
polygon is 0 or 1 everywhere, filling by the even-odd rule and by the nonzero rule give the same.
"""

import contextlib
import io
import json
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from conftest import call
from PIL import Image
from pycocotools.coco import COCO

from danet.datasets.annotations import Annotations
from danet.datasets.base import Reading
from danet.datasets.lists import SplitRule
from danet.prediction.annotations import Outlined, to_coco, to_cvat, to_labelme
from danet.prediction.polygons import as_one_line, find_regions
from danet.prediction.results import Results
from danet.visualization.overlay import Legend

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""Of pycocotools with numpy 2."""

CLASSES = ("background", "road", "car", "a <b> & 'c'", "树")
LEGEND = Legend(CLASSES, [(index, 9, 255) for index in range(5)])
NESTED = np.pad(np.array([[1, 1, 1], [1, 2, 1], [1, 1, 1]]), 1)
"""A ring of road around a car, in background."""


def winding(line, shape):
    """Counts how often a closed line (N, 2) goes around the centre of each pixel."""
    ends = np.roll(line, -1, axis=0).astype(np.float64)
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    total = np.zeros(shape, int)
    for (x1, y1), (x2, y2) in zip(line.astype(np.float64), ends, strict=True):
        if y1 == y2:
            continue
        is_left = x1 + (y - y1) * (x2 - x1) / (y2 - y1) < x
        total += (is_left & (y1 <= y) & (y < y2)).astype(int)
        total -= (is_left & (y2 <= y) & (y < y1)).astype(int)
    return total


def paint(shape, polygons, value=0):
    """Draws (class, line) one over another by the even-odd rule."""
    canvas = np.full(shape, value)
    for index, line in polygons:
        canvas[winding(line, shape) % 2 == 1] = index
    return canvas


def maps():
    """Yields some corner cases, and noise of few classes, in which everything touches."""
    yield NESTED
    yield np.kron(NESTED, np.ones((3, 2), int))
    yield np.eye(6, dtype=int)
    yield np.indices((5, 7)).sum(0) % 2
    yield np.ones((1, 1), int)
    yield np.zeros((3, 4), int)
    rng = np.random.default_rng(0)
    for number in range(40):
        noise = rng.integers(0, 2 + number % 4, rng.integers(1, 13, 2))
        yield np.kron(noise, np.ones((1, 1 + number % 2), int))


def smooth_map(seed, size=(80, 110)):
    noise = np.random.default_rng(seed).normal(size=(5, *size))
    return np.argmax([cv2.GaussianBlur(plane, (0, 0), 4) for plane in noise], axis=0)


def border_distance(classes):
    """Returns how far each pixel is from the nearest that has a neighbour of another class."""
    is_inner = np.ones(classes.shape, np.uint8)
    for axis, place in ((0, np.s_[1:]), (1, np.s_[:, 1:])):
        differs = np.diff(classes, axis=axis) != 0
        is_inner[place][differs] = 0
        is_inner[: differs.shape[0], : differs.shape[1]][differs] = 0
    return cv2.distanceTransform(is_inner, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def as_map(classes):
    return classes.astype(np.uint8)


@pytest.mark.parametrize("background", [[], [0]], ids=["all", "objects"])
def test_a_region_has_the_pixels_whose_centres_are_inside(background):
    for classes in maps():
        left = np.full(classes.shape, -1)
        for region in find_regions(as_map(classes), background, 0):
            around = winding(as_one_line(region), classes.shape)
            sense = around.sum() // abs(around.sum())
            assert np.array_equal(around * sense, around % 2)  # the rules of filling agree
            rings = [winding(ring, classes.shape) for ring in (region.outer, *region.holes)]
            assert np.array_equal(sum(rings), around)
            is_inside = around != 0
            assert is_inside.sum() == region.area
            assert (left[is_inside] == -1).all()  # no pixel has two regions
            left[is_inside] = region.class_index
        assert np.array_equal(left[left >= 0], classes[left >= 0])
        assert set(classes[left < 0].tolist()) <= set(background)


def test_outlines_turn_at_every_corner_and_regions_are_connected():
    for classes in maps():
        for region in find_regions(as_map(classes), [], 0):
            for ring in (region.outer, *region.holes):
                steps = np.roll(ring, -1, axis=0) - ring
                assert ((steps != 0).sum(axis=1) == 1).all()
                assert ((steps[:, 0] == 0) != np.roll(steps[:, 0] == 0, 1)).all()
            is_inside = as_map(winding(as_one_line(region), classes.shape) != 0)
            assert cv2.connectedComponents(is_inside, connectivity=4)[0] == 2


@pytest.mark.parametrize("background", [[], [0]], ids=["all", "objects"])
def test_painted_in_order_without_holes_regions_give_the_map(background):
    for classes in maps():
        regions = find_regions(as_map(classes), background, 0)
        polygons = [(region.class_index, region.outer) for region in regions]
        assert np.array_equal(paint(classes.shape, polygons), classes)
        by_depth = sorted(regions, key=lambda region: (region.depth, region.area))
        polygons = [(region.class_index, region.outer) for region in by_depth]
        assert np.array_equal(paint(classes.shape, polygons), classes)


def test_background_is_there_only_where_others_surround_it():
    ring = np.where(NESTED == 2, 0, NESTED)
    found = find_regions(as_map(ring), [0], 0)
    assert [(region.class_index, region.depth) for region in found] == [(1, 0), (0, 1)]
    assert [region.class_index for region in find_regions(as_map(NESTED), [0], 0)] == [1, 2]
    between = np.array([[1, 1, 1, 1], [1, 0, 0, 2], [2, 2, 2, 2]])  # by two, so by none
    assert [region.class_index for region in find_regions(as_map(between), [0], 0)] == [1, 2]


@pytest.mark.parametrize("tolerance", [0.5, 1, 2, 4])
def test_simplified_regions_differ_near_borders_alone_and_stay_neighbours(tolerance):
    for seed in range(2):
        classes = smooth_map(seed)
        regions = find_regions(as_map(classes), [], tolerance)
        exact = find_regions(as_map(classes), [], 0)
        number = [sum(len(as_one_line(r)) for r in found) for found in (regions, exact)]
        assert number[0] < number[1] * (1 if tolerance < 1 else 0.6)
        inside = [winding(as_one_line(region), classes.shape) % 2 for region in regions]
        cover = np.sum(inside, axis=0)
        assert (cover > 0).all()  # no gaps
        assert (cover > 1).mean() < 0.01
        found = paint(classes.shape, [(r.class_index, as_one_line(r)) for r in regions], value=-1)
        assert (border_distance(classes)[found != classes] <= tolerance + 1).all()


@pytest.mark.parametrize("tolerance", [0.5, 1, 2, 4])
def test_a_corner_left_out_is_no_farther_than_the_tolerance(tolerance):
    classes = as_map(smooth_map(4))
    pairs = [find_regions(classes, [], chosen) for chosen in (0, tolerance)]
    for exact, simple in zip(*pairs, strict=True):
        assert (exact.class_index, exact.area) == (simple.class_index, simple.area)
        for corners, line in zip(
            (exact.outer, *exact.holes), (simple.outer, *simple.holes), strict=True
        ):
            start, along = line, np.roll(line, -1, axis=0) - line
            away = corners[:, None] - start  # (corners, segments, 2)
            where = np.clip((away * along).sum(2) / (along**2).sum(1), 0, 1)
            distance = np.hypot(*np.moveaxis(away - where[..., None] * along, 2, 0))
            assert distance.min(axis=1).max() <= tolerance + 1e-9


def test_two_neighbours_have_the_same_corners_on_their_border():
    classes = smooth_map(3)
    corners = [{tuple(p) for p in r.outer.tolist()} for r in find_regions(as_map(classes), [], 2)]
    shared = [
        sum((x, y) in other for other in corners) > 1
        for one in corners
        for x, y in one
        if 0 < x < classes.shape[1] and 0 < y < classes.shape[0]  # not on the picture's frame
    ]
    assert len(shared) > 100
    assert np.mean(shared) > 0.9  # the others are those of holes


def test_nothing_vanishes_however_large_the_tolerance():
    for classes in maps():
        regions = find_regions(as_map(classes), [], 1000)
        assert len(regions) == len(find_regions(as_map(classes), [], 0))
        for region in regions:
            assert all(cv2.contourArea(ring) > 0 for ring in (region.outer, *region.holes))


# --- Files --------------------------------------------------------------------------------------


def outlined(name, classes, tolerance=0):
    return Outlined(name, classes.shape, find_regions(as_map(classes), [0], tolerance))


def read_coco(text):
    """Returns the class map of each picture, as pycocotools decodes it, and the categories."""
    data = COCO()
    data.dataset = json.loads(text)
    with contextlib.redirect_stdout(io.StringIO()):
        data.createIndex()
    found = {}
    for image in data.imgs.values():
        canvas = np.zeros((image["height"], image["width"]), int)
        for item in data.loadAnns(data.getAnnIds(image["id"])):
            mask = data.annToMask(item) == 1
            assert item["iscrowd"] == 0
            assert not canvas[mask].any()  # objects do not overlap
            y, x = np.nonzero(mask)
            size = [np.ptp(x) + 1, np.ptp(y) + 1]
            assert (item["bbox"], item["area"]) == ([x.min(), y.min(), *size], mask.sum())
            canvas[mask] = item["category_id"]
        found[image["file_name"]] = canvas
    return found, {number: item["name"] for number, item in data.cats.items()}


def read_cvat(text):
    root = ElementTree.fromstring(text)
    assert root.findtext("version") == "1.1"
    labels = [label.findtext("name") for label in root.findall("meta/task/labels/label")]
    found = {}
    for image in root.findall("image"):
        polygons = sorted(image.findall("polygon"), key=lambda item: int(item.get("z_order")))
        lines = [
            (
                labels.index(item.get("label")),
                np.array([p.split(",") for p in item.get("points").split(";")], float),
            )
            for item in polygons
        ]
        size = int(image.get("height")), int(image.get("width"))
        found[image.get("name")] = paint(size, lines)
    return found, labels


def read_labelme(text, classes):
    content = json.loads(text)
    names = {name: index for index, name in enumerate(classes)} | {"_background_": 0}
    assert content["imageData"] is None
    assert {shape["shape_type"] for shape in content["shapes"]} <= {"polygon"}
    lines = [(names[shape["label"]], np.array(shape["points"])) for shape in content["shapes"]]
    return paint((content["imageHeight"], content["imageWidth"]), lines)


def test_each_format_gives_the_map_back():
    pictures = {f"部/{n} & <x>.png": classes for n, classes in enumerate(maps())}
    given = [outlined(name, classes) for name, classes in pictures.items()]
    coco, categories = read_coco(to_coco(given, LEGEND))
    cvat, labels = read_cvat(to_cvat(given, LEGEND))
    assert categories == dict(enumerate(LEGEND.classes[1:], start=1))
    assert labels == list(LEGEND.classes)
    assert list(coco) == list(cvat) == list(pictures)
    for picture, (name, classes) in zip(given, pictures.items(), strict=True):
        assert np.array_equal(coco[name], classes)
        assert np.array_equal(cvat[name], classes)
        text = to_labelme(picture, LEGEND)
        assert json.loads(text)["imagePath"] == name
        assert np.array_equal(read_labelme(text, LEGEND.classes), classes)


def test_a_network_without_background_has_objects_alone():
    legend = Legend(("road", "car"), [(0, 0, 0), (1, 2, 3)])
    classes = NESTED[1:-1, 1:-1] - 1
    picture = Outlined("a.png", classes.shape, find_regions(as_map(classes), [], 0))
    coco, categories = read_coco(to_coco([picture], legend))
    assert categories == {1: "road", 2: "car"}
    assert np.array_equal(coco["a.png"], classes + 1)
    assert b"<color>#010203</color>" in to_cvat([picture], legend)
    assert np.array_equal(read_labelme(to_labelme(picture, legend), legend.classes), classes)


@pytest.mark.parametrize("tolerance", [0, 1, 2])
@pytest.mark.parametrize("kind", ["coco", "labelme", "cvat"])
def test_a_data_set_of_the_polygons_has_the_map_but_for_pixels_at_borders(
    tmp_path, kind, tolerance
):
    given, pictures = {f"图/{seed}.png": smooth_map(seed) for seed in range(2)}, []
    root, images = tmp_path / kind, tmp_path / "pictures"
    (root / "图").mkdir(parents=True)
    (images / "图").mkdir(parents=True)
    for name, classes in given.items():
        Image.new("RGB", classes.shape[::-1]).save(images / name)
        pictures.append(outlined(name, classes, tolerance))
        if kind == "labelme":
            shown = pictures[-1]._replace(path=f"../../pictures/{name}")
            (root / name).with_suffix(".json").write_text(to_labelme(shown, LEGEND), "utf-8")
    if kind == "coco":
        (root / "annotations.json").write_text(to_coco(pictures, LEGEND), "utf-8")
    if kind == "cvat":
        (root / "annotations.xml").write_bytes(to_cvat(pictures, LEGEND))
    data = Annotations(
        root=root,
        split="train",
        classes=CLASSES,
        images_dir=str(images),
        split_rule=SplitRule(val_share=0),
        reading=Reading(cache_dir=str(tmp_path / "cache")),
    )
    assert len(data) == len(given)
    for item, sample in zip(data.items, data, strict=True):
        classes = next(c for name, c in given.items() if item.image.endswith(name))
        differs = np.asarray(sample.mask) != classes
        assert (border_distance(classes)[differs] < tolerance).all()  # none differs at 0


# --- tools/predict.py ---------------------------------------------------------------------------

ALL = "write=[coco,labelme,cvat]"


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "sub/a.png", "sub/a.jpg", "sub/图.png"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def start(tiny_checkpoint, folder, tmp_path, capsys):
    """Predicts the folder into another and returns what is printed as a note or an error."""

    def started(*settings, output="out", code=0, images=folder):
        typed = [f"checkpoint={tiny_checkpoint}", f"images={images}", f"output={tmp_path / output}"]
        call("predict", *typed, "device=cpu", *settings, code=code)
        return capsys.readouterr().err

    return started


def contents(folder):
    """Returns path -> bytes of the files of annotation tools."""
    found = [path for kind in ("coco", "labelme", "cvat") for path in (folder / kind).rglob("*.*")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_predictions_come_back_as_annotations(start, folder, tmp_path):
    start(ALL, "tolerance=0")
    output = tmp_path / "out"
    names = ["a.png", "sub/a.jpg", "sub/a.png", "sub/图.png"]
    assert len(contents(output)) == 6
    coco, categories = read_coco((output / "coco/annotations.json").read_text())
    cvat, classes = read_cvat((output / "cvat/annotations.xml").read_bytes())
    assert list(coco) == list(cvat) == names
    of_category = np.array([-1, *map(classes.index, categories.values())])
    for name, file in zip(names, ["a", "sub/a.jpg", "sub/a.png", "sub/图"], strict=True):
        index = np.array(Image.open(output / f"index/{file}.png"))
        path = output / f"labelme/{file}.json"
        assert np.array_equal(of_category[coco[name]], index)
        assert np.array_equal(cvat[name], index)
        assert np.array_equal(read_labelme(path.read_text(), classes), index)
        image = path.parent / json.loads(path.read_text())["imagePath"]
        assert image.samefile(folder / name)


def test_a_start_cut_short_and_the_next_give_what_one_start_gives(start, tmp_path, monkeypatch):
    start(ALL, output="whole")
    written = []

    def interrupted(self, picture, classes, write=Results.write):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(picture.name)
        write(self, picture, classes)

    with monkeypatch.context() as patch:
        patch.setattr(Results, "write", interrupted)
        start(ALL, code=130)
    assert contents(tmp_path / "out") == {}
    start(ALL)
    found = contents(tmp_path / "out")
    assert len(found) == 6
    assert found == contents(tmp_path / "whole")


def test_another_tolerance_writes_all_again_but_what_was_corrected(start, folder, tmp_path):
    output = tmp_path / "out"
    start("write=[coco,cvat]", "tolerance=0")
    exact = contents(output)
    start("write=[coco,cvat]", "tolerance=3")
    for name, content in contents(output).items():
        assert len(content) < len(exact[name])
    assert "were there already" not in start("write=[labelme]", "tolerance=0")
    corrected = output / "labelme/a.json"
    corrected.write_text("corrected")
    first = contents(output)
    said = start("write=[labelme]", "tolerance=3")
    assert f"note: 4 files in {output / 'labelme'} were there already and are kept; remove" in said
    assert contents(output) == first
    corrected.unlink()
    assert "note: 3 files in" in start("write=[labelme]", "tolerance=3")
    assert len(corrected.read_bytes()) < len((output / "labelme/sub/a.jpg.json").read_bytes())
    # Another picture of that name, predicted again: the file may still have been corrected.
    Image.new("RGB", (20, 10)).save(folder / "a.png")
    kept = corrected.read_bytes()
    assert "note: 4 files in" in start("write=[labelme]", "tolerance=3")
    assert corrected.read_bytes() == kept


def test_unreadable_pictures_are_left_out(start, folder, tmp_path):
    (folder / "broken.png").write_bytes(b"not a picture")
    assert "1 of 5 files could not be read whole" in start("write=[coco]", "tolerance=0", code=2)
    found = read_coco((tmp_path / "out/coco/annotations.json").read_text())[0]
    assert len(found) == 4


@pytest.mark.parametrize("wrong", ["-1", "nan", "inf"])
def test_a_tolerance_is_a_number_of_pixels(start, wrong):
    assert f"tolerance={wrong}" in start(f"tolerance={wrong}", code=2)


def test_videos_are_refused(start, folder, tmp_path):
    (folder / "clip.mp4").write_bytes(b"")
    said = start(ALL, code=2)
    assert f"annotation tools read pictures, and {folder / 'clip.mp4'} is a video" in said
    assert not (tmp_path / "out").exists()
