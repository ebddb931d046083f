"""Cityscapes is read as it is published."""

import itertools

import numpy as np
import pytest
from PIL import Image
from test_config import compose

from danet.config.build import make_dataset
from danet.config.validate import check
from danet.datasets.cityscapes import Cityscapes
from danet.datasets.lists import shipped_list
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
    "train_extra": ("augsburg_000000_000000_",),
}


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
    city = name.split("_")[0]
    path = root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(path)
    for truth in truths:
        labels, instances = truth_of(rng)
        if split == "test":
            labels[:], instances[:] = 1, 1
        folder = root / truth / split / city
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(folder / f"{name}_{truth}_labelIds.png")
        Image.fromarray(instances).save(folder / f"{name}_{truth}_instanceIds.png")
        (folder / f"{name}_{truth}_polygons.json").write_text("{}")
        Image.new("RGBA", SIZE[::-1]).save(folder / f"{name}_{truth}_color.png")


def write_tree(root):
    """Makes a replica with all four kinds of files, dummies for test, and coarse labels."""
    seeds = itertools.count()
    for split, names in IMAGES.items():
        truths = {"test": ("gtFine",), "train_extra": ("gtCoarse",)}.get(split)
        for name in names:
            kinds = truths or ("gtFine", "gtCoarse")
            write_image(root, split, name.strip("_"), kinds, seed=next(seeds))
    return root


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "cityscapes")


def test_each_split_has_its_images_in_order(tree):
    for split in ("train", "val", "test"):
        assert [item.name for item in Cityscapes(root=tree, split=split).items] == list(
            IMAGES[split]
        )
    both = Cityscapes(root=tree, split="trainval")
    assert [item.name for item in both.items] == sorted(IMAGES["train"] + IMAGES["val"])


@pytest.mark.bad_input("F12")
def test_label_ids_become_the_19_classes_of_the_publication_and_all_else_is_ignored(tree):
    path = tree / "gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png"
    every_id = np.resize(np.arange(34, dtype=np.uint8), SIZE)
    Image.fromarray(every_id).save(path)
    dataset = Cityscapes(root=tree, split="val")
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
    assert "files of train ids are not needed" in plain.notes[0]
    by_ids = [plain.read(i)[1] for i in range(3)]
    table = np.full(256, 255, np.uint8)
    table[list(NAMES)] = range(19)
    for path in tree.glob("gtFine/train/*/*_labelIds.png"):
        target = path.with_name(path.name.replace("labelIds", "labelTrainIds"))
        Image.fromarray(table[np.array(Image.open(path))]).save(target)
    by_train_ids = Cityscapes(root=tree, split="train", labels="train_ids")
    assert by_train_ids.items[0].mask.endswith("_gtFine_labelTrainIds.png")
    for i, mask in enumerate(by_ids):
        np.testing.assert_array_equal(by_train_ids.read(i)[1], mask)


@pytest.mark.parametrize(
    ("labels", "kind", "value"), [("ids", "labelIds", 255), ("train_ids", "labelTrainIds", 33)]
)
def test_files_of_the_other_kind_are_refused_with_the_option_that_reads_them(
    tree, labels, kind, value
):
    for path in tree.glob("gtFine/val/*/*_labelIds.png"):
        mask = np.zeros(SIZE, np.uint8)
        mask[2, 3] = value
        Image.fromarray(mask).save(path.with_name(path.name.replace("labelIds", kind)))
    dataset = Cityscapes(root=tree, split="val", labels=labels)
    message = (
        rf"{kind}\.png: label value {value} on 1 pixels, first at row 2, column 3.*data.labels"
    )
    with pytest.raises(InputError, match=message):
        dataset.read(0)


def test_coarse_labels_are_read_where_they_are_asked_for_or_all_there_is(tree):
    coarse = Cityscapes(root=tree, split="val", annotation="coarse")
    assert "/gtCoarse/val/" in coarse.items[0].mask
    assert (coarse.read(0)[1] != Cityscapes(root=tree, split="val").read(0)[1]).any()
    extra = Cityscapes(root=tree, split="train_extra")
    assert extra.items[0].mask.endswith(
        "/gtCoarse/train_extra/augsburg/augsburg_000000_000000_gtCoarse_labelIds.png"
    )
    assert extra.is_labelled


def test_the_dummy_labels_of_test_are_not_read(tree):
    dataset = Cityscapes(root=tree, split="test")
    assert not dataset.is_labelled
    assert (dataset.read(0)[1] == IGNORE).all()


def test_a_tree_of_the_shipped_names_has_the_counts_of_the_publisher(tmp_path):
    cities = {"frankfurt": 267, "lindau": 59, "munster": 174}
    names = list(shipped_list("cityscapes", "val").lines)
    assert {city: sum(n.startswith(f"{city}/") for n in names) for city in cities} == cities
    for name in names:
        for part in ("leftImg8bit/val/{}_leftImg8bit", "gtFine/val/{}_gtFine_labelIds"):
            path = tmp_path / f"{part.format(name)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    dataset = Cityscapes(root=tmp_path, split="val")
    assert (len(dataset),) == Cityscapes.expected["val"]
    assert [item.name for item in dataset.items] == sorted(n.split("/")[1] for n in names)
    for split in ("train", "test"):
        assert len(shipped_list("cityscapes", split).lines) in Cityscapes.expected[split]


@pytest.mark.parametrize(
    ("root", "arguments", "message"),
    [
        (".", {"split": "validation"}, "split='validation' is not one of train, val, trainval"),
        (".", {"annotation": "rough"}, "data.annotation=rough: expected one of fine, coarse"),
        (".", {"labels": "color"}, "data.labels=color: expected one of ids, train_ids"),
        (".", {"labels": "train_ids"}, "3 of 3 images .*leave data.labels=ids"),
        ("leftImg8bit", {}, r"no images for split 'val'.*set data.root=\S+/cityscapes;"),
        ("..", {}, r"no images for split 'val'.*set data.root=\S+/cityscapes;"),
        ("gtFine/val", {}, r"no images.*set data.root=\S+/cityscapes;"),
    ],
)
def test_what_cannot_be_read_is_reported_with_the_remedy(tree, root, arguments, message):
    with pytest.raises(InputError, match=message):
        Cityscapes(root=(tree / root).resolve(), **{"split": "val", **arguments})


def test_missing_labels_are_reported_with_the_package_that_has_them(tree):
    for path in tree.glob("gtFine/val/*/*_labelIds.png"):
        path.unlink()
    with pytest.raises(InputError, match=r"3 of 3 images.*gtFine_trainvaltest\.zip"):
        Cityscapes(root=tree, split="val")
    write_image(tree, "val", IMAGES["val"][0])
    with pytest.raises(InputError, match="2 of 3 images of split 'val' have no label file"):
        Cityscapes(root=tree, split="val")


def test_the_config_makes_the_data_set(tree):
    settings = ["data=cityscapes", f"data.root={tree}", "data.annotation=coarse"]
    config = check(compose(*settings))
    dataset = make_dataset(config, config.data.val_split, training=False)
    assert dataset.annotation == "coarse"
    assert len(dataset) == 3
    with pytest.raises(InputError, match="annotation=rough: expected one of fine, coarse"):
        check(compose(*settings, "data.annotation=rough"))
