"""Samples that cannot be read are replaced by rule, reported once, and stop a run if too many."""

import itertools

import pytest
from conftest import Pictures

from danet.data import bad_samples
from danet.data.bad_samples import BadSamples, SkipBadSamples
from danet.data.loader import eval_batches, train_batches
from danet.data.sampler import StepSampler
from danet.errors import InputError
from danet.seeds import mix
from danet.types import SampleKey


def content(batches, count):
    return [(b.name, b.image.flatten().tolist()) for b in itertools.islice(batches, count)]


def skipped(bad, **settings):
    settings = {"batch_size": 4, "seed": 7, "max_bad_share": 1.0, **settings}
    return train_batches(Pictures(40, bad), on_bad_sample="skip", warn=print, **settings)


def literally(bad, length, count):
    """Draws and replacements as the documentation says them, one by one."""
    batches = []
    for draws in itertools.islice(StepSampler(length, 4, seed=7), count):
        names = []
        for item, seed, *_ in draws:
            while item in bad:
                item, seed = mix(seed, 2) % length, mix(seed, 3)
            names.append(f"picture_{item}")
        batches.append(tuple(names))
    return batches


def test_a_bad_sample_is_replaced_by_one_that_follows_from_the_draw():
    bad = {3, 11, 12, 30}
    found = [names for names, _ in content(skipped(bad), 25)]
    assert found == literally(bad, 40, 25)
    assert found != literally(set(), 40, 25)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_that_skips_can_be_resumed_with_any_number_of_workers(num_workers):
    whole = content(skipped({3, 11}), 14)
    assert content(skipped({3, 11}, start=6, num_workers=num_workers), 8) == whole[6:]


def test_three_bad_samples_are_forgiven_and_then_the_share_counts():
    bad = BadSamples(1000, 0.01, print)
    bad.record(10, {i: f"file {i}" for i in range(3)})
    for _ in range(50):
        bad.record(0, {0: "file 0"})  # the same again is no further one
    with pytest.raises(InputError) as error:
        bad.record(20, {3: "file 3"})
    assert "4 of 30 samples seen cannot be read, more than data.max_bad_share=0.01" in str(
        error.value
    )
    assert str(error.value).endswith("file 0\n  file 1\n  file 2\n  file 3")
    many = BadSamples(1000, 0.01, print)
    many.record(900, dict.fromkeys(range(9), ""))
    many.record(100, {9: ""})
    with pytest.raises(InputError):
        many.record(5000, {10: ""})  # epochs do not make the data set larger


def test_storage_that_is_gone_stops_a_loader():
    with pytest.raises(InputError, match="21 samples in a row cannot be read; is the storage"):
        SkipBadSamples(Pictures(bad=range(40)))[SampleKey(0, 1)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("read", [train_batches, eval_batches])
def test_without_skipping_and_in_evaluation_a_bad_sample_is_an_error(read, num_workers):
    settings = {"seed": 7} if read is train_batches else {}
    batches = read(Pictures(8, bad={3}), batch_size=2, num_workers=num_workers, **settings)
    with pytest.raises(InputError) as error:
        list(itertools.islice(batches, 8))
    assert str(error.value) == "picture_3.png: not a readable image", "no traceback of a worker"


def test_the_summary_names_each_once():
    assert bad_samples.summary([{}, {}]) == []
    assert bad_samples.summary([{5: "e", 2: "b"}, {5: "e"}]) == [
        "2 sample(s) could not be read and were replaced by others:",
        "  b",
        "  e",
    ]
