"""What files hold counts, not what they are called: what reading drops, and labels of one class."""

import json
import shlex
import struct

import cv2
import numpy as np
import PIL
import pytest
import torch
from conftest import TINY, call
from PIL import Image
from starts import CLASSES, LABELS, composed, plant

from danet.data_check.sample import check_sample, sample_indices
from danet.datasets.folder import Folder
from danet.datasets.image_io import inspect_dropped, read_image, read_labels
from danet.errors import InputError
from danet.tools.check_data import examine

SIZE = (44, 60)
RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def pages(path, count, **how):
    pictures = [Image.fromarray(np.roll(COLOR, i, axis=0)) for i in range(count)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **how)


def deep(path, array):
    assert cv2.imwrite(str(path), array)


FOUR = RNG.integers(0, 256, (*SIZE, 4), dtype=np.uint8)
FILES = {
    "near infrared": ("x.tif", lambda p: four_bands(p), "band 4 is dropped"),
    "alpha": ("x.png", lambda p: Image.fromarray(FOUR).save(p), "band 4 is dropped (alpha)"),
    "two pages": ("x.tif", lambda p: pages(p, 2), "page 2 is dropped"),
    "five pages": ("x.tiff", lambda p: pages(p, 5), "pages 2 to 5 are dropped"),
    "animated WebP": ("x.webp", lambda p: pages(p, 3, lossless=True), "pages 2 to 3 are dropped"),
    "animated PNG": ("x.png", lambda p: pages(p, 3), "pages 2 to 3 are dropped"),
}
"""Kind -> name, what writes it, what is said of it."""


def four_bands(path):
    """Writes a TIFF whose fourth band is no alpha: its tag 338 says unspecified."""
    Image.frombytes("RGBX", SIZE[::-1], FOUR.tobytes()).save(path)
    with Image.open(path) as picture:
        assert (picture.mode, picture.tag_v2[277]) == ("RGB", 4)


def tiff(bits, bands, photometric, extra=()):
    """Returns a TIFF of noise that Pillow cannot write: 8, 12 or 16 bits, any number of bands."""
    height, width = SIZE
    array = RNG.integers(0, 2**bits, (height, width * bands)).astype("<u2")
    if bits == 8:
        data = array.astype("u1").tobytes()
    elif bits == 12:  # two numbers in three bytes
        one, two = array[:, ::2].astype(int), array[:, 1::2].astype(int)
        data = np.stack((one >> 4, (one & 15) << 4 | two >> 8, two & 255), 2).astype("u1").tobytes()
    else:
        data = array.tobytes()
    tags = [
        *((256, [width]), (257, [height]), (258, [bits] * bands), (259, [1]), (262, [photometric])),
        *((273, [8]), (277, [bands]), (278, [height]), (279, [len(data)])),
        *([(338, extra)] if extra else []),
    ]
    start = 8 + len(data)
    body, tail = struct.pack("<H", len(tags)), b""
    for number, values in tags:
        raw = struct.pack(f"<{len(values)}H", *values)
        if len(raw) > 4:
            place = start + 2 + 12 * len(tags) + 4 + len(tail)
            raw, tail = struct.pack("<I", place), tail + raw
        body += struct.pack("<HHI", number, 3, len(values)) + raw.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", start) + data + body + bytes(4) + tail


PILLOW = int(PIL.__version__.split(".")[0])  # before 13 it knows no grey with another band
BANDS = {
    "5 bands": ((8, 5, 2, (0, 0)), ["bands 4 to 5 are dropped"]),
    "6 bands": ((8, 6, 2, (0, 0, 0)), ["bands 4 to 6 are dropped"]),
    "grey and another": ((8, 2, 1, (0,)), ["band 2 is dropped"] if PILLOW >= 13 else None),
    "grey and alpha": ((8, 2, 1, (2,)), ["band 2 is dropped (alpha)"]),
    "12 bits": ((12, 1, 1), ["12 bits become 8"]),
    "4 bands of 16 bits": ((16, 4, 2, (0,)), ["16 bits become 8", "band 4 is dropped"]),
    "8 bands": ((8, 8, 2, (0,) * 5), None),
    "4 bands, grey": ((8, 4, 1, (0, 0, 0)), None),
    "5 bands of 16 bits": ((16, 5, 2, (0, 0)), None),
}
"""Kind -> its make, and what is dropped; None where it is not read at all."""


@pytest.mark.parametrize("kind", BANDS)
def test_R12_bands_and_bits_of_tiffs(kind, tmp_path, capfd):
    make, dropped = BANDS[kind]
    path = tmp_path / "x.tif"
    path.write_bytes(tiff(*make))
    if dropped is None:
        with pytest.raises(InputError, match=r"a TIFF that is not read as RGB.*save the three"):
            read_image(path)
    else:
        assert read_image(path).shape == (*SIZE, 3)
        assert inspect_dropped(path)[0] == tuple(dropped)
    assert capfd.readouterr() == ("", "")


def test_R12_white_of_12_bits_is_white(tmp_path):
    path = tmp_path / "x.tif"
    path.write_bytes(tiff(12, 1, 1))
    with Image.open(path) as picture:
        numbers = np.asarray(picture).astype(int)
    assert numbers.max() > 4000
    assert np.array_equal(read_image(path)[..., 0], numbers * 255 // 4095)


def with_file(site, kind):
    """Puts a file of a kind in the place of an image of the training split."""
    name, write, text = FILES[kind]
    site.image("train_1").unlink()
    path = site.image("train_1", name[1:])
    write(path)
    return path, text


@pytest.mark.parametrize("kind", FILES)
def test_R12_what_reading_drops_is_reported_by_both(kind, site):
    path, text = with_file(site, kind)
    assert text in inspect_dropped(path)[0]
    reported = site.accepted(text)
    assert f"1 of 4 images: {text}" in reported
    assert "warning" not in reported


def test_R12_prediction_reports_it_too(site, tiny_checkpoint, capsys):
    path, text = with_file(site, "near infrared")
    output = f"output={site.folder / 'o'}"
    call("predict", f"checkpoint={tiny_checkpoint}", f"images={path}", "write=[]", output)
    assert f"1 of 1 images: {text}" in capsys.readouterr().err


def test_R12_plain_pictures_drop_nothing(tmp_path):
    for name in ("a.png", "a.jpg", "a.bmp", "a.tif", "a.webp"):
        Image.fromarray(COLOR).save(tmp_path / name)
    Image.fromarray(COLOR[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(COLOR).convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert {inspect_dropped(path) for path in tmp_path.iterdir()} == {((), None)}
    with pytest.raises(InputError, match=r"x.png: not a readable image \(the file does not exist"):
        inspect_dropped(tmp_path / "x.png")


def test_R12_a_label_of_several_pages_is_refused(tmp_path):
    path = tmp_path / "mask.tif"
    layers = [Image.fromarray(np.full(SIZE, i, np.uint8)) for i in range(3)]
    layers[0].save(path, save_all=True, append_images=layers[1:])
    with pytest.raises(InputError, match="a label must be one picture, and this file has 3"):
        read_labels(path)
    layers[0].save(path)
    assert not read_labels(path).any()


SQUEEZED = {
    "thermal": lambda shape: RNG.integers(28900, 29300, shape),
    "12 bits in 16": lambda shape: RNG.integers(0, 4096, shape),
    "10 bits in 16": lambda shape: RNG.integers(0, 1024, shape),
}


@pytest.mark.parametrize("values", SQUEEZED)
@pytest.mark.parametrize("shape", [SIZE, (*SIZE, 3)], ids=["grey", "colour"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_R13_pictures_that_keep_few_values_are_warned_of(values, shape, suffix, site):
    site.image("train_1").unlink()
    path = site.image("train_1", f".{suffix}")
    array = SQUEEZED[values](shape).astype(np.uint16)
    deep(path, array)
    few = "1 of 4 images keep 16 values or fewer as 8 bits: train_1; data.channels="
    reported = site.accepted("16 bits become 8", few)
    assert f"warning: train: {few}" in reported
    assert f"data.channels={shape[2] if shape[2:] else 1} data.range=auto keeps all" in reported
    written = json.loads((site.folder / "report/report.json").read_text())
    assert any(note.startswith("warning: ") for note in written["splits"]["train"]["notes"])
    # Followed: all values come through, and nothing is left to warn of.
    assert "warning" not in site.accepted(settings=["data.channels=1", "data.range=auto"])


def test_R13_check_counts_its_warnings(site, capsys):
    deep(site.image("train_1"), SQUEEZED["thermal"](SIZE).astype(np.uint16))
    settings = ["data=folder", CLASSES, f"data.root={site.root}"]
    examine(composed("check_data", settings), [], site.folder / "o")
    assert "no problems, 1 warning\n" in capsys.readouterr().out


def fill(site, values, split="train"):
    """Gives every label of a split these values, in stripes."""
    mask = np.resize(np.repeat(np.array(values, np.uint8), SIZE[1] // len(values) + 1), SIZE)
    for path in (site.root / LABELS[site.kind] / split).iterdir():
        Image.fromarray(mask).save(path)


def test_R14_a_training_reports_classes_that_never_occur(site):
    site.plant(splits=(("train", 50), ("val", 2)))
    fill(site, [0, 1])
    reported = site.accepted()
    assert "classes that never occur in 32 labels looked at: 2 (c)" in reported
    assert "10 (k); tools/check_data.py counts all labels" in reported


@pytest.mark.parametrize("values", [[0], [3], [255], [3, 255]])
@pytest.mark.parametrize("site", ["folder", "camvid"], indirect=True)
def test_R15_labels_of_one_class_are_refused_by_both(site, values):
    on_disk = [11 if v == 255 and site.kind == "camvid" else v for v in values]
    fill(site, on_disk)
    held = [v for v in values if v != 255]
    what = f"class {held[0]} (" if held else "ignored pixels"
    site.refused(f"train: all 4 labels hold {what}", "so there is nothing to learn")
    fill(site, [*on_disk, 5, 6])
    site.accepted()


def test_R15_a_rare_second_class_outside_of_the_sample_is_enough(site):
    site.plant(splits=(("train", 80),))
    fill(site, [0])
    data = Folder(root=site.root, split="train", classes=tuple("abcdefghijk"))
    with pytest.raises(InputError, match=r"all 80 labels hold class 0 \(a\) and nothing else"):
        check_sample(data, training=data)
    place = next(i for i in range(80) if i not in sample_indices(80, 32))
    mask = np.zeros(SIZE, np.uint8)
    mask[3, 4] = 7
    Image.fromarray(mask).save(data.items[place].mask)
    (note,) = check_sample(data, training=data)
    assert "classes that never occur in 32 labels" in note
    assert check_sample(data) == [], "what is scored may hold one class"


@pytest.mark.bad_input("L03")
@pytest.mark.parametrize("count", [2, 3, 4, 11])
def test_R16_masks_of_0_and_255_are_caught_with_any_number_of_classes(count, site):
    for split in ("train", "val"):
        fill(site, [0, 255], split)
    settings = [f"data.classes=[{','.join('abcdefghijk'[:count])}]"]
    site.refused(
        "all labels hold the values 0 and 255 only, and 255 is ignored, so b",
        "would never be learnt; set 'data.values={0:0,255:1}'",
        settings=settings,
    )
    site.accepted(settings=[*settings, "data.values={0: 0, 255: 1}"])


@pytest.mark.parametrize("count", [2, 3, 10])
def test_R17_small_sets_always_have_both_splits(count, tmp_path, capsys):
    root = plant(tmp_path / "data", splits=((".", count),))
    examine(
        composed("check_data", ["data=folder", CLASSES, f"data.root={root}"]), [], tmp_path / "o"
    )
    reported = f"{count} images and no folders for splits: by a hash of their names"
    assert f"{reported} {max(1, round(count * 0.2))} are val" in capsys.readouterr().out


def test_R17_the_lists_that_the_check_writes_freeze_the_division(tmp_path, capsys, monkeypatch):
    root = plant(tmp_path / "data", splits=((".", 10),))
    output = tmp_path / "a check's folder"
    settings = ["data=folder", CLASSES, f"data.root={root}"]
    call("check_data", *settings, f"output={output}")
    reported = capsys.readouterr().out
    (setting,) = shlex.split(reported.partition("when images are added: ")[2].splitlines()[0])
    small = [s for s in TINY if not s.startswith(("data.size", "data.lengths", "data.cue"))]
    found = []
    for extra in (0, 5):
        for i in range(extra):
            for kind, array in (("images", COLOR), ("masks", np.full(SIZE, i, np.uint8))):
                Image.fromarray(array).save(root / kind / f"late_{i}.png")
        run = tmp_path / f"run{extra}"
        call(
            *("train", *settings, setting, *small, "data.crop=[32,32]", "debug=one_step"),
            f"run.dir={run}",
        )
        saved = torch.load(run / "last.pt", weights_only=True)
        found.append((saved["training_set"], saved["validation_set"]))
    assert found[0] == found[1]
    assert ", 8 samples" in found[0][0]
    assert ", 2 samples" in found[0][1]
