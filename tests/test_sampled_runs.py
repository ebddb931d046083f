"""A run with rare classes, mixed samples and joined data sets can be stopped and continued."""

import re
import shutil

import pytest
import torch
from conftest import TINY, call, plant, rewrite, tool

from danet.checkpoint import format as checkpoint_format

pytestmark = pytest.mark.slow

OWN = [s for s in TINY if not s.startswith(("data.size", "data.lengths", "data.cue"))]
SAMPLING = [
    "data.rare_class_temperature=0.05",
    "data.class_mix=0.5",
    "data.transforms.train.steps.scale_crop.centred=0.5",
]


@pytest.fixture
def roots(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = "main", "more"
    return [plant(tmp_path / name, values=(0, 0, 0, 0, 1, 2)) for name in names]


def settings(roots, *more):
    typed = ["data=folder", f"data.root={roots[0]}", "data.classes=[a,b,c]", *OWN]
    typed += ["data.crop=[32,32]", "data.num_workers=0", "trainer.steps=20", "run.log_to=[]"]
    return [*typed, f"data.extra_roots=[{roots[1]}]", *SAMPLING, *more]


def weights(folder):
    return checkpoint_format.load(folder / "last.pt")["model"]


@pytest.fixture
def stopped(roots, tmp_path):
    """A run of 20 steps that ended after 10."""
    call("train", *settings(roots), "trainer.stop_at=10", f"run.dir={tmp_path / 'half'}")
    return tmp_path / "half"


def test_twenty_steps_are_ten_and_a_resumed_run(roots, tmp_path, stopped, capsys):
    call("train", *settings(roots), f"run.dir={tmp_path / 'whole'}")
    assert "rare-class sampling: " in capsys.readouterr().out
    before = weights(stopped)
    call("train", f"resume={stopped / 'last.pt'}", "data.num_workers=1")
    whole, resumed = weights(tmp_path / "whole"), weights(stopped)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], before[name]) for name in whole)


def test_two_processes_count_once_and_draw_alike(roots, tmp_path):
    shared = ["trainer.stop_at=2", "trainer.log_every=1", "data.on_bad_sample=skip"]
    done = tool("train", *settings(roots, *shared, "run.processes=2", "run.dir=run"), cwd=tmp_path)
    assert done.stdout.count("rare-class sampling: b") == 1
    assert len(list(tmp_path.glob("cache/danet/label_statistics/*.npz"))) == 1
    again = f"resume={tmp_path / 'run/last.pt'}"
    done = tool("train", again, "run.processes=2", "trainer.stop_at=4", cwd=tmp_path)
    assert "steps 2 to 20" in done.stdout
    assert "counting pixels" not in done.stderr


def test_folders_may_move_and_pictures_may_not_change(roots, tmp_path, stopped, capsys):
    moved = shutil.move(roots[1], tmp_path / "moved")
    again = f"resume={stopped / 'last.pt'}"
    call("train", again, f"data.extra_roots=[{moved}]", "trainer.stop_at=11")
    assert f'data.extra_roots=["{moved}"] instead of' in capsys.readouterr().out
    call("train", again, "data.extra_roots=[]", code=2)
    assert "the training set was Folder train, 8 samples" in capsys.readouterr().err
    plant(tmp_path / "third", values=(0, 1, 2), splits=(("train", 5),), size=(50, 60))
    call("train", again, f"data.extra_roots=[{tmp_path / 'third'}]", code=2)
    assert "now it is Folder train, 9 samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("data.rare_class_temperature=0.1", "data.rare_class_temperature: 0.05 in the checkpoint"),
        ("data.rare_class_min_pixels=1", "data.rare_class_min_pixels: 3000 in the checkpoint, 1"),
        ("data.class_mix=null", "data.class_mix: 0.5 in the checkpoint, null now"),
        (f"{SAMPLING[2][:-3]}null", "scale_crop.centred: 0.5 in the checkpoint, null now"),
    ],
)
def test_a_resumed_run_draws_samples_by_the_same_settings(roots, stopped, capsys, setting, text):
    key = setting.partition("=")[0]
    typed = [s for s in settings(roots) if not s.startswith(f"{key}=")]
    again = [*typed, f"resume={stopped / 'last.pt'}", setting]
    call("train", *again, code=2)
    assert text in capsys.readouterr().err
    call("train", *again, "allow_changes=true", "trainer.stop_at=11")
    seen = capsys.readouterr().out
    assert text in seen
    assert "the best score is reset" not in seen, "scores are measured as before"


def without_new_keys(config):
    """Returns a config as versions without these settings stored it."""
    data = {k: v for k, v in config["data"].items() if not re.match("rare|class_mix|extra", k)}
    crop = {**data["transforms"]["train"]["steps"]["scale_crop"]}
    del crop["centred"]
    train = data["transforms"]["train"]
    steps = {**train["steps"], "scale_crop": crop}
    data["transforms"] = {**data["transforms"], "train": {**train, "steps": steps}}
    return {**config, "data": data}


def test_a_checkpoint_of_before_is_evaluated_and_resumed(roots, tmp_path):
    plain = [s for s in settings(roots) if s not in SAMPLING and "extra" not in s]
    call("train", *plain, "trainer.stop_at=10", f"run.dir={tmp_path / 'old'}")
    path = tmp_path / "old/last.pt"
    rewrite(path, config=without_new_keys(checkpoint_format.load(path)["config"]))
    call("eval", f"checkpoint={path}", "device=cpu", f"output={tmp_path / 'scores'}")
    call("train", *plain, f"resume={path}", "trainer.stop_at=11")
    call("train", f"resume={path}", "data.extra_roots=[]", "trainer.stop_at=12")
