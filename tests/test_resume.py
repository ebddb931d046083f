"""A resumed run refuses other data and settings, and folders keep the name of their run."""

import functools
from pathlib import Path

import pytest
import torch

from danet.checkpoint import run_folder
from danet.config import resume
from danet.errors import InputError


def test_another_number_of_threads_is_reported():
    assert resume.compare_threads({"threads": torch.get_num_threads()}, "cpu") == []
    assert resume.compare_threads({}, "cpu") == []
    (line,) = resume.compare_threads({"threads": 7}, "cpu")
    assert "1 thread(s) instead of 7" in line


@pytest.mark.parametrize("key", ["training_set", "validation_set"])
def test_other_data_are_refused_and_allowed_on_purpose(key):
    before = {"training_set": "Folder train, 9 samples, x", "validation_set": "Folder val, 5, abc"}
    saved = {**before, "best_miou": 0.5, "best": [[0.5, 3]], "scores": {"miou": 0.4}}
    assert resume.compare_data(saved, before, allowed=False) == []
    assert resume.compare_data({}, before, allowed=False) == []
    now = {**before, key: "Folder, 6, abd"}
    reported = (
        rf"{key.replace('_', ' ')} was {before[key]}, now it is Folder, 6, abd; allow_changes=true"
    )
    with pytest.raises(InputError, match=reported):
        resume.compare_data(saved, now, allowed=False)
    (line,) = resume.compare_data(saved, now, allowed=True)
    assert "allow_changes=true" in line
    # A score on other pictures is no best to be beaten.
    assert (saved["best_miou"] is None) is (key == "validation_set")
    assert (saved["best"] == []) is (key == "validation_set")


def test_changes_are_allowed_but_for_network_and_optimizer():
    old = {"loss": {"a": 1}, "optimizer": {"lr": 1.0}, "trainer": {"ema_decay": None}}
    new = {"loss": {"a": 2}, "optimizer": {"lr": 1.0}, "trainer": {"ema_decay": None}}
    compare = functools.partial(resume.compare_settings, Path("x.pt"), old)
    with pytest.raises(InputError, match=r"loss.a: 1 in the checkpoint, 2 now\nallow_changes=true"):
        compare({**new, "allow_changes": False})
    (line,) = compare({**new, "allow_changes": True})
    assert "loss.a: 1 in the checkpoint, 2 now" in line
    for fixed in ({"optimizer": {"lr": 2.0}}, {"trainer": {"ema_decay": 0.9}}):
        with pytest.raises(InputError, match="init_from"):
            compare({**new, **fixed, "allow_changes": True})


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
