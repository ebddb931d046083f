"""PASCAL Context: three forms of labels give the same classes; run lengths are COCO's."""

import itertools
import json

import numpy as np
import pytest
import scipy.io
from conftest import save_picture

from danet.datasets.base import Reading
from danet.datasets.formats.pascal_in_detail import DetailIndex
from danet.datasets.formats.run_lengths import mask_of_runs
from danet.datasets.labels import read_class_table
from danet.datasets.pascal_context import PascalContext, PascalContext60
from danet.errors import InputError
from danet.types import IGNORE

IDS = sorted(read_class_table("context60")["values"])
"""0 and the 59 ids of the original 459, ascending."""
NAMES = {"train": ("2008_000008", "2008_000015"), "val": ("2008_000002", "2010_006086")}
EVERY = [*NAMES["train"], *NAMES["val"]]
CLASSES = np.random.default_rng(0).integers(0, 60, (4, 30, 40))
"""Labels of the four pictures as 0..59."""


def runs_of(mask):
    """The definition: lengths of equal values down the columns, zeros first."""
    lengths, value = [], False
    for now, group in itertools.groupby(mask.T.ravel().tolist()):
        if now != value:
            lengths.append(0)
            value = now
        lengths.append(len(list(group)))
        value = not value
    return lengths


def text_of(runs):
    """COCO's text, one character after another."""
    text = ""
    for i, run in enumerate(runs):
        x = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            c = x & 31
            x >>= 5
            more = x != -1 if c & 16 else x != 0
            text += chr((c | 32 if more else c) + 48)
    return text


def write_json(path, classes=CLASSES):
    """Writes the keys that matter, others between them, annotations of pictures interleaved."""
    images, annotations = [], []
    for number, (phase, name) in enumerate((p, n) for p in NAMES for n in NAMES[p]):
        image_id, size = int(name.replace("_", "")), {"height": 30, "width": 40}
        images.append({"file_name": f"{name}.jpg", "phase": phase, **size, "image_id": image_id})
        for index in np.unique(classes[number]):
            counts = text_of(runs_of(classes[number] == index))
            annotation = {"image_id": image_id, "category_id": IDS[index]}
            annotation["segmentation"] = {"counts": counts}
            annotation["parts"] = [{"part_id": 1, "segmentation": {"counts": "1"}}]
            annotations.append(annotation)
    content = {
        "info": {"version": "4.0"},
        "images": images,
        "annos_occlusion": [{"image_id": 1, "counts": [1, 2]}],
        "annos_segmentation": annotations[::2] + annotations[1::2],
        "categories": [],
    }
    path.write_text(json.dumps(content, indent=1))


def write_tree(root, form):
    """Makes VOC 2010 with the lists of ImageSets/Main and one form of labels."""
    for folder in ("ImageSets/Main", "ImageSets/Segmentation", "trainval"):
        (root / folder).mkdir(parents=True)
    for split, names in NAMES.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(names[0])
    for name, classes in zip(EVERY, CLASSES, strict=True):
        save_picture(root / f"JPEGImages/{name}.jpg", np.zeros((30, 40, 3), np.uint8))
        if form == "png":
            save_picture(root / f"SegmentationClassContext/{name}.png", classes.astype(np.uint8))
        elif form == "mat":
            ids = {"LabelMap": np.array(IDS)[classes].astype(np.uint16)}
            scipy.io.savemat(root / f"trainval/{name}.mat", ids, do_compression=True)
    if form != "mat":
        (root / "trainval").rmdir()
    if form == "json":
        write_json(root / "trainval_merged.json")
    return root


# The three forms


@pytest.mark.parametrize("above", ["", "VOC2010", "VOCdevkit/VOC2010"])
@pytest.mark.parametrize("form", ["mat", "png", "json"])
def test_the_three_forms_give_the_same_classes_from_any_root(tmp_path, form, above):
    write_tree(tmp_path / above, form)
    for offset, split in ((0, "train"), (2, "val")):
        with_background = PascalContext60(root=tmp_path, split=split)
        without = PascalContext(root=tmp_path, split=split, labels=form)
        assert [item.name for item in without.items] == list(NAMES[split])
        for i in range(2):
            np.testing.assert_array_equal(with_background.read(i)[1], CLASSES[offset + i])
            shifted = np.where(CLASSES[offset + i] == 0, IGNORE, CLASSES[offset + i] - 1)
            np.testing.assert_array_equal(without.read(i)[1], shifted)
        assert without.notes == []
        assert with_background.labels == form
        assert f"data.labels=auto takes {form}, {tmp_path}" in with_background.notes[0]


def test_every_one_of_the_459_ids_has_its_class_and_others_are_refused(tmp_path):
    write_tree(tmp_path, "mat")
    path = tmp_path / "trainval" / "2008_000008.mat"
    ids = np.arange(460, dtype=np.uint16)[None]
    scipy.io.savemat(path, {"LabelMap": ids})
    save_picture(tmp_path / "JPEGImages/2008_000008.jpg", np.zeros((1, 460, 3), np.uint8))
    mask = PascalContext60(root=tmp_path, split="train").read(0)[1][0].tolist()
    assert {i: c for i, c in enumerate(mask) if c} == {i: c for c, i in enumerate(IDS) if c}
    mask = PascalContext(root=tmp_path, split="train").read(0)[1][0]
    assert [i for i, c in enumerate(mask.tolist()) if c != IGNORE] == IDS[1:]
    scipy.io.savemat(path, {"LabelMap": ids + 1})
    with pytest.raises(InputError, match=r"2008_000008.mat: label value 460 on 1 pixels"):
        PascalContext(root=tmp_path, split="train").read(0)
    limited = PascalContext(root=tmp_path, split="train", reading=Reading(max_pixels=459))
    with pytest.raises(InputError, match=r"data.max_pixels=459"):
        limited.labels_of(limited.items[0])


def test_classes_are_in_the_order_of_the_released_code():
    assert PascalContext60.classes == ("background", *PascalContext.classes)
    assert PascalContext60.palette[1:] == PascalContext.palette
    assert len(set(PascalContext60.palette)) == 60
    assert list(PascalContext.classes) == sorted(PascalContext.classes)
    assert [PascalContext.classes[i] for i in (0, 3, 49, 58)] == [
        *("aeroplane", "bedclothes", "table", "wood")
    ]


def test_auto_takes_the_original_and_says_what_it_left(tmp_path):
    base = write_tree(tmp_path / "VOCdevkit" / "VOC2010", "mat")
    (base / "trainval").rename(tmp_path / "trainval")  # beside the development kit
    write_json(base / "trainval_merged.json")
    dataset = PascalContext(root=tmp_path, split="val")
    assert dataset.notes == [
        f"PascalContext: data.labels=auto takes mat, {tmp_path / 'trainval'}; not used: json"
    ]
    assert PascalContext(root=tmp_path, split="val", labels="json").labels == "json"
    with pytest.raises(
        InputError, match=r"data.labels=png, but there are no labels at .*ClassCont"
    ):
        PascalContext(root=tmp_path, split="val", labels="png")
    with pytest.raises(InputError, match=r"data.labels=xml: expected one of auto, mat, png, json"):
        PascalContext(root=tmp_path, split="val", labels="xml")


@pytest.mark.parametrize(
    ("form", "place"),
    [
        ("mat", r"train.txt, line 2: there is no .*2008_000015 \(1 of 2 names"),
        ("json", r"json: there is no .*2008_000015 \(1 of 2 names"),
        ("shipped list", r"pascal_context/train.txt, line \d+.*\(4997 of 4998"),
    ],
)
def test_a_picture_that_a_list_names_must_be_there(tmp_path, form, place):
    write_tree(tmp_path, form if form == "json" else "mat")
    (tmp_path / "JPEGImages" / "2008_000015.jpg").unlink()
    if form == "shipped list":
        (tmp_path / "ImageSets" / "Main" / "train.txt").unlink()
    with pytest.raises(InputError, match=place):
        PascalContext(root=tmp_path, split="train")


# Run lengths


@pytest.mark.parametrize("density", [0, 0.02, 0.5, 0.98, 1])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 91), (500, 3)], ids=str)
def test_runs_become_the_mask_they_were_made_from(shape, density):
    rng = np.random.default_rng(1)
    for blocks in (1, 4):  # noise, and areas whose runs need several characters
        mask = np.kron(rng.random(shape) < density, np.ones((blocks, blocks), bool))
        runs = runs_of(mask)
        for counts in (runs, text_of(runs)):
            np.testing.assert_array_equal(mask_of_runs(counts, mask.size), mask.T.ravel())


def test_the_text_of_the_coco_api_is_understood():
    """Stored from pycocotools 2.0.11: a ring in a picture of 40 x 50."""
    mask = np.zeros((40, 50), bool)
    mask[3:36, 5:45] = True
    mask[10:20, 10:30] = False
    text = "[6Q1700000000VO39M" + "G39M" * 19 + "a" + "0" * 29 + "U6"
    np.testing.assert_array_equal(mask_of_runs(text, mask.size), mask.T.ravel())
    assert text_of(runs_of(mask)) == text


@pytest.mark.parametrize("counts", ["\x01", "a", "o" * 12 + "0", "é", "/", [5, 4], [12, -2]])
def test_counts_that_nobody_writes_are_refused(counts):
    with pytest.raises(ValueError, match=r"run-length|cover .*the picture has 10"):
        mask_of_runs(counts, 10)


# The JSON


def test_an_index_equals_painting_one_annotation_after_another(tmp_path):
    path = tmp_path / "trainval_merged.json"
    write_json(path)
    content = json.loads(path.read_text())
    for category, runs in ((2, [0, 600, 600]), (9, [300, 600, 300])):  # over the first picture
        annotation = {"image_id": 2008000008, "category_id": category}
        content["annos_segmentation"].append({**annotation, "segmentation": {"counts": runs}})
    path.write_text(json.dumps(content))
    index = DetailIndex(path)
    assert index.phases == {phase: list(names) for phase, names in NAMES.items()}
    for name, classes in zip(EVERY, CLASSES, strict=True):
        expected = np.array(IDS)[classes].T.ravel()
        if name == EVERY[0]:
            expected[:300], expected[300:900] = 2, 9
        labels = index.labels(name)
        assert labels.dtype == np.uint16
        np.testing.assert_array_equal(labels.T.ravel(), expected)


def test_the_file_is_read_once_for_both_splits_and_again_when_it_changes(tmp_path):
    root = write_tree(tmp_path, "json")
    train = PascalContext(root=root, split="train")
    assert train.index is PascalContext(root=root, split="val").index
    write_json(root / "trainval_merged.json", CLASSES[::-1])
    assert PascalContext(root=root, split="train").index is not train.index


def test_a_cache_keeps_the_pictures_of_one_json_apart(tmp_path):
    root = write_tree(tmp_path / "data", "json")
    reading = Reading(cache="disk", cache_dir=str(tmp_path / "cache"))
    for _ in range(2):
        for offset, split in ((0, "train"), (2, "val")):
            dataset = PascalContext60(root=root, split=split, reading=reading)
            for i in range(2):
                np.testing.assert_array_equal(dataset.read(i)[1], CLASSES[offset + i])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[: len(text) // 2], "not the JSON of PASCAL in Detail"),
        (lambda text: "[" + text + "]", "not the JSON of PASCAL in Detail"),
        (lambda text: "", "Expecting value"),
        (lambda text: text.replace("annos_segmentation", "annotations"), "no key 'annos_segmen"),
        (lambda text: text.replace("category_id", "class"), "no key 'category_id'"),
        (lambda text: text.replace("2008_000015", "2008_000008"), "one image_id or file_name"),
    ],
    ids=["cut", "list", "empty", "coco", "key", "twice"],
)
def test_another_json_is_refused_in_one_line(tmp_path, change, says):
    path = write_tree(tmp_path, "json") / "trainval_merged.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=f"trainval_merged.json: .*{says}") as caught:
        PascalContext(root=tmp_path, split="train")
    assert "\n" not in str(caught.value)


def test_runs_of_another_size_or_of_too_many_pixels_are_refused(tmp_path):
    path = write_tree(tmp_path, "json") / "trainval_merged.json"
    path.write_text(path.read_text().replace('"height": 30', '"height": 31'))
    train = PascalContext(root=tmp_path, split="train")
    with pytest.raises(InputError, match=r"2008_000008: the runs cover 1200 pixels, .* 1240"):
        train.labels_of(train.items[0])
    train.reading = Reading(max_pixels=1000)
    with pytest.raises(InputError, match=r"31 x 40 pixels, more than data.max_pixels=1000"):
        train.labels_of(train.items[0])
