"""Label files that are not as they must be: each is refused or accepted by both tools."""

import numpy as np
import pytest
import torch
from conftest import tool, write_pair
from PIL import Image
from starts import KINDS, LABELS, accepted, plant, refused

from danet.losses import CrossEntropy

both = pytest.mark.parametrize("kind", list(KINDS))


def label(root, kind, name="train_2"):
    return root / LABELS[kind] / "train" / f"{name}.png"


def relabel(root, change):
    """Changes every mask of a folder of own pictures: array in, array or picture out."""
    for path in sorted((root / "masks").rglob("*.png")):
        with Image.open(path) as picture:
            new = change(np.array(picture))
        (Image.fromarray(new) if isinstance(new, np.ndarray) else new).save(path)


def test_L01_value_one_too_large(tmp_path, monkeypatch):
    root = plant(tmp_path / "data")
    mask = np.full((44, 60), 3, np.uint8)
    mask[7:9, 5:8] = 11
    Image.fromarray(mask).save(label(root, "folder"))
    place = "label value 11 on 6 pixels, first at row 7, column 5"
    parts = (label(root, "folder"), place, "11 classes, with values 0..10, 255", "count from 0")
    refused("folder", root, tmp_path, monkeypatch, *parts)


def test_L01_value_one_too_large_in_camvid(tmp_path, monkeypatch):
    root = plant(tmp_path / "data", "camvid")
    Image.fromarray(np.full((44, 60), 12, np.uint8)).save(label(root, "camvid"))
    parts = (label(root, "camvid"), "label value 12 on 2640 pixels, first at row 0, column 0")
    refused("camvid", root, tmp_path, monkeypatch, *parts)


def test_L02_values_from_one_on(tmp_path, monkeypatch, capsys):
    root = plant(tmp_path / "data")
    relabel(root, lambda mask: mask + 1)
    parts = ("label value 11", "values 1..11 and no 0", "data.labels_start_at=1")
    refused("folder", root, tmp_path, monkeypatch, *parts)
    settings = ["data.labels_start_at=1"]
    out = accepted("folder", root, tmp_path, monkeypatch, capsys, settings=settings)
    assert out == ""
    relabel(root, lambda mask: np.where(mask == 11, 4, mask))
    start = accepted("folder", root, tmp_path, monkeypatch, capsys)
    assert "has the value 0 (a); if classes count from 1, set data.labels_start_at=1" in start


TWO = ["data.classes=[background,cat]"]


def test_L03_object_of_255_that_would_be_ignored(tmp_path, monkeypatch, capsys):
    root = plant(tmp_path / "data", top=2)
    relabel(root, lambda mask: mask * np.uint8(255))
    parts = ("values 0 and 255 only", "cat would never be learnt", "data.values={0:0,255:1}")
    refused("folder", root, tmp_path, monkeypatch, *parts, settings=TWO)
    settings = [*TWO, "data.values={0: 0, 255: 1}"]
    assert accepted("folder", root, tmp_path, monkeypatch, capsys, settings=settings) == ""


COLORS = np.random.default_rng(1).integers(0, 250, (11, 3), dtype=np.uint8)


@both
def test_L04_colour_mask(kind, tmp_path, monkeypatch):
    root = plant(tmp_path / "data", kind)
    path = label(root, kind)
    with Image.open(path) as picture:
        mask = np.array(picture)
    Image.fromarray(COLORS[mask]).save(path)
    first = min(map(tuple, COLORS.tolist()))
    shown = f"with 11 colours: [{first[0]},{first[1]},{first[2]}], ["
    refused(
        kind, root, tmp_path, monkeypatch, path, "one channel", shown, ", ...", "data.colors=[["
    )


def test_L05_colour_outside_the_table(tmp_path, monkeypatch, capsys):
    root = plant(tmp_path / "data")
    relabel(root, lambda mask: COLORS[mask])
    settings = [f"data.colors={COLORS.tolist()}"]
    accepted("folder", root, tmp_path, monkeypatch, capsys, settings=settings)
    path = label(root, "folder")
    with Image.open(path) as picture:
        pixels = np.array(picture)
    near = COLORS[4].astype(int) + np.array((0, 1, 0))
    pixels[9, 3:5] = near
    Image.fromarray(pixels).save(path)
    place = f"the colour {near.tolist()} on 2 pixels, first at row 9, column 3"
    parts = (path, place, f"nearest known one is {COLORS[4].tolist()}")
    refused("folder", root, tmp_path, monkeypatch, *parts, settings=settings)


@both
def test_L06_palette(kind, tmp_path, monkeypatch, capsys):
    root = plant(tmp_path / "data", kind)
    mask = np.arange(44 * 60, dtype=np.uint32).reshape(44, 60) % 11
    if kind == "folder":
        mask[0] = 255
    picture = Image.fromarray(mask.astype(np.uint8))
    picture.putpalette([v for c in range(256) for v in (c, 255 - c, 7)])
    picture.save(label(root, kind))
    assert accepted(kind, root, tmp_path, monkeypatch, capsys) == ""
    if kind == "folder":
        from danet.datasets.folder import Folder

        data = Folder(root=root, split="train", classes=list("abcdefghijk"))
        assert np.array_equal(data[2].mask, mask)


@both
@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 4), ("LA", 2)])
def test_L07_alpha(kind, mode, channels, tmp_path, monkeypatch):
    root = plant(tmp_path / "data", kind)
    Image.new(mode, (60, 44)).save(label(root, kind))
    parts = (label(root, kind), f"one channel of class indices, this has {channels} (mode {mode})")
    refused(kind, root, tmp_path, monkeypatch, *parts)


@both
def test_L08_sixteen_bits(kind, tmp_path, monkeypatch, capsys):
    root = plant(tmp_path / "data", kind)
    wide = np.zeros((44, 60), np.uint16)
    wide[3, 4] = 10
    Image.fromarray(wide).save(label(root, kind))
    accepted(kind, root, tmp_path, monkeypatch, capsys)
    wide[3, 4] = 1000
    Image.fromarray(wide).save(label(root, kind))
    parts = ("label value 1000 on 1 pixels, first at row 3, column 4",)
    refused(kind, root, tmp_path, monkeypatch, *parts)


@both
def test_L09_jpeg(kind, tmp_path, monkeypatch):
    root = plant(tmp_path / "data", kind)
    Image.new("L", (60, 44)).save(label(root, kind), format="JPEG")
    refused(kind, root, tmp_path, monkeypatch, label(root, kind), "JPEG is lossy", "use PNG")


@both
def test_L10_other_size_than_the_image(kind, tmp_path, monkeypatch):
    root = plant(tmp_path / "data", kind)
    Image.new("L", (61, 44)).save(label(root, kind))
    image = root / "images/train/train_2.png"
    parts = (f"{label(root, kind)}: the label is 61 x 44 and its image {image} is 60 x 44",)
    refused(kind, root, tmp_path, monkeypatch, *parts)


@both
def test_L11_turned_image_whose_label_is_turned_in_place(kind, tmp_path, monkeypatch, capsys):
    root = plant(tmp_path / "data", kind)
    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "images/train/train_2.png").unlink()
    Image.new("RGB", (60, 44)).save(root / "images/train/train_2.jpg", exif=exif)
    text = "have an EXIF turn, which is not applied"
    accepted(kind, root, tmp_path, monkeypatch, capsys, text)
    Image.new("L", (44, 60)).save(label(root, kind))
    parts = ("is 44 x 60 and its image", "is 60 x 44", "turn the image to 44 x 60", "pixels lie")
    refused(kind, root, tmp_path, monkeypatch, *parts)


@both
def test_L12_label_that_is_ignored_everywhere(kind, tmp_path, monkeypatch, capsys):
    root = plant(tmp_path / "data", kind)
    ignored = 255 if kind == "folder" else 11
    Image.fromarray(np.full((44, 60), ignored, np.uint8)).save(label(root, kind))
    accepted(kind, root, tmp_path, monkeypatch, capsys, "ignored everywhere", "train_2")


def test_L13_batch_that_is_ignored_everywhere():
    network = torch.nn.Conv2d(3, 5, 1)
    before = [p.clone() for p in network.parameters()]
    mask = torch.full((2, 8, 8), 255, dtype=torch.uint8)
    loss = CrossEntropy()(network(torch.rand(2, 3, 8, 8)), mask)
    loss.backward()
    assert loss.item() == 0
    torch.optim.SGD(network.parameters(), lr=1.0).step()
    assert all(map(torch.equal, before, network.parameters()))


@both
def test_L14_truncated_png(kind, tmp_path, monkeypatch):
    root = plant(tmp_path / "data", kind)
    path = label(root, kind)
    path.write_bytes(path.read_bytes()[:-40])
    refused(kind, root, tmp_path, monkeypatch, f"{path}: not a readable label", "cut off")


@both
@pytest.mark.parametrize("content", [b"", b"just some text", b"<html><body>404"], ids=repr)
def test_L15_no_picture_at_all(kind, content, tmp_path, monkeypatch):
    root = plant(tmp_path / "data", kind)
    label(root, kind).write_bytes(content)
    shown = f"begins with {content[:16]!r}" if content else "the file is empty"
    refused(kind, root, tmp_path, monkeypatch, f"{label(root, kind)}: not a readable", shown)


@both
def test_L16_floats_in_a_tiff(kind, tmp_path, monkeypatch):
    root = plant(tmp_path / "data", kind)
    Image.fromarray(np.zeros((44, 60), np.float32)).save(label(root, kind), format="TIFF")
    refused(kind, root, tmp_path, monkeypatch, label(root, kind), "whole numbers", "float32")


@pytest.mark.parametrize("array", [np.zeros((44, 60)), np.zeros((1, 44, 60), np.uint8)], ids=str)
def test_L16_floats_in_an_array_file(array, tmp_path, monkeypatch):
    root = plant(tmp_path / "data")
    for path in sorted((root / "masks").rglob("*.png")):
        np.save(path.with_suffix(".npy"), np.zeros((44, 60), np.uint8))
    path = label(root, "folder").with_suffix(".npy")
    np.save(path, array)
    parts = (
        f"{path}: a label must be an array of whole numbers",
        str(array.dtype),
        "(height, width)",
    )
    refused("folder", root, tmp_path, monkeypatch, *parts, settings=["data.mask_suffix=.npy"])


@both
def test_L17_class_that_never_occurs(kind, tmp_path, monkeypatch, capsys):
    from starts import Started, composed, examine, start_training

    root = plant(tmp_path / "data", kind, top=9)
    settings = [*KINDS[kind], f"data.root={root}"]
    with pytest.raises(Started):
        start_training(settings, monkeypatch)
    capsys.readouterr()
    examine(composed("check_data", [*settings, "data.num_workers=0"]), [], tmp_path / "report")
    names = "9 (j), 10 (k)" if kind == "folder" else "9 (Pedestrian), 10 (Bicyclist)"
    text = f"classes that never occur in its 4 labels and cannot be learnt: {names}"
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (["data.classes=[a,b,a]"], "the name 'a' stands there twice"),
        (
            ["data.colors=[[1,2,3],[1,2,3]]", *TWO],
            "stands there twice, at positions 0 and",
        ),
        (["data.classes=[a b]"], "data.num_classes=1: expected a whole number of at least 2"),
        (["data.colors=[[1,2,3],[1,2,4],[0,0,0]]", "data.classes=[a b,c]"], "3 colours for 2 cla"),
        (["data.num_classes=3", "data.classes=[a b,c]"], "data.num_classes=3, but Folder has 2"),
    ],
)
def test_L18_doubled_names_and_colours_and_lost_commas(settings, part, tmp_path, monkeypatch):
    root = plant(tmp_path / "data", top=2)
    refused("folder", root, tmp_path, monkeypatch, part, settings=settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "check_data"])
def test_L03_and_L09_as_processes(name, tmp_path):
    root = plant(tmp_path / "two", top=2)
    relabel(root, lambda mask: mask * np.uint8(255))
    lossy = plant(tmp_path / "lossy")
    Image.new("L", (60, 44)).save(label(lossy, "folder"), format="JPEG")
    for own, text, settings in (
        (root, "data.values={0:0,255:1}", TWO),
        (lossy, "JPEG is lossy", KINDS["folder"][1:]),
    ):
        small = ["data.num_workers=0", "data.batch_size=2"]
        chosen = ["data=folder", f"data.root={own}", *settings, *small]
        done = tool(name, *chosen, cwd=tmp_path, code=2)
        assert text in done.stderr.split("error: ")[-1]
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.glob("runs/folder/*"))


def test_a_label_is_never_half_filled_when_only_its_last_byte_is_missing(tmp_path, monkeypatch):
    root = plant(tmp_path / "data")
    write_pair(
        root, "train", "z", np.zeros((4, 4, 3), "u1"), np.zeros((4, 4), "u1"), labels="masks"
    )
    path = label(root, "folder", "z")
    path.write_bytes(path.read_bytes()[:-1])
    refused("folder", root, tmp_path, monkeypatch, f"{path}: not a readable label")
