"""Label Studio's exports (labelstud.io/guide/export and /guide/task_format, /tags/brushlabels).

Brushes are packed by ``rle-pack`` (github.com/thi-ng/umbrella); the names of PNG masks are those of
"Brush labels to NumPy and PNG".
"""

import json
from itertools import pairwise

import numpy as np
import pytest
from conftest import save_picture
from exports_scene import POLYGONS, SIZES, THINGS, changed, check, painted, read, slow

from danet.datasets.exports import label_studio
from danet.datasets.exports.shapes import paint
from danet.errors import InputError

IDS = dict(zip(SIZES, (11, 12, 13), strict=True))
UPLOADED = {name: f"0a1b2c3d-{name}" for name in SIZES}


def packed(values, lengths=(3, 4, 8, 16), width=8):
    """rle-pack of bytes, a bit after the other: runs of four and more, other values as they are."""
    parts = [f"{len(values):032b}{width - 1:05b}", *(f"{n - 1:04b}" for n in lengths)]
    starts = [0, *(np.flatnonzero(np.diff(values.astype(int))) + 1).tolist(), len(values)]
    literal = []

    def head(repeats, count):
        choice = next(i for i, n in enumerate(lengths) if count <= 2**n)
        return f"{repeats}{choice:02b}{count - 1:0{lengths[choice]}b}"

    def flush():
        text = head(0, len(literal)) + "".join(f"{v:08b}" for v in literal) if literal else ""
        literal.clear()
        return text

    for start, stop in pairwise(starts):
        if stop - start < 4 and len(literal) < 60:
            literal.extend(values[start:stop].tolist())
            continue
        parts.append(flush())
        for first in range(start, stop, 2 ** lengths[-1]):
            parts.append(head(1, min(stop - first, 2 ** lengths[-1])) + f"{values[start]:08b}")
    bits = "".join([*parts, flush()])
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def rgba(mask, color=(12, 200, 30)):
    """Pixels whose alpha is the mask. The first row has a colour all over: it is no coverage."""
    pixels = mask[..., None] * np.array((*color, 255), np.uint8)
    pixels[0, :, :3] = color
    return pixels.ravel()


def whole(thing, size):
    canvas = np.zeros(size, bool)
    if thing.rings:
        canvas = slow([thing], size, [thing.label])[0] > 0
    if thing.bitmap is not None:
        (left, top), (height, width) = thing.corner, thing.bitmap.shape
        canvas[top : top + height, left : left + width] = thing.bitmap
    return canvas


def region(thing, name):
    size = height, width = SIZES[name]
    result = {"id": f"r{len(thing.label)}", "from_name": "tag", "to_name": "image"}
    result |= {"original_width": width, "original_height": height, "image_rotation": 0}
    if thing.bitmap is not None or thing.holes:
        value = {"format": "rle", "rle": packed(rgba(whole(thing, size)))}
        kind = "brushlabels"
    else:
        points = [[100 * x / width, 100 * y / height] for x, y in thing.rings[0]]
        value, kind = {"points": points, "closed": True}, "polygonlabels"
    return {**result, "type": kind, "value": {**value, kind: [thing.label]}}


def task(name, results, **more):
    annotation = {"id": 70, "completed_by": 1, "result": results, "was_cancelled": False}
    annotation |= {"ground_truth": False, "lead_time": 3.5}
    content = {"id": IDS[name], "annotations": [annotation], "predictions": []}
    data = {"image": f"/data/upload/1/{UPLOADED[name]}"}
    return content | {"file_upload": UPLOADED[name], "data": data, **more}


def tasks(things=THINGS):
    return [task(name, [region(t, name) for t in objects]) for name, objects in things.items()]


def minimal(content):
    """Returns JSON-MIN: the values of data and of the control beside each other."""
    found = []
    for one in content:
        (annotation,) = one["annotations"]
        regions = [
            {**r["value"], **{k: r[k] for k in ("original_width", "original_height")}}
            for r in annotation["result"]
        ]
        content = {**one["data"], "id": one["id"], "tag": regions, "annotator": 1}
        found.append(content | {"annotation_id": annotation["id"], "lead_time": 3.5})
    return found


def write(root, content, names=UPLOADED):
    for name, there in names.items():
        save_picture(root / "images" / there, np.zeros((*SIZES[name], 3), np.uint8))
    (root / "project-1.json").write_text(json.dumps(content), encoding="utf-8")
    return root


@pytest.mark.parametrize("form", [list, minimal], ids=["JSON", "JSON-MIN"])
@pytest.mark.parametrize("things", [THINGS, POLYGONS], ids=["brushes", "polygons"])
def test_brushes_and_polygons_give_the_labels_of_the_slow_painter(tmp_path, form, things):
    export = read(label_studio, write(tmp_path, form(tasks(things))))
    assert export.labels == ["cup", "fork", "plate"]
    check(export, things)
    assert [p.size for p in export.pictures][:2] == [*SIZES.values()][:2]


def test_a_brush_is_bit_identical_wherever_alpha_is(tmp_path):
    rng = np.random.default_rng(4)
    size = height, width = 300, 400  # runs longer than the longest length
    for density in (0, 0.001, 0.3, 1):
        mask = rng.random(size) < density
        value = {"rle": packed(rgba(mask)), "format": "rle", "brushlabels": ["a"]}
        result = {"type": "brushlabels", "value": value}
        result |= {"original_width": width, "original_height": height}
        content = [{"id": 1, "data": {"image": "x.png"}, "annotations": [{"result": [result]}]}]
        write(tmp_path, content, {})
        (picture,) = label_studio.read([tmp_path / "project-1.json"], tmp_path).pictures
        np.testing.assert_array_equal(paint(picture, size, ["a"]).values, mask)


def test_the_stored_bytes_of_another_encoder_are_understood():
    """A ring in 5 x 4 RGBA values of 255, in lengths of 3, 4, 8 and 16 bits, packed by hand."""
    head = f"{80:032b}" + "00111" + "0010" + "0011" + "0111" + "1111"
    ring = [1, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1]
    runs = ((20, 255), (8, 0), (8, 255), (8, 0), (8, 255), (8, 0), (20, 255))
    body = "".join(
        f"110{count - 1:08b}{value:08b}" if count > 8 else f"100{count - 1:03b}{value:08b}"
        for count, value in runs
    )
    bits = (head + body).ljust(400, "0")
    rle = [int(bits[i : i + 8], 2) for i in range(0, 400, 8)]
    inside = label_studio._decode(rle, (5, 4), "here").inside
    np.testing.assert_array_equal(inside, np.reshape(ring, (5, 4)) > 0)


def test_a_turned_rectangle_keeps_its_angles_in_pixels(tmp_path):
    """Label Studio turns about the first corner, clockwise: x to the right becomes x downwards."""
    value = {"x": 50, "y": 25, "width": 25, "height": 20, "rotation": 90, "rectanglelabels": ["a"]}
    size = {"original_width": 80, "original_height": 60}
    write(tmp_path, [task("first.png", [{"type": "rectanglelabels", "value": value, **size}])])
    values = painted(read(label_studio, tmp_path), "first.png").values
    expected = np.zeros((60, 80), int)
    expected[15:35, 28:40] = 1  # 20 pixels long, 12 wide, to the left of x=40
    np.testing.assert_array_equal(values, expected)


def test_an_ellipse_turns_about_its_centre(tmp_path):
    value = {"x": 50, "y": 50, "radiusX": 30, "radiusY": 20, "rotation": 30, "ellipselabels": ["a"]}
    size = {"original_width": 80, "original_height": 60}
    write(tmp_path, [task("first.png", [{"type": "ellipselabels", "value": value, **size}])])
    values = painted(read(label_studio, tmp_path), "first.png").values
    y, x = np.mgrid[:60, :80] + 0.5
    cos, sin = np.cos(np.pi / 6), np.sin(np.pi / 6)
    along, across = (x - 40) * cos + (y - 30) * sin, (y - 30) * cos - (x - 40) * sin
    radius = np.hypot(along / 24, across / 12)
    np.testing.assert_array_equal(values[radius < 0.9], 1)
    np.testing.assert_array_equal(values[radius > 1.1], 0)


def test_masks_beside_the_json_that_names_their_pictures_change_nothing(tmp_path):
    """ "Brush labels to PNG": task-11-annotation-70-by-1-tag-cup-0.png, which the JSON has, too."""
    write(tmp_path, tasks())
    for name, objects in THINGS.items():
        for thing in objects:
            mask = whole(thing, SIZES[name]).astype(np.uint8) * 255
            place = f"task-{IDS[name]}-annotation-70-by-1-tag-{thing.label}-0.png"
            save_picture(tmp_path / place, mask)
    check(read(label_studio, tmp_path), THINGS)


def write_masks(root, annotation=70):
    """Writes PNG masks of all objects, as Label Studio names them."""
    for name, objects in THINGS.items():
        for number, thing in enumerate(objects):
            mask = whole(thing, SIZES[name]).astype(np.uint8) * 255
            place = f"task-{IDS[name]}-annotation-{annotation}-by-a@b.example-tag-{thing.label}"
            save_picture(root / f"masks/{place}-{number}.png", mask)


@pytest.mark.parametrize("kind", ["empty results", "other tasks", "pictures alone"])
def test_masks_are_read_where_the_json_that_names_their_pictures_has_no_brushes(tmp_path, kind):
    found = tasks()
    for one in found:
        if kind == "pictures alone":
            del one["annotations"], one["file_upload"]
        else:
            one["annotations"] = [{"id": 70, "was_cancelled": False, "result": []}]
    if kind == "other tasks":  # without a mask, or cancelled: left out
        found.append({**found[0], "id": 999, "annotations": None})
        found.append(
            {**found[0], "id": 998, "annotations": [{"was_cancelled": True, "result": []}]}
        )
    root = write(tmp_path, found)
    write_masks(root)
    write_masks(root, annotation=71)  # a second annotation, which does not count
    export = read(label_studio, root)
    empty = [name for name, objects in THINGS.items() if not objects]
    assert empty
    assert len(export.pictures) == len(THINGS) - len(empty) * (kind == "pictures alone")
    assert len(export.masks) == 2 * sum(map(len, THINGS.values()))
    # Masks are painted by name: objects in the order of their labels.
    for name, objects in THINGS.items():
        if not objects and kind == "pictures alone":
            continue
        values = painted(export, name).values
        expected = np.zeros(SIZES[name], int)
        named = sorted(enumerate(objects), key=lambda pair: (pair[1].label, pair[0]))
        for _, thing in named:
            expected[whole(thing, SIZES[name])] = export.labels.index(thing.label) + 1
        np.testing.assert_array_equal(values, expected)


def test_masks_that_do_not_fit_are_named(tmp_path):
    found = tasks()
    for one in found:
        one["annotations"] = [{"id": 70, "result": []}]
    root = write(tmp_path, found)
    write_masks(root)
    paths = sorted((root / "masks").iterdir())
    same_task = [path for path in paths if path.name.split("-")[1] == paths[0].name.split("-")[1]]
    save_picture(same_task[1], np.zeros((3, 4), np.uint8))
    with pytest.raises(InputError, match=rf"{same_task[1].name}: a mask of \[3, 4\], and its task"):
        read(label_studio, root)
    same_task[0].write_bytes(b"")
    with pytest.raises(InputError, match=rf"{same_task[0].name}: not a readable label"):
        read(label_studio, root)
    for path in paths:
        path.unlink()
    del found[0]["annotations"]
    with pytest.raises(InputError, match=r"task \d+: no annotations are there, nor PNG masks"):
        read(label_studio, write(tmp_path, found))


def test_the_first_annotation_that_was_not_cancelled_counts(tmp_path):
    first, second, third = tasks()
    cancelled = {"id": 1, "was_cancelled": True, "result": second["annotations"][0]["result"][:1]}
    later = {"id": 9, "was_cancelled": False, "result": []}
    second["annotations"] = [cancelled, *second["annotations"], later]
    third["annotations"] = [cancelled]
    export = read(label_studio, write(tmp_path, [first, second, third]))
    check(export, {name: THINGS[name] for name in ("first.png", "second.png")})


def test_a_task_that_was_never_annotated_is_left_out_and_an_empty_annotation_is_not(tmp_path):
    first, second, third = tasks()
    second["annotations"] = []
    export = read(label_studio, write(tmp_path, [first, second, third]))
    assert [p.name for p in export.pictures] == [UPLOADED["first.png"], UPLOADED["third.png"]]


def test_choices_texts_and_key_points_are_no_objects_with_an_area(tmp_path):
    results = [
        {"id": "a", "type": "choices", "value": {"choices": ["good"]}},
        {"id": "b", "type": "polygon", "value": {"points": [[1, 1], [50, 1], [50, 50]]}},
        {
            **{"id": "b", "type": "labels"},
            "value": {"points": [[1, 1], [50, 1], [50, 50]], "labels": ["cup", "fork"]},
        },
        {"id": "c", "type": "keypointlabels", "value": {"x": 5, "y": 5, "width": 0.3}},
    ]
    results[3]["value"]["keypointlabels"] = ["plate"]
    export = read(label_studio, write(tmp_path, [task("first.png", results)]))
    assert [shape.label for shape in export.pictures[0].shapes] == ["cup", "plate"]
    assert painted(export, "first.png").remarks["no area"][0] == 1


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("/data/upload/3/0a1b2c3d-first.png", "0a1b2c3d-first.png"),
        ("/data/upload/3/99999999-first.png", "first.png"),
        ("/data/local-files/?d=shop%20a/first%2B1.png", "shop a/first+1.png"),
        (r"/data/local-files/?d=shop\first.png", "shop/first.png"),
        ("https://host.example/a/%E6%9D%AF.png?X-Amz-Expires=3", "a/杯.png"),
        ("s3://bucket/deep/first.png", "deep/first.png"),
        ("first.png", "first.png"),
    ],
)
def test_a_picture_has_its_path_as_far_as_the_export_has_it(tmp_path, value, name):
    write(tmp_path, [task("first.png", [], data={"note": "a.b //[1", "photo": value})])
    save_picture(tmp_path / "images/first.png", np.zeros((4, 4, 3), np.uint8))
    assert [p.name for p in read(label_studio, tmp_path).pictures] == [name]


def test_only_files_of_this_form_are_found(tmp_path):
    write(tmp_path, tasks())
    for name, content in {
        "coco": {"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1}]},
        "labelme": {"version": "5", "shapes": [], "imagePath": "a.png", "imageData": None},
        "via": {"a.png100": {"filename": "a.png", "regions": [], "file_attributes": {}}},
        "ds/ann/a.png": {"size": {}, "objects": [{"id": 3, "bitmap": {"data": ""}}]},
    }.items():
        (tmp_path / f"{name}.json").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert label_studio.find(tmp_path) == [tmp_path / "project-1.json"]


def test_a_mark_at_the_beginning_and_lines_of_windows_change_nothing(tmp_path):
    text = json.dumps(tasks(), indent=1).replace("\n", "\r\n")
    write(tmp_path, [])
    (tmp_path / "project-1.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    check(read(label_studio, tmp_path), THINGS)


RESULT = (1, "annotations", 0, "result", 0)  # a brush
POLYGON = (1, "annotations", 0, "result", 1)
RLE = (*RESULT, "value", "rle")
GOOD = packed(rgba(whole(THINGS["second.png"][0], SIZES["second.png"])))
BROKEN = {
    "no data": ((1, "data"), None, r"json: 1\.data: Field required"),
    "result": ((1, "annotations", 0, "result"), "x", r"annotations\.0\.result: .*array, found 'x'"),
    "no value": ((*RESULT, "value"), None, r"task 12, region 1: it has no value"),
    "size": ((*RESULT, "original_width"), "wide", r"original_width: .*integer.*'wide'"),
    "no size": ((*RESULT, "original_width"), None, r"task 12, region 1 \(cup\): rle is no brush"),
    "other size": ((*RESULT, "original_width"), 65, r"region 1 .*12288 values .*expected 12480"),
    "cut off": (RLE, GOOD[: len(GOOD) // 2], r"task 12, region 1 \(cup\): rle is no brush"),
    "bytes": (RLE, [*GOOD[:20], 300], r"region 1 \(cup\): rle is no brush.*256"),
    "giant": (RLE, [255] * 4 + GOOD[4:], r"region 1 .*4294967295 values .*expected 12288"),
    "width": (
        RLE,
        [*GOOD[:4], 0b11111000, *GOOD[5:]],
        r"region 1 .*of 32 bits, expected 12288 of 8",
    ),
    "no bytes": (RLE, "abc", r"region 1 \(cup\): rle is no brush"),
    "no label": ((*RESULT, "value", "brushlabels"), [], r"task 12, region 1: it has no label"),
    "empty label": ((*RESULT, "value", "brushlabels"), [""], r"region 1: it has no label"),
    "odd": (
        (*POLYGON, "value", "points"),
        [[1, 2], [3]],
        r"task 12, region 2 \(fork\): its points",
    ),
    "NaN": (
        (*POLYGON, "value", "points", 0, 1),
        float("nan"),
        r"region 2 \(fork\): the coordinate",
    ),
    "far": ((*POLYGON, "value", "points", 0, 1), 1e9, r"region 2 \(fork\): the coordinate"),
    "no points": ((*POLYGON, "value", "points"), None, r"region 2 \(fork\): it has no x"),
    "no picture": ((1, "data", "image"), "notes.txt", r"task 12: no picture in its data: image"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_in_a_line_with_task_and_region(tmp_path, kind):
    path, value, message = BROKEN[kind]
    write(tmp_path, changed(tasks(), path, value))
    with pytest.raises(InputError, match=message) as caught:
        read(label_studio, tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert str(tmp_path / "project-1.json") in str(caught.value)


@pytest.mark.parametrize("form", [list, minimal], ids=["JSON", "JSON-MIN"])
@pytest.mark.parametrize("key", ["y", "width", "radiusY"])
def test_a_rectangle_or_ellipse_without_one_of_its_numbers_is_refused(tmp_path, key, form):
    value = {"x": 10, "y": 10, "rotation": 0, "rectanglelabels": ["a"]}
    value |= {"radiusX": 5, "radiusY": 6} if "radius" in key else {"width": 5, "height": 6}
    del value[key]
    size = {"original_width": 80, "original_height": 60}
    content = [task("first.png", [{"type": "rectanglelabels", "value": value, **size}])]
    with pytest.raises(InputError, match=rf"task 11, region 1 \(a\): it has no {key}"):
        read(label_studio, write(tmp_path, form(content)))


def test_an_ellipse_of_a_size_that_no_picture_has_takes_no_memory(tmp_path):
    value = {"x": 50, "y": 50, "radiusX": 9e5, "radiusY": 20, "rotation": 1, "ellipselabels": ["a"]}
    size = {"original_width": 2**70, "original_height": 60}
    write(tmp_path, [task("first.png", [{"type": "ellipselabels", "value": value, **size}])])
    (picture,) = label_studio.read([tmp_path / "project-1.json"], tmp_path).pictures
    assert len(picture.shapes[0].polygons[0]) < 10_000


@pytest.mark.parametrize("data", [b"", b"\xff\xfe[", b'[{"id": 1, "data"'], ids=str)
def test_a_file_that_is_no_json_is_refused(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.json: Invalid JSON: .*(EOF|expected)"):
        label_studio.read([tmp_path / "a.json"], tmp_path)


def test_a_relation_of_two_regions_is_no_object(tmp_path):
    content = tasks()
    relation = {"from_id": "r1", "to_id": "r2", "type": "relation", "direction": "right"}
    content[0]["annotations"][0]["result"].append(relation)
    check(read(label_studio, write(tmp_path, content)), THINGS)
