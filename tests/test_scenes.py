"""A scene is a function of its number, and only its cues tell which classes its pairs are."""

import random

import cv2
import numpy as np
import pytest

from danet.datasets.scenes import BOOTH, BUS, KIOSK, LANDMARK, SQUARE, TRAM, Scenes, draw_scene
from danet.errors import InputError

SIZE = (48, 160)
LENGTHS = {"train": 200, "val": 40, "test": 40}
LEVELS = ("wide", "small", "relation")
PAIRS = ((BUS, TRAM), (KIOSK, BOOTH))
CUES = (LANDMARK, SQUARE)


def scenes(split="train", **changes):
    settings = {"lengths": LENGTHS, "size": SIZE, "cue_radius": 3, **changes}
    return Scenes(split=split, **settings)


class Flipped(random.Random):
    """Turns some of the bits that are drawn alone: bit 0 is of the coach, bit 1 of the stall."""

    def __new__(cls, seed, flip):
        return super().__new__(cls)  # Python 3.10 would take only one argument

    def __init__(self, seed, flip):
        super().__init__(seed)
        self.flip = flip
        self.drawn = 0

    def getrandbits(self, k):
        bits = super().getrandbits(k)
        if k == 1:
            bits ^= self.drawn in self.flip
            self.drawn += 1
        return bits


def draw(index, level, *, flip=(), size=SIZE):
    rng = Flipped(f"0/val/{index}", flip)
    return draw_scene(rng, size=size, level=level, cue_radius=3)


def bit(mask, pair):
    """Returns which class of a pair is in a mask; both or none is a failure."""
    found = [int((mask == kind).any()) for kind in pair]
    assert sum(found) == 1, f"{found} of the pair {pair} are there"
    return found[1]


@pytest.fixture(params=LEVELS)
def level(request):
    return request.param


# What only a cue decides


@pytest.mark.parametrize("size", [SIZE, (64, 384), (96, 96)], ids=str)
@pytest.mark.parametrize("flip", [(0,), (1,), (0, 1)], ids=str)
def test_a_bit_changes_its_cue_and_the_names_of_its_pair_and_nothing_else(level, size, flip):
    for index in range(12):
        image, mask = draw(index, level, size=size)
        other_image, other_mask = draw(index, level, flip=flip, size=size)
        cue = np.isin(mask, [kind for j in flip for kind in CUES[j]])
        other_cue = np.isin(other_mask, [kind for j in flip for kind in CUES[j]])
        pairs = np.isin(mask, [kind for j in flip for kind in PAIRS[j]])

        blurred = cv2.dilate((cue | other_cue).astype(np.uint8), np.ones((3, 3))) > 0
        changed = (image != other_image).any(axis=2)
        assert changed.any(), "the bit is nowhere to be seen"
        assert not (changed & ~blurred).any(), "the bit is seen outside its cue"
        assert not (blurred & np.isin(mask, PAIRS)).any(), "a cue touches an object of a pair"

        renamed = mask != other_mask
        assert not (renamed & ~(cue | other_cue | pairs)).any(), "another class knows the bit"
        assert renamed[pairs].all()
        for j in (0, 1):
            assert bit(mask, PAIRS[j]) ^ bit(other_mask, PAIRS[j]) == (j in flip)
            assert np.array_equal(np.isin(mask, PAIRS[j]), np.isin(other_mask, PAIRS[j]))


def test_the_cue_says_which_class_the_pair_is(level):
    shown = {0: set(), 1: set()}
    for index in range(40):
        _, mask = draw(index, level)
        for j, (cue, pair) in enumerate(zip(CUES, PAIRS, strict=True)):
            kinds = [side for side, kind in enumerate(cue) if (mask == kind).any()]
            shown[bit(mask, pair)].update((j, side) for side in kinds)
            if level == "relation":
                assert len(kinds) == 1 + bit(mask, pair), "one tint is bit 0 and two are bit 1"
            else:
                assert kinds == [bit(mask, pair)]
    if level == "relation":  # one tint alone says nothing: each is seen under both bits
        assert shown[0] == shown[1] == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_pairs_stand_far_from_their_cues(level):
    for size in (SIZE, (64, 384), (48, 48)):
        for index in range(15):
            _, mask = draw(index, level, size=size)
            pairs, cues = np.isin(mask, PAIRS).any(axis=0), np.isin(mask, CUES).any(axis=0)
            assert np.flatnonzero(pairs).min() >= round(0.6 * size[1])
            # A disc is as wide left as right of its pixel, so one may end on the line.
            assert np.flatnonzero(cues).max() <= 0.25 * size[1]


def test_both_bits_are_fair_and_independent(level):
    data = scenes(level=level)
    bits = np.array([[bit(data.read(i)[1], pair) for pair in PAIRS] for i in range(len(data))])
    both = np.bincount(bits @ (2, 1), minlength=4)
    # Of 200 fair draws each of the four cases is 50; 6.1 is one standard deviation.
    assert both.sum() == 200
    assert (abs(both - 50) < 4 * 6.1).all()


def test_the_cue_of_a_picture_is_where_its_classes_are(level):
    data = scenes(level=level)
    mask, cue = data.read(3)[1], data.cue(3)
    assert list(cue) == ["bus/tram", "kiosk/booth"]
    for where, kinds in zip(cue.values(), CUES, strict=True):
        assert where.any()
        assert np.array_equal(where, (mask == kinds[0]) | (mask == kinds[1]))


# A function of (seed, split, index)


def test_no_two_pictures_are_the_same_and_a_length_changes_none():
    data = [scenes(split, seed=seed) for split in LENGTHS for seed in (0, 1)]
    assert len({one.read(i)[0].tobytes() for one in data for i in range(30)}) == 3 * 2 * 30
    short = scenes(lengths={"train": 3})
    assert all(np.array_equal(short.read(i)[0], scenes().read(i)[0]) for i in range(3))


# What a data set gives


def test_every_class_occurs_and_has_a_colour_of_its_own(level):
    data = scenes(level=level)
    assert len(set(data.classes)) == len(set(data.palette)) == len(data.palette) == 16
    assert set(np.unique([data.read(i)[1] for i in range(30)])) == set(range(16))


@pytest.mark.parametrize("size", [(48, 48), (48, 96), (97, 131), (128, 512)], ids=str)
def test_pictures_are_drawn_at_any_size(level, size):
    data = scenes("test", level=level, size=size)
    for index in range(4):
        sample = data[index]
        assert (sample.image.shape, sample.image.dtype) == ((*size, 3), np.uint8)
        assert (sample.mask.shape, sample.mask.dtype) == (size, np.uint8)
        assert sample.image.std() > 10


def test_each_split_has_its_own_length():
    lengths = {split: len(scenes(split)) for split in LENGTHS}
    assert lengths == LENGTHS
    for index in (-1, 40):
        with pytest.raises(IndexError, match=rf"index={index} is not in 0..39"):
            scenes("val").read(index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "all"}, "split='all' is not one of train, val, test"),
        ({"lengths": {"val": 3}}, r"lengths=\{'val': 3\} must give split 'train' 1 picture"),
        ({"lengths": {"train": 0}}, r"lengths=\{'train': 0\} must give split 'train'"),
        ({"size": (64,)}, r"size=\[64\] must be \[height, width\]"),
        ({"size": (47, 64)}, r"size=\[47, 64\] .* 48 or more high"),
        ({"size": (64, 63)}, r"size=\[64, 63\] .* at least as wide as high"),
        ({"size": (20000, 20000)}, "size=.* 178956970 pixels or fewer"),
        ({"cue_radius": 0}, r"cue_radius=0 must be in 1..9.6 for pictures of 48 x 160"),
        ({"cue_radius": 9.7}, r"cue_radius=9.7 must be in 1..9.6"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(InputError, match=f"Scenes: {message}"):
        scenes(**change)
    with pytest.raises(InputError, match=r"data.level=x: expected one of wide, small, relation"):
        scenes(level="x")
