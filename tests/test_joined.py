"""Data sets that are joined are read as each alone, under names of their own."""

import shutil

import numpy as np
import pytest
from conftest import TINY, call, plant
from test_config import compose

from danet.config.build import join_extra_roots, make_dataset
from danet.config.validate import check
from danet.data_check.overlap import refuse_overlap
from danet.data_check.scan import scan
from danet.datasets.label_statistics import label_pixels
from danet.errors import InputError

SPLITS = (("train", 4), ("val", 2))


@pytest.fixture
def roots(tmp_path, monkeypatch):
    """Three folders of one layout, the last with other pictures of the same names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = [tmp_path / name for name in ("main", "more", "most")]
    for i, root in enumerate(found):
        plant(root, size=(40 + i, 60), splits=((SPLITS[0][0], 4 + i), SPLITS[1]))
    return found


def settings(root, *extra, **more):
    places = ",".join(map(str, extra))
    typed = ["data=folder", f"data.root={root}", "data.classes=[a,b]", "data.num_workers=0"]
    return [*typed, f"data.extra_roots=[{places}]", *(f"data.{k}={v}" for k, v in more.items())]


def training_set(*arguments, **more):
    config = check(compose(*settings(*arguments, **more)), needs_data=True)
    dataset = make_dataset(config, "train", training=False)
    join_extra_roots(dataset, config)
    return dataset


def test_each_sample_is_that_of_its_own_data_set_under_a_name_of_its_own(roots):
    joined, parts = training_set(*roots), [training_set(root) for root in roots]
    assert len(joined) == 4 + 5 + 6
    alone = [part.read(i) for part in parts for i in range(len(part))]
    for i, (image, mask, name) in enumerate(alone):
        found = joined.read(i)
        assert np.array_equal(found[0], image)
        assert np.array_equal(found[1], mask)
        assert found[2].endswith(name)
        assert found[2] == joined.items[i].name
    names = [item.name for item in joined.items]
    assert len(set(names)) == 15
    assert names[:5] == [*(f"train_{i}" for i in range(4)), f"{roots[1]}/train/train_0"]


def test_a_split_of_another_name_can_be_joined(roots):
    joined = training_set(roots[0], f"{{root: {roots[0]}, split: val}}", roots[1])
    assert len(joined) == 4 + 2 + 5
    assert joined.items[4].name == f"{roots[0]}/val/val_0"


def test_the_fingerprint_follows_from_the_names_and_not_from_the_places(roots, tmp_path):
    before = training_set(*roots).fingerprint()
    moved = shutil.move(roots[1], tmp_path / "elsewhere")
    assert training_set(roots[0], moved, roots[2]).fingerprint() == before
    others = [(), (moved,), (roots[2], moved), (moved, f"{{root: {roots[2]}, split: val}}")]
    found = {training_set(roots[0], *other).fingerprint() for other in others}
    assert len(found | {before}) == 5


def test_pixels_and_problems_are_counted_over_all(roots):
    joined = training_set(*roots)
    alone = [label_pixels(training_set(root), num_workers=0, skip=False) for root in roots]
    counted = label_pixels(joined, num_workers=0, skip=False)
    assert np.array_equal(counted, np.concatenate(alone))
    report = scan(joined)
    assert report.pixels.tolist() == counted.sum(axis=0).tolist()
    assert not report.problems
    path = roots[2] / "masks/train/train_3.png"
    path.write_bytes(b"")
    (problem,) = scan(joined).problems
    assert str(path) in problem


def test_a_picture_of_a_further_folder_must_not_be_scored(roots):
    shutil.copy(roots[0] / "images/val/val_1.png", roots[1] / "images/train/train_2.png")
    config = check(compose(*settings(*roots)))
    val = make_dataset(config, "val", training=False)
    assert len(val) == 2, "validation is as it was"
    with pytest.raises(InputError, match=r"images/train/train_2.png and .*images/val/val_1.png"):
        refuse_overlap(training_set(*roots), val, allowed=False)
    assert refuse_overlap(training_set(*roots[::2]), val, allowed=False) == ""


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("{0}/none", "data.extra_roots: {0}/none: there is no such folder; fix or remove it"),
        ("{{root: {0}}}", "data.extra_roots: {0}, split train: these pictures are there already"),
        ("{{root: {1}, split: tran}}", "split tran: Folder: split='tran' is not one of train"),
        ("{{root: {1}, split: test}}", "{1}, split test: Folder: no images for split 'test'"),
        ("{{rot: {1}}}", "expected a list of folders, [/data/more], or of {{root: FOLDER, split"),
        ("3", "data.extra_roots=[3]: expected a list of folders"),
    ],
)
def test_a_place_that_cannot_be_joined_is_named(roots, extra, message):
    with pytest.raises(InputError) as error:
        training_set(roots[0], extra.format(*roots))
    assert message.format(*roots) in str(error.value)


@pytest.mark.slow
def test_the_tool_checks_all_folders_of_the_training(roots, tmp_path, capsys):
    (roots[1] / "masks/train/train_0.png").write_bytes(b"")
    output = f"output={tmp_path / 'report'}"
    call("check_data", *settings(*roots), output, code=2)
    seen = capsys.readouterr()
    assert "train: 15 images" in seen.out
    assert "more/masks/train/train_0.png" in seen.err


@pytest.mark.slow
@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
def test_a_training_reads_all_folders(roots, tmp_path, capsys, on_bad_sample):
    bad = roots[1] / "images/train/train_1.png"
    bad.write_bytes(bad.read_bytes()[:-400])
    own = [s for s in TINY if not s.startswith(("data.size", "data.lengths", "data.cue"))]
    typed = [*settings(*roots), *own, "data.crop=[32,32]", "trainer.steps=8", "run.log_to=[]"]
    typed += [f"run.dir={tmp_path / 'run'}", f"data.on_bad_sample={on_bad_sample}"]
    call("train", *typed, code=0 if on_bad_sample == "skip" else 2)
    seen = "".join(capsys.readouterr())
    assert str(bad) in seen
    assert ("15 training and 2 validation images" in seen) == (on_bad_sample == "skip")
