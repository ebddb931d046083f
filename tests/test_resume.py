"""A resumed run refuses other data and settings, and folders keep the name of their run."""

import functools
from copy import deepcopy
from pathlib import Path

import pytest
from test_config import compose

from danet.checkpoint import run_folder
from danet.config import resume
from danet.config.validate import check
from danet.engine.best import Best
from danet.engine.settings import TrainSettings
from danet.errors import InputError


def test_changes_are_allowed_but_for_network_and_optimizer():
    old = {"loss": {"a": 1}, "optimizer": {"lr": 1.0}, "trainer": {"ema_decay": None}}
    compare = functools.partial(resume.compare_settings, Path("x.pt"), old)
    for fixed in ({"optimizer": {"lr": 2.0}}, {"trainer": {"ema_decay": 0.9}}):
        with pytest.raises(InputError, match="init_from"):
            compare({**old, **fixed, "allow_changes": True})


def test_an_argument_that_is_not_given_is_compared_as_its_default():
    """As in a checkpoint of a version that did not have it yet, and in a list of losses."""
    now = check(compose("loss=rmi")).plain
    losses = [{"_target_": "danet.losses.CrossEntropy"}, now["loss"]["main"].pop("other")]
    now["loss"]["main"] = {"_target_": "danet.losses.WeightedSum", "losses": losses}
    losses[0]["label_smoothing"] = 0.0
    before = deepcopy(now)
    del before["loss"]["main"]["losses"][0]["label_smoothing"]
    del before["loss"]["main"]["losses"][1]["pooling"]
    del before["optimizer"]["betas"]
    assert not resume.differences(before, now)
    assert not resume.differences(now, before)
    now["loss"]["main"]["losses"][0]["label_smoothing"] = 0.1
    now["optimizer"]["betas"] = [0.8, 0.999]
    assert list(resume.differences(before, now)) == ["loss.main.losses", "optimizer.betas"]


@pytest.mark.parametrize(
    ("key", "best_by", "is_one"),
    [
        ("trainer.best_by", "miou", True),
        ("evaluation.flip", "miou", True),
        ("data.val_split", "loss", True),
        ("loss.main.class_weights", "loss", True),
        ("loss.main.class_weights", "miou", False),
        ("loss.weights.position", "loss", False),
        ("data.crop", "loss", False),
        ("trainer.clip_norm", "loss", False),
    ],
)
def test_the_best_begins_anew_where_the_score_is_another(key, best_by, is_one):
    assert resume.is_measure(key, best_by) == is_one


def test_forgetting_the_best_forgets_for_how_long_there_was_none():
    saved = {"best_score": 0.5, "best_step": 2, "evaluations_since_best": 3, "evaluated_at": 9}
    assert not resume.is_best_forgotten(saved)
    resume.forget_best(saved)
    assert resume.is_best_forgotten(saved)
    assert Best.of(saved, TrainSettings(9, patience=3)).state() == {
        **{"best_score": None, "best_step": 0, "evaluations_since_best": 0}
    }


def test_a_folder_keeps_the_name_of_its_run(tmp_path):
    prepare = functools.partial(run_folder.prepare, config={"seed": 1})
    names = [run_folder.id_of(prepare(tmp_path / n, resuming=False)) for n in "ab"]
    assert len(set(names)) == 2
    assert all(len(name) == 32 for name in names)
    prepare(tmp_path / "a", resuming=True)
    assert run_folder.id_of(tmp_path / "a") == names[0]
    saved = {"run_id": names[0], "step": 3}
    run_folder.refuse_foreign(tmp_path / "a", tmp_path / "a/last.pt", saved)
    run_folder.refuse_foreign(tmp_path / "new", tmp_path / "a/last.pt", saved)
    run_folder.refuse_foreign(tmp_path / "b", tmp_path / "b/last.pt", {"step": 3})  # an old one
    with pytest.raises(
        InputError, match=f"of run {names[0]}, but run.dir=.*/b is of run {names[1]}"
    ):
        run_folder.refuse_foreign(tmp_path / "b", tmp_path / "b/last.pt", saved)
    prepare(tmp_path / "new", resuming=True, saved=saved)
    assert run_folder.id_of(tmp_path / "new") not in ("", *names), "another run from there on"
