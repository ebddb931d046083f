"""COCO-Stuff: every id of both releases becomes the same class, and what is no id is named."""

import numpy as np
import pytest
import scipy.io
from conftest import SAMPLES
from PIL import Image

from danet.datasets.coco_stuff import CocoStuff10k, CocoStuff164k
from danet.datasets.formats.matlab import open_mat, read_mat_labels
from danet.datasets.labels import read_class_table
from danet.errors import InputError
from danet.types import IGNORE

REMOVED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
IDS = [i for i in range(1, 183) if i not in REMOVED]


@pytest.fixture
def samples():
    """Returns the folder of real pairs, or says why the test cannot run."""
    if not (SAMPLES / "cocostuff164k").is_dir():
        pytest.skip(f"real pairs of COCO-Stuff are not at {SAMPLES}; name it in SAMPLES")
    return SAMPLES


def write_mat(path, ids, names=182, **others):
    """Writes a label as version 1.1 has it: S, names, captions, superpixels and their labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = "unlabeled" if names == 172 else "person"
    cells = np.array([first, *(f"name {i}" for i in range(2, names + 1))], object)[:, None]
    fields = {
        "S": ids,
        "names": cells,
        "captions": np.array([["a street"], ["a road"]], object),
        "regionMapStuff": np.ones(ids.shape, np.uint16),
        "regionLabelsStuff": np.zeros((1, 1), np.uint8),
    }
    scipy.io.savemat(path, {**fields, **others}, do_compression=True)


def write_image(path, shape, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, shape[::-1]).save(path)


def tree_10k(root, labels, lists=True):
    """Makes a replica with one training picture per label and one test picture."""
    names = [f"COCO_train2014_{i:012d}" for i in range(len(labels) + 1)]
    for name, ids in zip(names, [*labels, np.zeros((4, 6), np.uint8)], strict=True):
        write_image(root / "images" / f"{name}.jpg", ids.shape)
        write_mat(root / "annotations" / f"{name}.mat", ids)
    if lists:
        (root / "imageLists").mkdir()
        (root / "imageLists" / "train.txt").write_text("\r\n".join(names[:-1]) + "\r\n")
        (root / "imageLists" / "test.txt").write_text(names[-1] + "\n")
    return root


def tree_164k(root, labels, suffix=".png", split="train2017"):
    for i, values in enumerate(labels):
        write_image(root / "images" / split / f"{i:012d}.jpg", values.shape)
        path = root / "annotations" / split / f"{i:012d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)
    return root


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64])
def test_every_id_of_the_10k_makes_the_round_trip(tmp_path, dtype):
    ids = np.array([0, *IDS], dtype).reshape(4, 43)
    dataset = CocoStuff10k(root=tree_10k(tmp_path, [ids]), split="train")
    _, mask, name = dataset.read(0)
    assert name == "COCO_train2014_000000000000"
    assert mask.dtype == np.uint8
    assert mask.ravel().tolist() == [IGNORE, *range(171)]
    back = np.array([*IDS, *[0] * 85])[np.where(mask == IGNORE, 171, mask)]
    np.testing.assert_array_equal(back, ids)


def test_every_id_of_the_164k_makes_the_round_trip(tmp_path):
    values = np.array([255, *(i - 1 for i in IDS)], np.uint8).reshape(4, 43)
    dataset = CocoStuff164k(root=tree_164k(tmp_path, [values]), split="train")
    _, mask, _ = dataset.read(0)
    assert mask.ravel().tolist() == [IGNORE, *range(171)]
    # uint8 wraps: 255 + 1 is 0, the unlabeled of the 10k.
    assert (np.array([*IDS, *[0] * 85])[mask.clip(max=171)] == values + np.uint8(1)).all()


def test_both_releases_agree_with_the_published_list_of_names():
    table = read_class_table("cocostuff171")
    assert list(table.label_map) == IDS
    assert [table.classes[i] for i in (0, 79, 80, 119, 170)] == [
        *("person", "toothbrush", "banner", "mat", "wood")
    ]
    assert len(set(table.palette)) == 171


def test_the_loaders_agree_on_real_pictures_in_both_forms(samples):
    small = {
        split: CocoStuff10k(root=samples / "cocostuff10k_derived", split=split)
        for split in ("train", "test")
    }
    large = {
        split: CocoStuff164k(root=samples / "cocostuff164k", split=split)
        for split in ("train", "val")
    }
    assert [len(d) for d in (*small.values(), *large.values())] == [3, 1, 13, 8]
    pngs = {d.items[i].name: d.read(i) for d in large.values() for i in range(len(d))}
    seen = set()
    for dataset in small.values():
        for i in range(len(dataset)):
            image, mask, name = dataset.read(i)
            other_image, other_mask, _ = pngs[name.removeprefix("COCO_train2014_")]
            np.testing.assert_array_equal(mask, other_mask)
            np.testing.assert_array_equal(image, other_image)
            seen |= set(np.unique(mask).tolist())
    assert len(seen) > 20


def test_the_train_ids_that_mmsegmentation_writes_are_an_option(tmp_path):
    values = np.array([255, *range(171)], np.uint8).reshape(4, 43)
    root = tree_164k(tmp_path, [values], suffix="_labelTrainIds.png", split="val2017")
    _, mask, name = CocoStuff164k(root=root, split="val", labels="train_ids").read(0)
    np.testing.assert_array_equal(mask, values)
    assert name == "000000000000"
    with pytest.raises(InputError, match="1 of 1 images of split 'val' have no label"):
        CocoStuff164k(root=root, split="val")
    with pytest.raises(InputError, match=r"data.labels=trainids: expected one of ids, train_ids"):
        CocoStuff164k(root=root, split="val", labels="trainids")


@pytest.mark.parametrize("id_", [*sorted(REMOVED), 183, 254])
def test_other_ids_are_refused_as_in_every_data_set(tmp_path, id_):
    ids = np.ones((3, 4), np.uint8)
    ids[2, 1:3] = id_
    says = "on 2 pixels, first at row 2, column 1; .* of the ids were removed"
    with pytest.raises(InputError, match=f"0000.mat: label value {id_} {says}"):
        CocoStuff10k(root=tree_10k(tmp_path / "10k", [ids]), split="train").read(0)
    with pytest.raises(InputError, match=f"0000.png: label value {id_ - 1} {says}"):
        CocoStuff164k(root=tree_164k(tmp_path / "164k", [ids - 1]), split="train").read(0)


def test_labels_of_version_1_0_are_refused(tmp_path):
    root = tree_10k(tmp_path, [np.ones((4, 6), np.uint8)])
    write_mat(root / "annotations" / "COCO_train2014_000000000000.mat", np.ones((4, 6)), names=172)
    with pytest.raises(InputError, match=r"10k version 1.0, whose 172 names .* cocostuff-10k-v1.1"):
        CocoStuff10k(root=root, split="train").read(0)


def test_the_shipped_lists_stand_in_for_missing_ones(tmp_path):
    root = tree_10k(tmp_path, [np.ones((4, 6), np.uint8)], lists=False)
    with pytest.raises(InputError, match=r"cocostuff10k/test.txt: line 1 .*\(1000 of 1000 names"):
        CocoStuff10k(root=root, split="test")


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html><html>" * 20), "begins with b'<!DOCTYPE"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "0.mat: "),
        (lambda path: path.write_bytes(b"M" * 124 + b"\0\2IM" + b"\0" * 400), "version 7.3"),
        (
            lambda path: write_mat(path, np.full((4, 6), 1.5)),
            ", S: .* this is float64",
        ),
        (
            lambda path: write_mat(path, np.full((4, 6), np.nan)),
            "whole .* with nan",
        ),
        (
            lambda path: write_mat(path, np.full((4, 6), -1)),
            "whole .* with -1..-1",
        ),
        (
            lambda path: write_mat(path, np.ones((4, 6, 2))),
            r"this is float64 \(4, 6, 2\)",
        ),
        (lambda path: scipy.io.savemat(path, {"T": np.ones(3)}), "no variable S .* it holds T"),
    ],
    ids=["empty", "page", "cut", "7.3", "half", "nan", "negative", "3-d", "other"],
)
def test_a_mat_file_that_is_no_label_is_refused_in_one_line(tmp_path, write, says):
    root = tree_10k(tmp_path, [np.ones((4, 6), np.uint8)])
    path = root / "annotations" / "COCO_train2014_000000000000.mat"
    write(path)
    with pytest.raises(InputError, match=f"^{tmp_path}.*{says}") as caught:
        CocoStuff10k(root=root, split="train").read(0)
    assert "\n" not in str(caught.value)


def test_a_damaged_mat_file_never_raises_anything_else(tmp_path):
    path = tmp_path / "label.mat"
    write_mat(path, np.random.default_rng(0).integers(0, 183, (40, 50), dtype=np.uint8))
    whole, rng, refused = path.read_bytes(), np.random.default_rng(1), 0
    for _ in range(150):
        damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for _ in range(rng.integers(0, 4)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            labels = read_mat_labels(open_mat(path), "S")
            assert labels.ndim == 2
        except InputError:
            refused += 1
    assert refused > 50
