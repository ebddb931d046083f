"""PASCAL VOC 2012 and SBD are read in all layouts they come in."""

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from conftest import save_picture
from PIL import Image

from danet.data_check.overlap import refuse_overlap
from danet.datasets.formats.matlab import read_mat_labels
from danet.datasets.lists import find_list
from danet.datasets.pascal_voc import PascalVOC
from danet.errors import InputError
from danet.types import IGNORE

NAMES = [
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
]


def shipped(split):
    return [name for name, _ in find_list([], "voc2012", split).names]


SIZE = (10, 12)
TRAIN, VAL, TEST = shipped("train")[:3], shipped("val")[:2], shipped("test")[:2]
EXTRA = [name for name in shipped("trainaug") if name.startswith("2010")][:4]
SETS = {"train": TRAIN, "val": VAL, "trainval": sorted(TRAIN + VAL)}


def mask_of(name):
    rng = np.random.default_rng(int(name.replace("_", "")))
    mask = rng.integers(0, 21, SIZE, dtype=np.uint8)
    mask[0] = np.resize(np.arange(21), SIZE[1])
    return mask


def with_border(name):
    mask = mask_of(name)
    mask[:, 0] = 255
    return mask


def save_image(path):
    save_picture(path, np.full((*SIZE, 3), 30, np.uint8))


def save_sbd(path, mask):
    """Writes a file of SBD's cls/ with all that stands in one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    boundaries = np.empty((20, 1), object)
    for i in range(20):
        boundaries[i, 0] = scipy.sparse.csc_matrix((mask == i + 1).astype(float))
    present = np.unique(mask[mask > 0]).reshape(-1, 1)
    content = {"Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": present}
    scipy.io.savemat(path, {"GTcls": content}, do_compression=True)


def write_sbd(sbd, names=EXTRA):
    for name in names:
        save_sbd(sbd / "dataset" / "cls" / f"{name}.mat", mask_of(name))


@pytest.fixture
def tree(tmp_path):
    """Makes VOC as the development kit unpacks it, with some images of SBD, which are VOC's."""
    voc = tmp_path / "data/VOCdevkit/VOC2012"
    for name in TRAIN + VAL + EXTRA + TEST:
        save_image(voc / "JPEGImages" / f"{name}.jpg")
    for name in TRAIN + VAL:
        picture = Image.fromarray(with_border(name))
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
        path = voc / "SegmentationClass" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
    lists = voc / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, names in {**SETS, "test": TEST, "trainaug": TRAIN + EXTRA}.items():
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
    return tmp_path / "data"


# VOC


@pytest.mark.parametrize("place", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_the_root_may_be_one_of_three_folders(tree, place):
    for split, names in SETS.items():
        dataset = PascalVOC(root=tree / place, split=split)
        assert [item.name for item in dataset.items] == sorted(names)
        for i, item in enumerate(dataset.items):
            image, mask, name = dataset.read(i)
            assert image.shape == (*SIZE, 3)
            np.testing.assert_array_equal(mask, with_border(name))
            assert item.image.endswith(f"JPEGImages/{name}.jpg")
    assert not PascalVOC(root=tree / place, split="test").is_labelled


@pytest.mark.parametrize("place", ["..", "VOCdevkit/VOC2012/JPEGImages"])
def test_another_root_is_refused_with_the_folder_that_is_meant(tree, place):
    with pytest.raises(InputError, match=r"no images for split .*set data\.root=\S+") as e:
        PascalVOC(root=(tree / place).resolve(), split="val")
    named = str(e.value).split("set data.root=")[1].split(";")[0]
    assert len(PascalVOC(root=named, split="val")) == 2


def test_indices_of_palette_images_are_the_classes_in_order(tree):
    dataset = PascalVOC(root=tree, split="val")
    assert list(dataset.classes) == NAMES
    assert dataset.palette[15] == (192, 128, 128)
    assert dataset.palette[20] == (0, 64, 128)
    mask = dataset.read(0)[1]
    assert mask[0, 1:].tolist() == list(range(1, 12))
    assert (mask[:, 0] == IGNORE).all()


def test_a_tree_without_lists_takes_those_of_the_package(tree):
    voc = tree / "VOCdevkit/VOC2012"
    for path in (voc / "ImageSets/Segmentation").iterdir():
        path.unlink()
    message = r"voc2012/val\.txt, line 3: there is no image \S+JPEGImages\S+ \(1447 of 1449"
    with pytest.raises(InputError, match=message):
        PascalVOC(root=tree, split="val")
    for name in shipped("seg11valid"):
        (voc / "JPEGImages" / f"{name}.jpg").touch()
        (voc / "SegmentationClass" / f"{name}.png").touch()
    assert len(PascalVOC(root=tree, split="seg11valid")) == 736


# trainaug


@pytest.mark.parametrize(
    ("place", "sbd_root"),
    [
        ("benchmark_RELEASE", None),
        ("sbd", None),
        ("sbd/benchmark_RELEASE", None),
        ("elsewhere", "elsewhere"),
        ("elsewhere", "elsewhere/dataset"),
        ("../away/benchmark_RELEASE", "../away"),
    ],
)
def test_trainaug_takes_the_masks_of_sbd(tree, place, sbd_root):
    write_sbd(tree / place)
    dataset = PascalVOC(root=tree, split="trainaug", sbd_root=sbd_root)
    assert [item.name for item in dataset.items] == sorted(TRAIN + EXTRA)
    for i, item in enumerate(dataset.items):
        expected = mask_of(item.name) if item.name in EXTRA else with_border(item.name)
        np.testing.assert_array_equal(dataset.read(i)[1], expected)


def test_trainaug_prefers_masks_of_voc_then_pngs_then_sbd(tree):
    write_sbd(tree / "benchmark_RELEASE", TRAIN + EXTRA)
    for name in TRAIN + EXTRA[:2]:
        place = f"VOCdevkit/VOC2012/SegmentationClassAug/{name}.png"
        save_picture(tree / place, np.full(SIZE, 3, np.uint8))
    dataset = PascalVOC(root=tree, split="trainaug")
    assert {item.name: item.mask.split("/")[-2] for item in dataset.items} == {
        **dict.fromkeys(TRAIN, "SegmentationClass"),
        **dict.fromkeys(EXTRA[:2], "SegmentationClassAug"),
        **dict.fromkeys(EXTRA[2:], "cls"),
    }


def test_images_of_sbd_serve_where_voc_has_none(tree):
    write_sbd(tree / "sbd")
    for name in EXTRA:
        (tree / "VOCdevkit/VOC2012/JPEGImages" / f"{name}.jpg").unlink()
        save_image(tree / "sbd/dataset/img" / f"{name}.JPG")
    dataset = PascalVOC(root=tree, split="trainaug")
    assert {item.image.split("/")[-2] for item in dataset.items} == {"JPEGImages", "img"}


@pytest.mark.bad_input("F13")
@pytest.mark.parametrize("count", [1, 4])
def test_trainaug_without_its_masks_names_them_and_the_split_that_works(tree, count):
    write_sbd(tree / "sbd", EXTRA[count:])
    message = (
        rf"{count} of 7 images of split 'trainaug' have no label file: {EXTRA[0]}.*"
        rf"SegmentationClass/{EXTRA[0]}\.png, in SegmentationClassAug, .*/cls; .*data\.sbd_root.*"
        "the split 'train' needs none"
    )
    with pytest.raises(InputError, match=message):
        PascalVOC(root=tree, split="trainaug")


def test_a_folder_of_sbd_that_holds_none_is_refused(tree):
    with pytest.raises(InputError, match=r"data\.sbd_root=\S+/nowhere: no folder cls"):
        PascalVOC(root=tree, split="trainaug", sbd_root="nowhere")


# Real files


def test_real_files_are_read(samples):
    for split, name in (("train", "2007_000129"), ("val", "2007_000033")):
        dataset = PascalVOC(root=samples / "voc2012", split=split)
        image, mask, found = dataset.read(0)
        assert found == name
        assert image.shape[:2] == mask.shape
        np.testing.assert_array_equal(mask, np.array(Image.open(dataset.items[0].mask)))
        assert IGNORE in mask
        sbd = samples / f"sbd_derived/benchmark_RELEASE/dataset/cls/{name}.mat"
        by_sbd = read_mat_labels(sbd, "GTcls.Segmentation")[0]
        np.testing.assert_array_equal(by_sbd, np.where(mask == IGNORE, 0, mask))


def test_a_real_list_that_leaks_val_is_refused(samples):
    train, val = (PascalVOC(root=samples / "voc2012", split=s) for s in ("trainaug", "val"))
    with pytest.raises(InputError, match=r"the same image in data.train_split=trainaug and"):
        refuse_overlap(train, val, allowed=False)
