"""Cityscapes is read as it is published."""

import numpy as np
import pytest
from conftest import save_picture
from PIL import Image

from danet.datasets.cityscapes import Cityscapes
from danet.errors import InputError
from danet.types import IGNORE

NAMES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}  # fmt: skip
"""The 19 evaluated labels by id, written down from the publication."""

SIZE = (24, 40)
IMAGES = {
    "train": ("aachen_000000_000019", "aachen_000001_000019", "bochum_000000_000313"),
    "val": ("frankfurt_000000_000294", "frankfurt_000001_005898", "lindau_000002_000019"),
    "test": ("berlin_000000_000019", "bonn_000003_000019"),
    "train_extra": ("augsburg_000000_000000",),
}
TRUTHS = {"test": ("gtFine",), "train_extra": ("gtCoarse",)}


def truth_of(rng):
    """Draws blocks of label ids, and instance ids with single things and groups of things."""
    blocks = rng.integers(0, 34, (6, 10), dtype=np.uint8)
    blocks[rng.random(blocks.shape) < 0.5] = rng.choice((24, 26, 33))
    labels = np.kron(blocks, np.ones((4, 4), np.uint8))
    instances = labels.astype(np.uint16)
    single = np.kron(rng.random(blocks.shape) < 0.7, np.ones((4, 4))) > 0
    number = np.kron(rng.integers(0, 4, blocks.shape), np.ones((4, 4), np.int64))
    has_instances = (labels >= 24) & single
    instances[has_instances] = (labels.astype(np.int64) * 1000 + number)[has_instances]
    return labels, instances


def write_image(root, split, name, truths=("gtFine",), seed=0):
    rng = np.random.default_rng(seed)
    place = f"{split}/{name.split('_')[0]}/{name}"
    image = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    save_picture(root / f"leftImg8bit/{place}_leftImg8bit.png", image)
    for truth in truths:
        labels, instances = truth_of(rng)
        if split == "test":
            labels[:], instances[:] = 1, 1
        save_picture(root / truth / f"{place}_{truth}_labelIds.png", labels)
        save_picture(root / truth / f"{place}_{truth}_instanceIds.png", instances)
        (root / truth / f"{place}_{truth}_polygons.json").write_text("{}")
        save_picture(root / truth / f"{place}_{truth}_color.png", np.zeros((*SIZE, 4), np.uint8))


def write_tree(root):
    """Makes a replica with all four kinds of files, dummies for test, and coarse labels."""
    every = [(split, name) for split, names in IMAGES.items() for name in names]
    for seed, (split, name) in enumerate(every):
        write_image(root, split, name, TRUTHS.get(split, ("gtFine", "gtCoarse")), seed=seed)
    return root


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "cityscapes")


def test_each_split_has_its_images_in_order(tree):
    for split, names in {**IMAGES, "trainval": sorted(IMAGES["train"] + IMAGES["val"])}.items():
        dataset = Cityscapes(root=tree, split=split)
        assert [item.name for item in dataset.items] == list(names)
        assert dataset.is_labelled == (split != "test"), "its labels are dummies"
    assert (Cityscapes(root=tree, split="test").read(0)[1] == IGNORE).all()


@pytest.mark.bad_input("F12")
def test_label_ids_become_the_19_classes_of_the_publication_and_all_else_is_ignored(tree):
    path = tree / "gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png"
    every_id = np.resize(np.arange(34, dtype=np.uint8), SIZE)
    save_picture(path, every_id)
    dataset = Cityscapes(root=tree, split="val")
    assert "files of train ids are not needed" in dataset.notes[0]
    _, mask, name = dataset.read(0)
    assert name == "frankfurt_000000_000294"
    assert dataset.classes == tuple(NAMES.values())
    order = list(NAMES)
    expected = [order.index(i) if i in NAMES else IGNORE for i in every_id.flat]
    assert mask.ravel().tolist() == expected
    assert dataset.palette[0] == (128, 64, 128)
    assert dataset.palette[18] == (119, 11, 32)


def test_train_ids_give_the_masks_of_the_label_ids(tree):
    plain = Cityscapes(root=tree, split="train")
    table = np.full(256, 255, np.uint8)
    table[list(NAMES)] = range(19)
    for path in tree.glob("gtFine/train/*/*_labelIds.png"):
        target = path.with_name(path.name.replace("labelIds", "labelTrainIds"))
        save_picture(target, table[np.array(Image.open(path))])
    by_train_ids = Cityscapes(root=tree, split="train", labels="train_ids")
    assert by_train_ids.items[0].mask.endswith("_gtFine_labelTrainIds.png")
    for i in range(3):
        np.testing.assert_array_equal(by_train_ids.read(i)[1], plain.read(i)[1])


@pytest.mark.parametrize(
    ("labels", "kind", "value"), [("ids", "labelIds", 255), ("train_ids", "labelTrainIds", 33)]
)
def test_files_of_the_other_kind_are_refused_with_the_option_that_reads_them(
    tree, labels, kind, value
):
    for path in tree.glob("gtFine/val/*/*_labelIds.png"):
        mask = np.zeros(SIZE, np.uint8)
        mask[2, 3] = value
        save_picture(path.with_name(path.name.replace("labelIds", kind)), mask)
    says = f"label value {value} on 1 pixels, first at row 2, column 3.*data.labels says"
    with pytest.raises(InputError, match=rf"{kind}\.png: {says}"):
        Cityscapes(root=tree, split="val", labels=labels).read(0)


def test_coarse_labels_are_read_where_they_are_asked_for_or_all_there_is(tree):
    coarse = Cityscapes(root=tree, split="val", annotation="coarse")
    assert "/gtCoarse/val/" in coarse.items[0].mask
    assert (coarse.read(0)[1] != Cityscapes(root=tree, split="val").read(0)[1]).any()
    extra = Cityscapes(root=tree, split="train_extra").items[0].mask
    place = "gtCoarse/train_extra/augsburg/augsburg_000000_000000_gtCoarse_labelIds.png"
    assert extra == str(tree / place)


@pytest.mark.parametrize(
    ("root", "arguments", "message"),
    [
        (".", {"split": "validation"}, "split='validation' is not one of train, val, trainval"),
        (".", {"annotation": "rough"}, "data.annotation=rough: expected one of fine, coarse"),
        (".", {"labels": "color"}, "data.labels=color: expected one of ids, train_ids"),
        (".", {"labels": "train_ids"}, "3 of 3 images .*data.labels=ids gives the same classes"),
        ("leftImg8bit", {}, r"no images for split 'val'.*set data.root=\S+/cityscapes$"),
        ("..", {}, r"no images for split 'val'.*set data.root=\S+/cityscapes$"),
        ("gtFine/val", {}, r"no images.*set data.root=\S+/cityscapes$"),
    ],
)
def test_what_cannot_be_read_is_reported_with_the_remedy(tree, root, arguments, message):
    with pytest.raises(InputError, match=message):
        Cityscapes(root=(tree / root).resolve(), **{"split": "val", **arguments})
