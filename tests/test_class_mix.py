"""Pasted pixels keep their labels, and each sample has fresh ones, whoever makes it."""

import itertools

import albumentations as A
import numpy as np
import pytest
import torch
from conftest import make_folder, plant

from danet.data.bad_samples import SkipBadSamples
from danet.data.class_mix import ClassMix, paste
from danet.data.loader import train_batches
from danet.data.sampler import RareClassSampling
from danet.data.transforms import Pipeline, ScaleCrop
from danet.datasets.folder import Folder
from danet.errors import InputError
from danet.types import IGNORE, Sample, SampleKey


def sample(seed, values=(0, 1, 2, 3, 4, IGNORE), size=(24, 30)):
    """A sample each of whose pixels has its label as red and its seed as green."""
    mask = np.random.default_rng(seed).choice(np.array(values, np.uint8), size)
    image = np.stack(
        [mask, np.full(size, seed, np.uint8), np.arange(mask.size).reshape(size) % 9], 2
    )
    return Sample(image.astype(np.uint8), mask, f"s{seed}")


@pytest.mark.parametrize("values", [(0, 1, 2, 3, 4, IGNORE), (7,), (0, IGNORE), (3, 9)], ids=str)
def test_half_of_the_classes_rounded_up_are_pasted_pixel_by_pixel(values):
    below, above = sample(1), sample(2, values)
    classes = sorted(set(values) - {IGNORE})
    seen = set()
    for seed in range(30):
        mixed = paste(below, above, seed)
        pasted = {int(c) for c in np.unique(mixed.image[mixed.image[..., 1] == 2][:, 0])}
        assert len(pasted) == (len(classes) + 1) // 2
        assert pasted <= set(classes), "IGNORE is never pasted"
        seen |= pasted
        for row, column in np.ndindex(mixed.mask.shape):
            source = above if above.mask[row, column] in pasted else below
            assert mixed.mask[row, column] == source.mask[row, column]
            assert (mixed.image[row, column] == source.image[row, column]).all()
    assert seen == set(classes), "each class has its turn"
    assert mixed.name == "s1 + s2"


def test_a_sample_without_classes_gives_nothing():
    below = sample(1)
    mixed = paste(below, sample(2, (IGNORE,)), 0)
    assert np.array_equal(mixed.image, below.image)
    assert np.array_equal(mixed.mask, below.mask)


def test_sizes_that_differ_are_an_error_that_says_what_to_set():
    with pytest.raises(InputError, match=r"s1 and s2 .*\(30 x 24 and 20 x 24\): set data.crop"):
        paste(sample(1), sample(2, size=(24, 20)), 0)


@pytest.fixture
def pictures(tmp_path):
    """Twelve pictures of six classes, augmented as in a training."""
    root = plant(tmp_path / "data", values=(*range(6), IGNORE), splits=(("train", 12),))
    crop = ScaleCrop((32, 40), (0.5, 2.0), centred=0.5)
    steps = {"crop": crop, "mirror": A.HorizontalFlip(p=0.5)}
    return make_folder(root=root, split="train", classes=list("abcdef"), transform=Pipeline(steps))


def batches(pictures, count=6, **settings):
    pixels = np.stack([np.bincount(pictures.read(i)[1].ravel(), minlength=256) for i in range(12)])
    rare = RareClassSampling(pixels[:, :6], temperature=0.1, min_pixels=1)
    settings = {"batch_size": 4, "seed": 1, "rare": rare, "class_mix": 0.7, **settings}
    return list(itertools.islice(train_batches(pictures, **settings), count))


def same(a, b):
    return torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask) and a.name == b.name


# More workers than this machine has cores, perhaps.
MORE = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@MORE
@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_workers_makes_the_same_batches(pictures, num_workers):
    alone = batches(pictures)
    others = batches(pictures, num_workers=num_workers)
    assert all(map(same, alone, others))
    late = batches(pictures, count=3, num_workers=num_workers, start=3)
    assert all(map(same, alone[3:], late))


@MORE
def test_no_two_workers_or_processes_make_the_same_sample(pictures):
    made = [b for rank in range(2) for b in batches(pictures, 6, rank=rank, world=2, num_workers=3)]
    images = {image.numpy().tobytes() for batch in made for image in batch.image}
    assert len(images) == 48
    whole = batches(pictures, 6, batch_size=8)
    for number, batch in enumerate(whole):
        parts = torch.cat([made[number].image, made[number + 6].image])
        assert torch.equal(batch.image, parts)


def test_the_mixed_and_the_plain_are_those_of_their_keys(pictures):
    data = ClassMix(SkipBadSamples(pictures, 0))
    first, second = SampleKey(3, 5, focus=2), SampleKey(8, 6, focus=1)
    assert data[first].num_read == 1
    mixed = data[first._replace(partner=second)]
    below, above = pictures[first].mask, pictures[second].mask
    chosen = itertools.combinations(range(6), 3)
    wanted = [np.where(np.isin(above, classes), above, below) for classes in chosen]
    assert sum(np.array_equal(mixed.sample.mask, mask) for mask in wanted) == 1
    assert mixed.num_read == 2


def test_a_partner_that_cannot_be_read_is_replaced_and_reported_as_itself(pictures):
    path = pictures.items[7].image
    with open(path, "r+b") as file:
        file.truncate(60)
    data = ClassMix(SkipBadSamples(pictures, 20))
    loaded = data[SampleKey(3, 5, partner=SampleKey(7, 6))]
    assert list(loaded.bad) == [7]
    assert path in loaded.bad[7]
    with pytest.raises(InputError, match=path):
        ClassMix(SkipBadSamples(pictures, 0))[SampleKey(3, 5, partner=SampleKey(7, 6))]


def test_a_message_about_a_worker_names_both_pictures(pictures):
    found = train_batches(pictures, batch_size=2, seed=1, class_mix=1.0)
    loader = found.explain.__self__
    keys = next(iter(loader._recorded_keys()))
    wanted = [pictures.items[i].name for key in keys for i in (key.index, key.partner.index)]
    assert loader._pending_names() == wanted


def test_a_transform_of_two_arguments_works_without_rare_classes(pictures):
    pictures.transform = lambda sample, seed: sample._replace(name=str(seed))
    assert isinstance(pictures, Folder)
    assert pictures[SampleKey(3, 5)].name == pictures[3, 5].name == "5"
