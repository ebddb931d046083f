"""One set of three pictures as labelme, CVAT and VIA write it, and a slow rasteriser of its own.

Shapes are (label, kind, numbers). Kinds: polygon (points), box (left, top, right, bottom, degrees),
circle (x, y, radius), ellipse (x, y, radius, radius, degrees), mask (left, top, rows of 0 and 1),
line (points).
"""

import base64
import io
import json
import math
from xml.sax.saxutils import quoteattr

import numpy as np
from PIL import Image

from danet.datasets.exports.shapes import paint

SIZE = (40, 56)  # height, width
LABELS = ["cat", "dog", "tree"]
COLORS = [(250, 50, 83), (50, 183, 250), (10, 128, 10)]
RING = [[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 0]]
SCENE = {
    "a.png": [
        ("tree", "polygon", [(3.2, 4.1), (40.7, 2.3), (50.5, 30.2), (20.4, 37.6), (5.5, 25.8)]),
        ("background", "polygon", [(15.3, 12.2), (30.6, 11.4), (27.1, 24.9), (16.8, 22.3)]),
        ("cat", "box", (24.5, 8.25, 46.75, 20.5, 0)),
        ("dog", "line", [(2, 2), (30, 30)]),
    ],
    "sub/b.png": [
        ("dog", "circle", (28.0, 20.0, 12.5)),
        ("cat", "polygon", [(26.1, 3.3), (52.2, 35.1), (30.4, 38.8)]),
        ("tree", "circle", (10.3, 30.7, 6.2)),
    ],
    "c.png": [("cat", "mask", (10, 5, RING)), ("tree", "mask", (14, 7, RING[:2]))],
}
SPLITS = {"a.png": "Train", "sub/b.png": "Validation", "c.png": "Test"}
TURNED = [("cat", "box", (20, 10, 40, 22, 30)), ("dog", "ellipse", (15, 25, 11.5, 4.5, 60))]
"""Shapes that only some tools can turn."""


def write_pictures(folder):
    for name in SCENE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE[::-1], (90, 90, 90)).save(folder / name)


def _turned(x, y, center, degrees):
    """Return points turned back, so that the shape lies straight."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = x - center[0], y - center[1]
    return x * cos + y * sin, y * cos - x * sin


def covered(kind, numbers):
    """Return the pixels whose centres a shape covers, and those within a pixel of its outline."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    inside, near = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    if kind == "mask":
        left, top, rows = numbers
        rows = np.array(rows, bool)
        inside[top : top + rows.shape[0], left : left + rows.shape[1]] = rows
    elif kind in ("circle", "ellipse"):
        cx, cy, rx, ry, degrees = numbers if kind == "ellipse" else (*numbers, numbers[2], 0)
        u, v = _turned(x, y, (cx, cy), degrees)
        inside = (u / rx) ** 2 + (v / ry) ** 2 <= 1
        for angle in np.linspace(0, 2 * np.pi, 720):
            near |= np.hypot(u - rx * np.cos(angle), v - ry * np.sin(angle)) <= 1
    elif kind == "box":
        x0, y0, x1, y1, degrees = numbers
        u, v = _turned(x, y, ((x0 + x1) / 2, (y0 + y1) / 2), degrees)
        beyond_u, beyond_v = abs(u) - (x1 - x0) / 2, abs(v) - (y1 - y0) / 2
        inside = (beyond_u < 0) & (beyond_v < 0)
        near = abs(np.maximum(beyond_u, beyond_v)) <= 1
    elif kind == "polygon":
        for (x0, y0), (x1, y1) in zip(numbers, [*numbers[1:], numbers[0]], strict=True):
            if y0 != y1:  # a ray to the right crosses this side
                inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
            along = ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / math.dist(
                (x0, y0), (x1, y1)
            ) ** 2
            along = along.clip(0, 1)
            near |= np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)) <= 1
    return inside, near


def expected(objects):
    """Return the labels of pixels, names (H, W), and where a rasteriser may differ."""
    names, unsure = np.full(SIZE, "", object), np.zeros(SIZE, bool)
    for label, kind, numbers in objects:
        inside, near = covered(kind, numbers)
        names[inside] = label
        unsure = (unsure & ~inside) | near
    return names, unsure


def painted(picture, labels):
    """Return what a picture of an export shows, names (H, W), and the remarks on it."""
    values, remarks = paint(picture, SIZE, labels)
    return np.array(["", *labels], object)[values], remarks


def agrees(picture, labels, objects):
    """Check a picture of an export against the slow rasteriser."""
    names, unsure = expected(objects)
    found, _ = painted(picture, labels)
    differs = found != names
    assert not (differs & ~unsure).any(), picture.name
    assert {*names.ravel()} == {*found.ravel()}
    assert unsure.any() or not differs.any()


def _png(rows):
    file = io.BytesIO()
    Image.fromarray(np.array(rows, np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def labelme_shape(label, kind, numbers):
    label = {"background": "_background_"}.get(label, label)
    shape = {"label": label, "group_id": None, "description": "", "flags": {}, "mask": None}
    if kind == "mask":
        left, top, rows = numbers
        last = [left + len(rows[0]) - 1, top + len(rows) - 1]
        return {**shape, "points": [[left, top], last], "shape_type": kind, "mask": _png(rows)}
    if kind == "circle":
        x, y, radius = numbers
        points = [(x, y), (x + radius * 0.6, y - radius * 0.8)]
    elif kind == "box":  # from any corner to the opposite one
        points = [(numbers[2], numbers[1]), (numbers[0], numbers[3])]
    else:
        points = numbers
    kind = {"box": "rectangle", "line": "linestrip"}.get(kind, kind)
    return {**shape, "points": points, "shape_type": kind}


def labelme_file(name, objects, **changes):
    return {
        "version": "5.4.1",
        "flags": {},
        "shapes": [labelme_shape(*item) for item in objects],
        "imagePath": name,
        "imageData": None,
        "imageHeight": SIZE[0],
        "imageWidth": SIZE[1],
        **changes,
    }


def write_labelme(root):
    """Write a file beside each picture; one names its picture as Windows does."""
    write_pictures(root)
    for name, objects in SCENE.items():
        stem = name.removesuffix(".png")
        path = "..\\sub\\b.png" if "/" in name else name
        (root / f"{stem}.json").write_text(json.dumps(labelme_file(path, objects), indent=2))


def cvat_object(label, kind, numbers, order=0):
    tag = {"circle": "ellipse", "line": "polyline"}.get(kind, kind)
    found = {"label": label, "source": "manual", "occluded": 0, "z_order": order}
    if kind in ("polygon", "line"):
        found["points"] = ";".join(f"{x:.2f},{y:.2f}" for x, y in numbers)
    elif kind == "box":
        found |= dict(zip(("xtl", "ytl", "xbr", "ybr", "rotation"), numbers, strict=True))
    elif kind in ("circle", "ellipse"):
        values = numbers if kind == "ellipse" else (*numbers, numbers[2], 0)
        found |= dict(zip(("cx", "cy", "rx", "ry", "rotation"), values, strict=True))
    else:
        left, top, rows = numbers
        flat = np.concatenate([[0], np.ravel(rows), [2]])
        ends = np.flatnonzero(np.diff(flat))
        runs = np.diff(ends, prepend=0).tolist()  # of 0, of 1, of 0, ...
        found |= {"rle": ", ".join(map(str, runs)), "left": left, "top": top}
        found |= {"width": len(rows[0]), "height": len(rows)}
    if not found.get("rotation", 1):
        del found["rotation"]  # as CVAT leaves it out
    attributes = " ".join(f"{key}={quoteattr(str(value))}" for key, value in found.items())
    return f"    <{tag} {attributes}>\n    </{tag}>\n"


def cvat_xml(images, labels=("background", *LABELS), kind="task"):
    """Return the file of images: name -> lines of objects."""
    colors = dict(zip(LABELS, COLORS, strict=True)) | {"background": (0, 0, 0)}
    shown = "".join(
        f"<label><name>{label}</name><color>#{bytes(colors[label]).hex()}</color>"
        "<type>any</type><attributes></attributes></label>\n"
        for label in labels
    )
    bodies = "".join(
        f'  <image id="{i}" name="{name}" subset="{SPLITS.get(name, "default")}" '
        f'width="{SIZE[1]}" height="{SIZE[0]}">\n{"".join(lines)}  </image>\n'
        for i, (name, lines) in enumerate(images.items())
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n'
        f"  <meta><{kind}><id>4</id><labels>\n{shown}</labels></{kind}></meta>\n{bodies}"
        "</annotations>\n"
    )


def write_cvat(root):
    write_pictures(root / "images")
    images = {name: [cvat_object(*item) for item in items] for name, items in SCENE.items()}
    (root / "annotations.xml").write_text(cvat_xml(images))


def write_cvat_masks(root):
    """Write CVAT's masks: colours, some with a palette; return name -> labels of pixels."""
    colors = dict(zip(LABELS, COLORS, strict=True)) | {"background": (0, 0, 0)}
    rows = [f"{label}:{','.join(map(str, color))}::" for label, color in colors.items()]
    root.mkdir(parents=True, exist_ok=True)
    (root / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *rows]))
    found = {}
    for name, objects in SCENE.items():
        names, _ = expected(objects)
        names[names == ""] = "background"
        found[name] = names
        pixels = np.array([[colors[label] for label in row] for row in names], np.uint8)
        picture = Image.fromarray(pixels)
        file = root / "SegmentationClass" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (picture.convert("P", palette=Image.ADAPTIVE) if name == "c.png" else picture).save(file)
        lists = root / "ImageSets" / "Segmentation" / f"{SPLITS[name]}.txt"
        lists.parent.mkdir(parents=True, exist_ok=True)
        lists.write_text(name.removesuffix(".png") + "\n")
    return found


def write_labelme_voc(root, *, with_arrays=True):
    """Write labelme2voc's folders; return name -> labels of pixels, with ignored ones."""
    classes = ["_background_", *LABELS]
    found = {}
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassNpy"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "class_names.txt").write_text("\n".join(classes))
    for name, objects in SCENE.items():
        stem = name.removesuffix(".png").replace("/", "_")
        names, _ = expected([item for item in objects if item[0] != "background"])
        names[names == ""] = "_background_"
        names[-3:] = "__ignore__"
        found[f"{stem}.jpg"] = names
        values = np.array([["__ignore__", *classes].index(label) - 1 for label in names.ravel()])
        values = values.reshape(SIZE).astype(np.int32)
        Image.new("RGB", SIZE[::-1]).save(root / "JPEGImages" / f"{stem}.jpg")
        if with_arrays:
            np.save(root / "SegmentationClassNpy" / f"{stem}.npy", values)
        picture = Image.fromarray((values & 255).astype(np.uint8))
        picture.putpalette([i // 3 for i in range(768)])
        picture.save(root / "SegmentationClass" / f"{stem}.png")
    return found


def via_shape(kind, numbers):
    if kind in ("polygon", "line"):
        x, y = zip(*numbers, strict=True)
        name = {"line": "polyline"}.get(kind, kind)
        return {"name": name, "all_points_x": list(x), "all_points_y": list(y)}
    if kind == "box":
        x0, y0, x1, y1, _ = numbers
        return {"name": "rect", "x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0}
    if kind == "circle":
        return dict(zip(("name", "cx", "cy", "r"), ("circle", *numbers), strict=True))
    keys = ("name", "cx", "cy", "rx", "ry", "theta")
    *others, degrees = numbers
    return dict(zip(keys, ("ellipse", *others, math.radians(degrees)), strict=True))


VIA_SCENE = {**SCENE, "c.png": [TURNED[1], ("tree", "box", (30, 5, 50, 15, 0))]}
"""VIA has no masks."""


def via_images(scene=VIA_SCENE, label=lambda name: {"class": name}):
    return {
        f"{name}{len(objects)}": {
            "filename": name,
            "size": len(objects),
            "regions": [
                {"shape_attributes": via_shape(kind, numbers), "region_attributes": label(name_)}
                for name_, kind, numbers in objects
            ],
            "file_attributes": {},
        }
        for name, objects in scene.items()
    }


def via_project(images):
    options = {"type": "dropdown", "description": "", "options": dict.fromkeys(LABELS, "")}
    return {
        "_via_settings": {"ui": {}, "core": {}, "project": {"name": "x"}},
        "_via_img_metadata": images,
        "_via_attributes": {"region": {"class": options}, "file": {}},
        "_via_data_format_version": "2.0.10",
        "_via_image_id_list": [*images],
    }
