"""Masks of any usual encoding give the same batches; lists and places are as set, or refused."""

import itertools
import re
import shlex

import numpy as np
import pytest
import torch
from conftest import make_folder, save_picture, write_pair
from PIL import Image
from test_config import compose

from danet.config.validate import check
from danet.data.loader import train_batches
from danet.data.transforms import Pipeline, ScaleCrop
from danet.datasets.labels import read_class_file
from danet.errors import InputError
from danet.types import IGNORE

CLASSES = ("background", "cat", "dog")
COLORS = ((0, 0, 0), (255, 0, 0), (12, 200, 7))
VOID = (224, 224, 192)


def own(root, split="train", **settings):
    return make_folder(root=root, split=split, **{"classes": CLASSES, **settings})


def table(*values, dtype=np.uint8):
    """Returns a lookup table for masks of 0, 1, 2 and IGNORE."""
    found = np.zeros((256, *np.shape(values[0])), dtype)
    found[[0, 1, 2, IGNORE]] = values
    return found


def opaque(color):
    return (*color, 255)


COLORED = {"colors": COLORS, "ignore_colors": [VOID]}
ENCODINGS = {
    "misleading palette": (table(0, 1, 2, IGNORE), {}, dict(enumerate(reversed(COLORS)))),
    "colours": (table(*COLORS, VOID), COLORED, None),
    "opaque colours": (table(*map(opaque, (*COLORS, VOID))), COLORED, None),
    "colours of a palette": (
        *(table(7, 3, 200, 9), COLORED),
        {7: COLORS[0], 3: COLORS[1], 200: COLORS[2], 9: VOID},
    ),
    "from 1": (table(1, 2, 3, 0), {"labels_start_at": 1}, None),
    "other values": (
        *(table(10, 99, 100, 254), {"values": {10: 0, 99: 1, 100: 2, 254: IGNORE}}, None),
    ),
    "16 bits": (
        table(1000, 2000, 65535, 3, dtype=np.uint16),
        *({"values": {1000: 0, 2000: 1, 65535: 2, 3: IGNORE}}, None),
    ),
}
"""What stands for 0, 1, 2 and IGNORE, settings, and a palette: value -> colour."""


def batches_of(root, **settings):
    pipeline = Pipeline({"crop": ScaleCrop((32, 32), (0.5, 2.0))})
    data = own(root, transform=pipeline, **settings)
    return list(itertools.islice(train_batches(data, batch_size=2, seed=5), 6))


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_of_the_same_masks_gives_the_same_batches(tmp_path, name):
    values, settings, palette = ENCODINGS[name]
    rng = np.random.default_rng(0)
    for i in range(6):
        image = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        mask = rng.choice(np.array([0, 1, 2, IGNORE], np.uint8), (30, 40))
        write_pair(tmp_path / "plain", "train", f"p{i}", image, mask, labels="masks")
        write_pair(tmp_path / "other", "train", f"p{i}", image, values[mask], labels="masks")
        if palette:
            picture = Image.fromarray(values[mask])
            picture.putpalette([v for j in range(256) for v in palette.get(j, VOID)])
            picture.save(tmp_path / f"other/masks/train/p{i}.png")
    plain, other = batches_of(tmp_path / "plain"), batches_of(tmp_path / "other", **settings)
    assert {v for batch in plain for v in batch.mask.unique().tolist()} == {0, 1, 2, IGNORE}
    for one, two in zip(plain, other, strict=True):
        assert one.name == two.name
        assert torch.equal(one.image, two.image)
        assert torch.equal(one.mask, two.mask)


def test_arrays_and_one_bit_masks_are_read_as_numbers(tmp_path):
    bits = np.random.default_rng(0).random((4, 5)) < 0.5
    write_pair(tmp_path, "train", "a", np.zeros((4, 5, 3), np.uint8), bits, labels="masks")
    with Image.open(tmp_path / "masks/train/a.png") as picture:
        assert picture.mode == "1"
    assert np.array_equal(own(tmp_path)[0].mask, bits)
    np.save(tmp_path / "masks/train/a.npy", bits.astype(np.int64))
    assert np.array_equal(own(tmp_path, mask_suffix=".npy")[0].mask, bits)


# Where things are


def write(path, mode="RGB"):
    save_picture(path, np.zeros((4, 5, 3) if mode == "RGB" else (4, 5), np.uint8))


@pytest.mark.parametrize("names", [("training", "validation"), ("Train", "Val"), ("train", "dev")])
@pytest.mark.parametrize("is_first", [False, True])
def test_splits_of_other_names_are_read_inside_and_around(tmp_path, names, is_first):
    for name in names:
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            folder = f"{name}/{kind}" if is_first else f"{kind}/{name}"
            write(tmp_path / folder / f"of {name}.png", mode=mode)
    for split, name in zip(("train", "val"), names, strict=True):
        data = own(tmp_path, split)
        assert [item.name for item in data.items] == [f"of {name}"]
        assert data[0].mask.shape == (4, 5)


@pytest.mark.parametrize(("images", "masks"), [("photos", "ground"), (".", ".")])
def test_folders_and_suffixes_of_other_names_are_found(tmp_path, images, masks):
    write(tmp_path / images / "a.b.JPG")
    write(tmp_path / images / "deep/c.png")
    write(tmp_path / masks / "a.b_mask.PNG", mode="L")
    write(tmp_path / masks / "deep/c_mask.png", mode="L")
    places = {"images_dir": images, "masks_dir": masks, "mask_suffix": "_mask.png"}
    both = [own(tmp_path, split, **places) for split in ("train", "val")]
    assert sorted(item.name for data in both for item in data.items) == ["a.b", "deep/c"]
    assert both[0][0].mask.shape == (4, 5)


@pytest.fixture
def listed(tmp_path):
    for name in ("a", "b", "my cat", "c"):
        write(tmp_path / f"images/{name}.jpg")
        write(tmp_path / f"masks/{name}.png", mode="L")
    write(tmp_path / "elsewhere/c.png", mode="L")
    return tmp_path


# Names as cameras and programs give them: images, masks, and the settings that read them.
NAMES = {
    "ending": ("images/a{i}.jpg", "masks/a{i}.tif", {"mask_suffix": ".tif"}),
    "suffix": ("images/{i}.jpg", "masks/{i}_mask.bmp", {"mask_suffix": "_mask.bmp"}),
    "prefix": ("images/img_{i}.JPG", "masks/mask_{i}.png", {"pairs": ("img_*", "mask_*.png")}),
    "both": (
        *("images/f{i}_rgb.png", "masks/f{i}_gt.png"),
        {"image_suffix": "_rgb", "mask_suffix": "_gt.png"},
    ),
    "capitals": (
        *("Images/a{i}.jpg", "Masks/a{i}.png"),
        {"images_dir": "Images", "masks_dir": "Masks"},
    ),
    "within": (
        *("photos/{s}/a{i}.png", "annotations/{s}/a{i}.png"),
        {"images_dir": "photos", "masks_dir": "annotations"},
    ),
    "around": (
        *("{s}/my img/a{i}.jpg", "{s}/lbl/a{i} 1.png"),
        {"images_dir": "my img", "masks_dir": "lbl", "mask_suffix": " 1.png"},
    ),
    "deep": (
        *("zip/{s}/img/a{i}.jpg", "zip/{s}/lbl/a{i}.png"),
        {"images_dir": "zip", "masks_dir": "zip", "pairs": ("img/*", "lbl/*.png")},
    ),
    "one folder": ("all/a{i}.jpg", "all/a{i}.png", {"images_dir": ".", "masks_dir": "."}),
    "a folder each": (
        *("s{i}/image.png", "s{i}/mask.png"),
        {
            **{"images_dir": ".", "masks_dir": "."},
            **{"image_suffix": "/image", "mask_suffix": "/mask.png"},
        },
    ),
    "masks inside": (
        *("pics/a{i}.jpg", "pics/masks/a{i}.png"),
        {"images_dir": ".", "masks_dir": ".", "pairs": ("*", "masks/*.png")},
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_files_of_other_names_are_named_with_the_settings_that_pair_them_rightly(tmp_path, name):
    image, mask, settings = NAMES[name]
    for i in range(12):
        places = {"i": f"{i:02}", "s": "val" if i < 3 else "train"}
        save_picture(tmp_path / "data" / image.format(**places), np.full((4, 5, 3), i, np.uint8))
        save_picture(tmp_path / "data" / mask.format(**places), np.full((4, 5), i % 3, np.uint8))
    (tmp_path / "data/read me.txt").write_text("")
    with pytest.raises(InputError) as error:
        own(tmp_path / "data")
    found = re.search(r"; 12 pairs, as .*, are found by (.*)", str(error.value))[1]
    typed = dict(part.removeprefix("data.").split("=", 1) for part in shlex.split(found))
    plain = {
        key: f"[{','.join(value)}]" if key == "pairs" else value for key, value in settings.items()
    }
    assert {key: value.strip("'") for key, value in typed.items()} == plain
    for split in ("train", "val"):
        for sample in (data := own(tmp_path / "data", split, **settings)):
            assert abs(int(sample.image[0, 0, 0]) % 3 - int(sample.mask[0, 0])) == 0, sample.name
        assert len(data) in (3, 9, 2, 10)


def test_files_that_make_no_pairs_are_counted_by_their_kind(tmp_path):
    for i in range(3):
        write(tmp_path / f"masks/{i}.png", mode="L")
        (tmp_path / f"masks/{i}.txt").write_bytes(b"")
    with pytest.raises(InputError, match=r"there are 3 \.png in masks, 3 \.txt in masks; images"):
        own(tmp_path)


@pytest.mark.parametrize("other", ["previews/{}.png", "masks/{}_color.png", "labels/{}.png"])
def test_pictures_that_are_not_read_are_named_and_masks_are_not_taken_for_pictures(tmp_path, other):
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / f"images/{i}.HEIC").write_bytes(b"")
        write(tmp_path / f"masks/{i}.png", mode="L")
        if i < 3:
            write(tmp_path / other.format(i))
    with pytest.raises(InputError, match=r"; there are 4 \.heic in images; .*; convert them$"):
        own(tmp_path)


def test_masks_of_another_data_set_beside_the_root_are_not_proposed(tmp_path):
    for i in range(12):
        write(tmp_path / f"mine/images/{i}.png")
        write(tmp_path / f"labels/{i}.png", mode="L")
        write(tmp_path / f"theirs/masks/{i}.png", mode="L")
    with pytest.raises(InputError) as error:
        own(tmp_path / "mine")
    assert "are found by" not in str(error.value)
    assert "theirs" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": ["img_*.jpg"]}, r"data.pairs=\['img_\*.jpg'\]: expected the patterns"),
        ({"pairs": ["img.jpg", "m*.png"]}, r"each with one \* for what both names share"),
        ({"pairs": ["*", "m*.png"], "mask_suffix": "_m.png"}, "data.pairs replaces data.image_s"),
    ],
)
def test_patterns_that_name_no_pairs_are_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        own(tmp_path, **settings)


# Masks with smoothed edges


def nearest_by_search(mask, known, ignored=()):
    """Returns the class of the nearest known value or colour, pixel by pixel."""
    every = [*known.items(), *((value, IGNORE) for value in ignored)]
    found = np.zeros(mask.shape[:2], int)
    for place in np.ndindex(found.shape):
        away = [np.sum((np.array(value, int) - mask[place]) ** 2) for value, _ in every]
        found[place] = every[int(np.argmin(away))][1]
    return found


@pytest.mark.parametrize("kind", ["values", "16 bits", "colours", "grey of three channels"])
def test_the_nearest_value_is_that_of_a_search(tmp_path, kind):
    rng = np.random.default_rng(0)
    known, ignored, channels, top, dtype = {10: 0, 99: 1, 200: 2}, (), (), 255, np.uint8
    if kind == "16 bits":
        known, top, dtype = {1000: 2, 30000: 1, 50000: 0}, 65536, np.uint16
    elif kind == "colours":
        known, ignored, channels, top = dict(zip(COLORS, range(3), strict=True)), (VOID,), (3,), 256
    mask = rng.integers(0, top, (24, 30, *channels)).astype(dtype)  # without 255, which is ignored
    expected = nearest_by_search(mask.astype(int), known, ignored)
    stored = np.repeat(mask[..., None], 3, axis=2) if kind.startswith("grey") else mask
    write_pair(tmp_path, "train", "a", np.zeros((24, 30, 3), np.uint8), stored, labels="masks")
    settings = {"values": known} if not channels else COLORED
    data = own(tmp_path, nearest=True, **settings)
    assert np.array_equal(data[0].mask, expected)
    listed = [np.all(mask.reshape(24, 30, -1) == v, axis=2) for v in (*known, *ignored)]
    assert data.count_unlisted(data.items[0]) == mask.shape[0] * mask.shape[1] - np.sum(listed)
    with pytest.raises(InputError):
        own(tmp_path, **settings)[0]


def test_nearest_changes_no_pixel_that_is_listed_but_cache_and_fingerprint(tmp_path):
    mask = np.array([[10, 99, 200, 255]], np.uint8)
    write_pair(tmp_path, "train", "a", np.zeros((1, 4, 3), np.uint8), mask, labels="masks")
    exact, soft = (own(tmp_path, values={10: 0, 99: 1, 200: 2}, nearest=n) for n in (None, True))
    assert exact[0].mask.tolist() == soft[0].mask.tolist() == [[0, 1, 2, IGNORE]]
    assert soft.count_unlisted(soft.items[0]) == 0
    assert exact.decoding() != soft.decoding()
    assert exact.fingerprint() != soft.fingerprint()


def test_a_mask_saved_as_jpeg_is_read_as_the_shape_it_was(tmp_path):
    mask = np.zeros((40, 48), np.uint8)
    mask[8:24, 16:40] = 1
    save_picture(tmp_path / "images/train/a.png", np.zeros((40, 48, 3), np.uint8))
    for colors, settings in (
        (np.array([0, 255], np.uint8), {"values": {0: 0, 255: 1}}),
        (np.array(COLORS[:2], np.uint8), {"colors": COLORS[:2]}),
    ):
        path = tmp_path / "masks/train/a.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colors[mask]).save(path, quality=70)
        data = own(tmp_path, classes=["a", "b"], mask_suffix=".jpg", nearest=True, **settings)
        assert (data[0].mask != mask).mean() < 0.03
        with pytest.raises(InputError, match="JPEG is lossy and changes class values"):
            own(tmp_path, classes=["a", "b"], mask_suffix=".jpg", **settings)[0]


def with_lists(root, train, val="b\n", **settings):
    (root / "train.txt").write_bytes(train if isinstance(train, bytes) else train.encode())
    (root / "val.txt").write_text(val)
    lists = {"train": "train.txt", "val": str(root / "val.txt")}
    return own(root, settings.pop("split", "train"), lists=lists, **settings)


def test_a_list_may_hold_names_or_pairs_in_any_line_style(listed):
    text = "\ufeffa\r\n\r\n  my cat.jpg  \r\nimages/c.jpg elsewhere/c.png\r\n".encode()
    data = with_lists(listed, text)
    assert [item.name for item in data.items] == ["a", "images/c", "my cat"]
    assert data.items[1].mask == str(listed / "elsewhere/c.png")
    assert [s.mask.shape for s in (data[0], data[1], data[2])] == [(4, 5)] * 3
    pair = with_lists(listed, "images/my cat.jpg\tmasks/my cat.png\n")
    assert pair.items[0].mask == str(listed / "masks/my cat.png")
    assert data.notes == []


def test_class_names_come_from_a_text_file_too(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffbackground\r\ntraffic light\r\n\r\n café \n".encode())
    names = ["background", "traffic light", "café"]
    assert read_class_file(str(path)).names == names
    write(tmp_path / "images/a.png")
    write(tmp_path / "masks/a.png", mode="L")
    assert own(tmp_path, classes=str(path), val_share=0.001).classes == tuple(names)
    config = checked(tmp_path, str(path))
    assert config.data.num_classes == 3
    assert config.data.dataset["classes"] == names, "not the path of the file"


def checked(root, classes, *settings):
    """Returns the config of data=folder after its check, which does not look at files."""
    return check(compose("data=folder", f"data.root={root}", f"data.classes={classes}", *settings))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.labels_start_at=one", "labels_start_at=one: expected a whole number, got the text"),
        ("data.val_share=half", "val_share=half: expected a number, got the text 'half'"),
        ("+data.dataset.files.image_dir=x", "dataset.files.image_dir: PairLayout takes no such"),
        ("+data.dataset.label_format._x=1", "dataset.label_format._x: LabelFormat takes no such"),
        (
            "data.values=4:1",
            "values=4:1: expected a mapping, {name: value}, got the text '4:1'; in ",
        ),
        ("data.dataset.split_rule=3", "dataset.split_rule=3: expected a mapping"),
    ],
)
def test_groups_of_settings_are_checked_like_arguments(tmp_path, setting, message):
    with pytest.raises(InputError) as error:
        checked(tmp_path, "[a,b]", setting, "trainer.steps=0")
    lines = str(error.value).splitlines()
    assert len(lines) == 2, "together with all other mistakes"
    assert any(line.startswith(f"data.{message}") for line in lines), lines


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"colors": COLORS, "values": {0: 0}}, "data.colors and data.values exclude each other"),
        ({"values": {0: 0}, "labels_start_at": 1}, "data.values and data.labels_start_at exclude"),
        ({"labels_start_at": -1}, "data.labels_start_at=-1: expected 0 or more"),
        ({"nearest": True}, "data.nearest=true: nearest to what"),
        ({"nearest": True, "labels_start_at": 1}, "data.nearest=true: nearest to what"),
        ({"ignore_colors": [VOID]}, "data.ignore_colors is for masks of colours"),
        ({"colors": COLORS[:2]}, "data.colors: 2 colours for 3 class names"),
        ({"colors": COLORS, "ignore_colors": COLORS[:1]}, "twice, at positions 0 and 3 of"),
        ({"colors": [*COLORS[:2], (0, 0, 300)]}, r"data.colors: \[0, 0, 300\] is not three"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        own(tmp_path, **settings)
