"""COCO-Stuff: every id of both releases becomes the same class, and what is no id is named."""

import numpy as np
import pytest
import scipy.io
from conftest import save_picture

from danet.datasets.coco_stuff import CocoStuff10k, CocoStuff164k
from danet.datasets.formats.matlab import read_mat_labels
from danet.errors import InputError
from danet.types import IGNORE

REMOVED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
IDS = [i for i in range(1, 183) if i not in REMOVED]
STEM = "COCO_train2014_000000000000"
ONES = np.ones((4, 6), np.uint8)


def write_mat(path, ids, names=182):
    """Writes a label as version 1.1 has it: S, names, captions, superpixels and their labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "S": ids,
        "names": np.array([f"name {i}" for i in range(names)], object)[:, None],
        "captions": np.array([["a street"], ["a road"]], object),
        "regionMapStuff": np.ones(ids.shape, np.uint16),
        "regionLabelsStuff": np.zeros((1, 1), np.uint8),
    }
    scipy.io.savemat(path, content, do_compression=True)


def small(root, ids, split="train"):
    """Makes a replica of the 10k with one picture, which the list of a split names."""
    save_picture(root / f"images/{STEM}.jpg", np.zeros((*ids.shape, 3), np.uint8))
    write_mat(root / f"annotations/{STEM}.mat", ids)
    (root / "imageLists").mkdir(exist_ok=True)
    (root / f"imageLists/{split}.txt").write_text(f"{STEM}\r\n")
    return CocoStuff10k(root=root, split=split)


def large(root, values, suffix=".png", **settings):
    """Makes a replica of the 164k with one picture."""
    save_picture(root / "images/val2017/000000000000.jpg", np.zeros((*values.shape, 3), np.uint8))
    save_picture(root / f"annotations/val2017/000000000000{suffix}", values)
    return CocoStuff164k(root=root, split="val", **settings)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64])
def test_every_id_becomes_its_class(tmp_path, dtype):
    _, mask, name = small(tmp_path / "10k", np.array([0, *IDS], dtype).reshape(4, 43)).read(0)
    assert name == STEM
    assert mask.dtype == np.uint8
    values = np.array([255, *(i - 1 for i in IDS)], np.uint8).reshape(4, 43)
    assert mask.ravel().tolist() == [IGNORE, *range(171)]
    np.testing.assert_array_equal(large(tmp_path / "164k", values).read(0)[1], mask)


def test_both_releases_have_the_published_list_of_names():
    for kind in (CocoStuff10k, CocoStuff164k):
        assert [kind.classes[i] for i in (0, 79, 80, 119, 170)] == [
            *("person", "toothbrush", "banner", "mat", "wood")
        ]
        assert len(set(kind.palette)) == len(kind.classes) == 171


def test_the_loaders_agree_on_real_pictures_in_both_forms(samples):
    two = [CocoStuff10k(root=samples / "cocostuff10k_derived", split=s) for s in ("train", "test")]
    other = [CocoStuff164k(root=samples / "cocostuff164k", split=s) for s in ("train", "val")]
    assert [len(d) for d in (*two, *other)] == [3, 1, 13, 8]
    pngs = {d.items[i].name: d.read(i) for d in other for i in range(len(d))}
    seen = set()
    for image, mask, name in (dataset.read(i) for dataset in two for i in range(len(dataset))):
        other_image, other_mask, _ = pngs[name.removeprefix("COCO_train2014_")]
        np.testing.assert_array_equal(mask, other_mask)
        np.testing.assert_array_equal(image, other_image)
        seen |= set(np.unique(mask).tolist())
    assert len(seen) > 20


def test_the_train_ids_that_mmsegmentation_writes_are_an_option(tmp_path):
    values = np.array([255, *range(171)], np.uint8).reshape(4, 43)
    dataset = large(tmp_path, values, "_labelTrainIds.png", labels="train_ids")
    np.testing.assert_array_equal(dataset.read(0)[1], values)
    with pytest.raises(InputError, match="1 of 1 images of split 'val' have no label"):
        CocoStuff164k(root=tmp_path, split="val")
    with pytest.raises(InputError, match=r"data.labels=trainids: expected one of ids, train_ids"):
        CocoStuff164k(root=tmp_path, split="val", labels="trainids")


@pytest.mark.parametrize("id_", [*sorted(REMOVED), 183, 254])
def test_other_ids_are_refused_as_in_every_data_set(tmp_path, id_):
    ids = np.ones((3, 4), np.uint8)
    ids[2, 1:3] = id_
    says = "on 2 pixels, first at row 2, column 1; .* of the ids were removed"
    with pytest.raises(InputError, match=f"0000.mat: label value {id_} {says}"):
        small(tmp_path / "10k", ids).read(0)
    with pytest.raises(InputError, match=f"0000.png: label value {id_ - 1} {says}"):
        large(tmp_path / "164k", ids - 1).read(0)


def test_the_shipped_lists_stand_in_for_missing_ones(tmp_path):
    small(tmp_path, ONES)
    with pytest.raises(InputError, match=r"cocostuff10k/test.txt, line 1: .*\(1000 of 1000 names"):
        CocoStuff10k(root=tmp_path, split="test")


BROKEN = {
    "empty": (lambda path: path.write_bytes(b""), "the file begins with b''"),
    "page": (lambda path: path.write_bytes(b"<!DOCTYPE html><html>" * 20), "begins with b'<!DOCT"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-40]), "0.mat: "),
    "7.3": (lambda path: path.write_bytes(b"M" * 124 + b"\0\2IM" + b"\0" * 400), "version 7.3"),
    "1.0": (lambda path: write_mat(path, ONES, 172), "172 names .* take cocostuff-10k-v1.1.zip"),
    "half": (lambda path: write_mat(path, ONES * 1.5), ", S: .* this is float64"),
    "nan": (lambda path: write_mat(path, ONES * np.nan), "whole .* with nan"),
    "negative": (lambda path: write_mat(path, ONES * -1.0), "whole .* with -1.0..-1"),
    "3-d": (lambda path: write_mat(path, np.ones((4, 6, 2))), r"this is float64 \(4, 6, 2\)"),
    "no field": (lambda path: scipy.io.savemat(path, {"S": {"T": 1}}), "S: a label must be an arr"),
    "other": (lambda path: scipy.io.savemat(path, {"T": np.ones(3)}), "S cannot be read .*'S'"),
}
"""How a label is written that is refused, and what is said."""


@pytest.mark.parametrize("kind", BROKEN)
def test_a_mat_file_that_is_no_label_is_refused_in_one_line(tmp_path, kind):
    dataset, (write, says) = small(tmp_path, ONES), BROKEN[kind]
    write(tmp_path / f"annotations/{STEM}.mat")
    with pytest.raises(InputError, match=f"^{tmp_path}.*{says}") as caught:
        dataset.read(0)
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
            assert read_mat_labels(path, "S")[0].ndim == 2
        except InputError:
            refused += 1
    assert refused > 50
