"""Rare classes are drawn as often as stated, by position alone; the stream needs no state."""

import itertools
import math

import numpy as np
import pytest

from danet.data.sampler import RareClassSampling, StepSampler
from danet.errors import InputError
from danet.seeds import mix

PIXELS = np.array(
    [
        [900, 90, 0, 0, 30],
        [800, 150, 40, 0, 0],
        [990, 5, 0, 0, 0],
        [500, 400, 60, 0, 2],
        [700, 0, 8, 0, 0],
        [0, 0, 0, 0, 0],
    ],
    np.int32,
)
"""Six pictures, five classes: 3 never occurs, 4 has 10 pixels or more in one picture only."""
T = 0.5


def sampling(pixels=PIXELS, temperature=T, min_pixels=10):
    return RareClassSampling(pixels, temperature=temperature, min_pixels=min_pixels)


def stream(batches, batch_size=4, **settings):
    """Returns the first batches of keys."""
    settings = {"seed": 3, "rare": sampling(), "class_mix": 0.5, **settings}
    sampler = StepSampler(len(PIXELS) * 4, batch_size, **settings)
    return [list(batch) for batch in itertools.islice(sampler, batches)]


def stated(temperature=T):
    """Returns P(class, picture) by the definition, one at a time."""
    total = PIXELS.sum()
    weights = {
        c: math.exp((1 - PIXELS[:, c].sum() / total) / temperature)
        for c in range(5)
        if PIXELS[:, c].any()
    }
    found = {}
    for c, weight in weights.items():
        pictures = [i for i in range(6) if PIXELS[i, c] >= 10]
        for i in pictures:
            found[c, i] = weight / sum(weights.values()) / len(pictures)
    return found


def chi_square(drawn, probabilities):
    """Returns Pearson's statistic, and its 99.9 % quantile by Wilson and Hilferty (1931)."""
    count = len(drawn)
    assert set(drawn) <= set(probabilities), "something is drawn that should never be"
    observed = dict.fromkeys(probabilities, 0)
    for key in drawn:
        observed[key] += 1
    statistic = sum(
        (observed[key] - count * p) ** 2 / (count * p) for key, p in probabilities.items()
    )
    freedom = len(probabilities) - 1
    spread = 2 / (9 * freedom)
    return statistic, freedom * (1 - spread + 3.0902 * math.sqrt(spread)) ** 3


def test_the_quantile_is_that_of_the_tables():
    for categories, tabulated in ((2, 10.83), (6, 20.52), (11, 29.59)):
        drawn, probabilities = [0], dict.fromkeys(range(categories), 1 / categories)
        assert chi_square(drawn, probabilities)[1] == pytest.approx(tabulated, rel=0.06)


@pytest.fixture(scope="module")
def drawn():
    """Class and picture at 12,000 positions, and those of the partners."""
    keys = list(itertools.chain.from_iterable(stream(3000, class_mix=1.0)))
    return {
        "first": [(key.focus, key.index) for key in keys],
        "partner": [(key.partner.focus, key.partner.index) for key in keys],
    }


@pytest.mark.parametrize("which", ["first", "partner"])
def test_classes_and_pictures_are_drawn_as_often_as_stated(drawn, which):
    statistic, limit = chi_square(drawn[which], stated())
    assert statistic < limit


@pytest.mark.parametrize(
    "wrong",
    [
        stated(temperature=1.4 * T),
        {key: 1 / len(stated()) for key in stated()},
        {key: p * (1.1 if key[0] == 4 else 1) for key, p in stated().items()},
    ],
    ids=["another temperature", "uniform", "one class a tenth more"],
)
def test_the_comparison_notices_another_distribution(drawn, wrong):
    statistic, limit = chi_square(drawn["first"], wrong)
    assert statistic > limit


def test_a_draw_says_nothing_of_the_next_or_of_its_partner(drawn):
    marginal = [sum(p for key, p in stated().items() if key[0] == c) for c in range(5)]
    together = {
        (a, b): marginal[a] * marginal[b] for a in range(5) for b in range(5) if a != 3 != b
    }
    classes, partners = ([c for c, _ in drawn[which]] for which in ("first", "partner"))
    for first, second in ((classes[::2], classes[1::2]), (classes, partners)):
        statistic, limit = chi_square(list(zip(first, second, strict=True)), together)
        assert statistic < limit


def test_the_stated_probabilities_are_a_function():
    by_class = [sum(p for key, p in stated().items() if key[0] == c) for c in range(5)]
    np.testing.assert_allclose(sampling().probabilities, by_class, rtol=1e-12)
    assert sampling().probabilities[3] == 0


@pytest.mark.parametrize("temperature", [1e-9, 1e-3, 1e9])
def test_any_temperature_gives_probabilities(temperature):
    rare = sampling(temperature=temperature)
    assert rare.probabilities.sum() == pytest.approx(1)
    assert rare.probabilities.argmax() == 4
    for choice in (0, 2**31, 2**32 - 1):
        assert rare.draw(choice, 0).focus != 3, "a class that never occurs"


def test_a_class_without_a_picture_of_enough_pixels_is_drawn_from_all_that_show_it():
    rare = sampling(min_pixels=35)
    assert rare.scarce == [4]
    assert rare.pictures[4].tolist() == [0, 3]
    assert rare.pictures[1].tolist() == [0, 1, 3]
    assert rare.absent == [3]
    lines = rare.describe("abcde")
    assert lines[0].startswith("rare-class sampling: e 34.1% (2 pictures), c 3")
    assert lines[1].endswith("never occur: d")
    assert "data.rare_class_min_pixels=35 pixels of e; drawn" in lines[2]


def test_labels_without_a_class_are_an_error():
    with pytest.raises(InputError, match=r"data.rare_class_temperature: no label has a pixel"):
        sampling(np.zeros((3, 2), np.int32))


@pytest.mark.parametrize("settings", [{}, {"rare": None}, {"class_mix": None}], ids=str)
def test_twenty_batches_are_ten_and_a_stream_that_goes_on(settings):
    assert stream(20, **settings) == stream(10, **settings) + stream(10, start=10, **settings)


@pytest.mark.parametrize("settings", [{}, {"rare": None}, {"class_mix": None}], ids=str)
def test_three_processes_of_four_draw_what_one_of_twelve_draws(settings):
    parts = [stream(9, 4, rank=rank, world=3, **settings) for rank in range(3)]
    joined = [list(itertools.chain(*batches)) for batches in zip(*parts, strict=True)]
    assert joined == stream(9, 12, **settings)


def test_no_two_draws_share_a_seed_not_even_with_partners():
    keys = list(itertools.chain.from_iterable(stream(300)))
    partners = [key.partner for key in keys if key.partner]
    seeds = [key.seed for key in (*keys, *partners)]
    assert len(set(seeds)) == len(keys) + len(partners)
    assert 500 < len(partners) < 700, "a share of 0.5 of 1200"
    assert all(key.partner is None for key in partners)


def test_without_sampling_the_stream_is_that_of_before():
    """One permutation an epoch, and the seed of the position."""
    keys = list(itertools.chain.from_iterable(stream(6, rare=None, class_mix=None)))
    assert sorted(key.index for key in keys) == list(range(24))
    assert [key.seed for key in keys] == [mix(3, 1, position) for position in range(24)]
    mixed = list(itertools.chain.from_iterable(stream(6, rare=None, class_mix=1.0)))
    assert [key[:3] for key in mixed] == [key[:3] for key in keys]
