"""Batches are a function of the seed and the step; files are read as they are, or refused."""

import hashlib
import itertools
import random

import albumentations as A
import numpy as np
import pytest
import torch
from conftest import make_folder, write_pair
from PIL import Image
from torch.utils.data import Dataset

from danet.data.loader import collate, collate_by_size, eval_batches, train_batches
from danet.data.sampler import StepSampler
from danet.data.transforms import Pipeline, ScaleCrop
from danet.datasets.camvid import CamVid
from danet.datasets.labels import default_palette, is_background, voc_palette
from danet.datasets.scenes import Scenes
from danet.errors import InputError
from danet.types import IGNORE, Sample

# Order


def stream(batches, num_samples, batch_size, **settings):
    """Returns the first batches of a sampler, each a list of (item, seed)."""
    sampler = StepSampler(num_samples, batch_size, **{"seed": 3, **settings})
    return [list(batch) for batch in itertools.islice(sampler, batches)]


def joined(batches):
    return list(itertools.chain.from_iterable(batches))


@pytest.mark.parametrize(("num_samples", "batch_size"), [(12, 4), (10, 4), (7, 7), (5, 1), (11, 3)])
def test_every_sample_comes_once_an_epoch(num_samples, batch_size):
    draws = joined(stream(3 * num_samples, num_samples, batch_size))
    epochs = [draws[i : i + num_samples] for i in range(0, 3 * num_samples, num_samples)]
    for epoch in epochs:
        assert sorted(draw.index for draw in epoch) == list(range(num_samples))
    if num_samples > 5:
        assert len({tuple(draw.index for draw in epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("start", [1, 2, 5, 13])
def test_a_stream_started_late_is_the_end_of_the_whole_one(start):
    assert stream(20 - start, 10, 4, start=start) == stream(20, 10, 4)[start:]


@pytest.mark.parametrize(("batch_size", "world"), [(2, 2), (1, 4)])
def test_more_processes_draw_the_same_global_batches(batch_size, world):
    parts = [stream(9, 10, batch_size, rank=rank, world=world) for rank in range(world)]
    assert [joined(batches) for batches in zip(*parts, strict=True)] == stream(9, 10, 4)


def test_the_order_follows_from_the_seed_alone_and_no_two_draws_share_one():
    seeds = [draw.seed for batch in stream(100, 10, 4) for draw in batch]
    assert len(set(seeds)) == 400
    first = stream(5, 10, 4)
    torch.manual_seed(2)
    assert stream(5, 10, 4) == first != stream(5, 10, 4, seed=4)


@pytest.mark.parametrize(("num_samples", "batch_size", "world"), [(3, 4, 1), (7, 4, 2), (0, 1, 1)])
def test_a_batch_that_cannot_be_filled_is_an_error(num_samples, batch_size, world):
    message = f"^{num_samples} samples do not fill .*: data.batch_size={batch_size} on {world} proc"
    with pytest.raises(InputError, match=message):
        train_batches(Noise(num_samples), batch_size=batch_size, seed=0, world=world)
    with pytest.raises(InputError, match=r"^data.batch_size=0 is not a whole number of at least 1"):
        train_batches(Noise(num_samples), batch_size=0, seed=0)


# Augmentation


def sample_of(height, width):
    """Noise with labels 0..5."""
    rng = np.random.default_rng(height * width)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Sample(image, rng.integers(0, 6, (height, width), dtype=np.uint8), "noise")


def street():
    """Makes geometry and colour as a real run has them."""
    return Pipeline(
        {
            "scale_crop": ScaleCrop((32, 40), (0.5, 2.0)),
            "mirror": A.HorizontalFlip(p=0.5),
            "color": A.ColorJitter(p=0.8),
            "blur": A.GaussianBlur(blur_limit=(3, 5), p=0.3),
        }
    )


class Noise(Dataset):
    """One picture under many names, augmented: only the seed makes a difference."""

    def __init__(self, length):
        self.length, self.sample, self.transform = length, sample_of(48, 60), street()

    def __len__(self):
        return self.length

    def __getitem__(self, draw):
        return self.transform(self.sample, draw.seed)._replace(name=str(draw.index))


def equal(a, b):
    return all(
        torch.equal(torch.as_tensor(x), torch.as_tensor(y))
        for x, y in zip(a[:2], b[:2], strict=True)
    )


@pytest.mark.fault("T46", "other code seeds or draws from the global generators")
def test_a_seed_decides_all_whatever_came_before():
    sample, pipeline = sample_of(48, 60), street()
    first = [pipeline(sample, seed) for seed in range(20)]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    for seed in (7, 3, 3, 19, 0):
        assert equal(pipeline(sample, seed), first[seed])
        assert equal(street()(sample, seed), first[seed])
    assert len({result.image.tobytes() for result in first}) == 20


def test_batches_are_equal_with_and_without_workers():
    settings = {"batch_size": 4, "seed": 1}
    alone = itertools.islice(train_batches(Noise(10), **settings), 8)
    workers = itertools.islice(train_batches(Noise(10), **settings, num_workers=2), 8)
    late = train_batches(Noise(10), **settings, num_workers=2, start=5)
    alone = list(alone)
    for one, two in zip(alone, workers, strict=True):
        assert equal(one, two)
        assert one.name == two.name
    for one, two in zip(alone[5:], late, strict=False):
        assert equal(one, two)
    images = {image.numpy().tobytes() for batch in alone for image in batch.image}
    assert len(images) == 32, "no two draws of four epochs share their augmentation"


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    next(train_batches(Noise(4), batch_size=2, seed=0))
    list(eval_batches(Plain(4), batch_size=2))
    assert torch.equal(torch.get_rng_state(), before)


# Batches


class Plain(Dataset):
    """Samples as they are, of given sizes or all of one."""

    def __init__(self, length, sizes=((8, 10),)):
        self.samples = []
        for i, (height, width) in zip(range(length), itertools.cycle(sizes), strict=False):
            image = np.full((height, width, 3), i, np.uint8)
            image[..., 2] = 100
            self.samples.append(Sample(image, np.full((height, width), i, np.uint8), f"s{i}"))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def test_a_batch_is_its_samples_stacked_channels_first():
    batch = collate(Plain(3).samples)
    assert (batch.image.shape, batch.image.dtype) == ((3, 3, 8, 10), torch.uint8)
    assert (batch.mask.shape, batch.mask.dtype) == ((3, 8, 10), torch.uint8)
    assert batch.image.is_contiguous()
    assert batch.name == ("s0", "s1", "s2")
    assert batch.image[2, :, 0, 0].tolist() == [2, 2, 100]
    assert (batch.mask[1] == 1).all()


def test_a_batch_may_be_made_of_views_but_not_of_several_sizes():
    sample = Plain(1)[0]
    turned = Sample(sample.image[:, ::-1], sample.mask[:, ::-1], "turned")
    assert equal(collate([turned]), collate([Sample(*(a.copy() for a in turned[:2]), "copy")]))
    with pytest.raises(InputError, match=r"several sizes \(10 x 8, 9 x 9\): set data.crop"):
        collate(Plain(3, sizes=[(8, 10), (9, 9)]).samples)


def test_samples_of_one_size_share_a_batch_and_others_do_not():
    samples = Plain(5, sizes=[(8, 10), (10, 8)]).samples
    batches = collate_by_size(samples)
    assert [batch.name for batch in batches] == [("s0", "s2", "s4"), ("s1", "s3")]
    assert [tuple(batch.image.shape) for batch in batches] == [(3, 3, 8, 10), (2, 3, 10, 8)]
    for batch in batches:
        for name, mask in zip(batch.name, batch.mask, strict=True):
            assert (mask == int(name[1:])).all()


@pytest.mark.bad_input("F19")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("length", "world"), [(1, 2), (5, 1), (5, 3), (8, 2)])
def test_every_sample_is_evaluated_once_by_one_process(length, world, num_workers):
    names = []
    for rank in range(world):
        settings = {"batch_size": 2, "rank": rank, "world": world, "num_workers": num_workers}
        groups = eval_batches(Plain(length, sizes=[(8, 10), (9, 9)]), **settings)
        first, again = list(groups), list(groups)
        assert len(groups) == len(first) == len(again), "it can be gone through twice"
        assert all(sum(len(batch.name) for batch in group) <= 2 for group in first)
        names += [name for group in first for batch in group for name in batch.name]
    assert sorted(names) == [f"s{i}" for i in range(length)]


# CamVid


def test_camvid_finds_every_picture_with_its_label(camvid_tree):
    splits = ("train", "val", "test")
    assert [len(CamVid(root=camvid_tree, split=split)) for split in splits] == [4, 3, 2]
    data = CamVid(root=camvid_tree, split="val")
    assert len(data.classes) == len(data.palette) == 11
    for i in range(3):
        image, mask, name = data[i]
        assert name == f"val_{i}"
        assert np.array_equal(image, np.array(Image.open(camvid_tree / f"images/val/{name}.png")))
        labels = np.array(Image.open(camvid_tree / f"labels/val/{name}.png"))
        assert np.array_equal(mask, np.where(labels == 11, IGNORE, labels))
        assert 11 in labels


def test_camvid_is_read_from_the_folders_of_segnet(camvid_tree):
    expected = [CamVid(root=camvid_tree, split="val")[i] for i in range(3)]
    for split in ("train", "val", "test"):
        (camvid_tree / "images" / split).rename(camvid_tree / split)
        (camvid_tree / "labels" / split).rename(camvid_tree / f"{split}annot")
    with pytest.raises(InputError, match=f"set data.root={camvid_tree}"):
        CamVid(root=camvid_tree.parent, split="val")
    data = CamVid(root=camvid_tree, split="val")
    assert len(data) == len(expected)
    for i, sample in enumerate(expected):
        assert np.array_equal(data[i].image, sample.image)
        assert np.array_equal(data[i].mask, sample.mask)


def test_a_drive_of_camvid_and_the_others_divide_its_training_pictures(tmp_path):
    places = {"train": ("0001TP", "0006R0", "0016E5"), "val": ("0016E5",), "test": ("0001TP",)}
    small = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8)
    for split, drives in places.items():
        for drive in drives:
            for i in range(2):
                write_pair(tmp_path, split, f"{drive}_{split}{i}", *small, labels="labels")
    every = names_of(CamVid(root=tmp_path, split="train"))
    for drive in places["train"]:
        alone = names_of(CamVid(root=tmp_path, split=drive))
        assert alone == {f"{drive}_train0", f"{drive}_train1"}
        assert names_of(CamVid(root=tmp_path, split=f"train-{drive}")) == every - alone
    with pytest.raises(InputError, match="split='train-0006' is not one of train, val, test"):
        CamVid(root=tmp_path, split="train-0006")


def test_the_real_camvid_has_segnets_split_and_no_label_beyond_its_classes(camvid):
    sets = [CamVid(root=camvid, split=split) for split in ("train", "val", "test")]
    assert [len(data) for data in sets] == [367, 101, 233]
    assert all([len(CamVid(root=camvid, split=s))] == n for s, n in CamVid.expected.items())
    assert len({item.name for data in sets for item in data.items}) == 701
    samples = [data[i] for data in sets for i in (0, len(data) // 2, len(data) - 1)]
    assert {sample.image.shape for sample in samples} == {(360, 480, 3)}
    seen = set(np.unique([sample.mask for sample in samples]).tolist())
    assert seen <= {*range(11), IGNORE}
    assert len(seen) > 9


# Folder


def write_pictures(root, names, split="."):
    for name in names:
        image, mask = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8)
        write_pair(root, split, name, image, mask, labels="masks")


def own(root, split, **settings):
    return make_folder(root=root, split=split, **{"classes": ("background", "cat"), **settings})


def names_of(data):
    return {item.name for item in data.items}


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(150, 0.2, 30), (5, 0.2, 1), (2, 0.99, 1), (3, 0.001, 1), (8, 0.9, 7)],
)
def test_a_folder_without_splits_is_divided_exactly(tmp_path, count, share, expected):
    names = {f"photo.{i}" for i in range(count)}
    write_pictures(tmp_path, names)
    train, val = (own(tmp_path, split, val_share=share) for split in ("train", "val"))
    assert names_of(train) | names_of(val) == names
    assert not names_of(train) & names_of(val)
    assert len(val) == expected
    assert train.division == val.division, "reported once"
    assert f"{expected} are val and {count - expected} train" in train.division
    with pytest.raises(
        InputError,
        match=f"images has {count}; there are train and val; take one of them, or data.root=",
    ):
        own(tmp_path, "test")
    write_pictures(tmp_path / "one", ["a"])
    with pytest.raises(InputError, match="and no folders for splits, so all are train"):
        own(tmp_path / "one", "val")


def test_val_is_the_first_by_the_hash_whatever_is_added(tmp_path):
    names = [f"photo{i}" for i in range(30)]
    write_pictures(tmp_path, names)
    by_hash = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert names_of(own(tmp_path, "val")) == set(by_hash[:6])
    late = [f"late{i}" for i in range(30)]
    write_pictures(tmp_path, late)
    by_hash = sorted(names + late, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert names_of(own(tmp_path, "val")) == set(by_hash[:12])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"values": {0: -1}}, r"0 -> -1, but classes are 0..1 and 255"),
        ({"values": {65536: 0}}, r"65536 -> 0, but .*values on disk are 0..65535"),
        (
            {"classes": ("a",)},
            r"data.classes: 1 names, expected 2 to 8192; .* \[background, object",
        ),
        (
            {"classes": [str(i) for i in range(8193)]},
            "data.classes: 8193 names, expected 2 to 8192",
        ),
        ({"palette": [(0, 0, 0)]}, "data.palette: 1 colours for 2 class names"),
        ({"palette": [(0, 0, 0), (0, 0)]}, r"data.palette: \[0, 0\] is not three numbers 0..255"),
    ],
)
def test_bad_settings_of_a_folder_are_named(tmp_path, settings, message):
    write_pictures(tmp_path, ["a"], "train")
    with pytest.raises(InputError, match=message):
        own(tmp_path, "train", **settings)


def test_the_palette_of_pascal_voc_spreads_the_bits_of_the_index():
    known = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)]
    assert list(voc_palette(256)[:6]) == known
    assert voc_palette(256)[20:22] == ((0, 64, 128), (128, 64, 128))
    assert len(set(voc_palette(256))) == 256


def test_background_is_black_and_own_colours_come_first(tmp_path):
    write_pictures(tmp_path, ["a"], "train")
    assert own(tmp_path, "train").palette == ((0, 0, 0), (230, 159, 0))
    assert own(tmp_path, "train", palette=[[1, 2, 3], [4, 5, 6]]).palette == ((1, 2, 3), (4, 5, 6))
    names = ("cat", "_Background_", "dog", "unlabelled")
    assert default_palette(names) == ((230, 159, 0), (0, 0, 0), (86, 180, 233), (0, 0, 0))
    assert [is_background(name) for name in ("void", "BG", "backgrounds", "sky", "other")] == [
        *(True, True, False, False, False)
    ]


def as_lab(colors, *, deuteranopia=False):
    """Returns CIE L*a*b* of RGB colours (K, 3), perhaps as seen without one kind of cones."""
    signal = np.asarray(colors) / 255
    linear = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    if deuteranopia:  # Machado, Oliveira and Fernandes, 2009, table 1, severity 1
        rows = (0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413)
        linear = (linear @ np.array([*rows, (-0.011820, 0.042940, 0.968881)]).T).clip(0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    share = linear @ np.array(to_xyz).T / (0.9505, 1, 1.089)  # of white
    x, y, z = np.where(share > 0.008856, np.cbrt(share), 7.787 * share + 16 / 116).T
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), axis=1)


def smallest_distance(colors, **vision):
    lab = as_lab(colors, **vision)
    distances = np.linalg.norm(lab[:, None] - lab, axis=-1)
    return distances[np.triu_indices(len(colors), 1)].min()


@pytest.mark.parametrize(
    ("palette", "distance"),
    [
        (default_palette([f"class {i}" for i in range(8)]), 16),
        (default_palette([f"class {i}" for i in range(20)]), 16),
        (default_palette([f"class {i}" for i in range(64)]), 8),
        (Scenes.palette, 16),
    ],
    ids=["8", "20", "64", "scenes"],
)
def test_colours_differ_for_the_colour_blind_too(palette, distance):
    # About 2.3 can just be seen; to a deuteranope PASCAL VOC's first 20 come as near as 1.5.
    assert smallest_distance(palette) > distance
    assert smallest_distance(palette, deuteranopia=True) > distance


def test_there_is_a_bright_colour_of_its_own_for_every_class():
    palette = default_palette([f"class {i}" for i in range(255)])
    assert len(set(palette)) == 255
    lightness, a, b = as_lab(palette).T
    assert lightness.min() > 34
    assert np.hypot(a, b).min() > 29
