"""Settings that are not as they must be: each is refused or accepted as promised.

Keys that other programs have are refused with the name of what does it here.
"""

import functools
import os
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY
from starts import composed, train_command

from danet.config.build import make_model
from danet.config.validate import check

pytestmark = pytest.mark.slow

SMALL = " ".join(["data.size=[32,32]", "data.batch_size=1", *TINY[3:]])


@pytest.fixture
def given(monkeypatch, capsys, tmp_path):
    """Returns a function that gives settings to train.py, started in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    return functools.partial(train_command, capsys)


def rows(kind):
    """Returns a parameter for each setting of the rows of a table of config_rows.yaml."""
    table = yaml.safe_load(Path(__file__).with_name("config_rows.yaml").read_text())
    return [
        pytest.param(
            settings.replace("SMALL", SMALL), parts, id=f"{row} {settings[:50]}", marks=mark
        )
        for row, cells in table[kind].items()
        for mark in [pytest.mark.bad_input(row)]
        for settings, *parts in cells
    ]


@pytest.mark.parametrize(("settings", "parts"), rows("refused"))
def test_a_setting_is_refused(given, settings, parts):
    text = given(*settings.split()).refused(*parts)
    assert "sweep" not in text.lower()


@pytest.mark.parametrize(("settings", "said"), rows("accepted"))
def test_a_setting_is_accepted(given, settings, said):
    part, times = said
    given(*settings.split()).accepted(part, times=times)


def test_C11_crop_that_is_no_multiple_of_the_stride():
    config = check_of("data=camvid", "data.crop=[50,70]")
    with torch.device("meta"):
        model = make_model(config)
        assert model.eval()(torch.empty(1, 3, 50, 70)).logits.shape == (1, 11, 50, 70)
    assert config.data.crop == [50, 70]


def test_C12_crop_that_cannot_fit(given):
    given("data.crop=[20000,20000]").refused(
        "data.crop=[20000, 20000]", "a step needs about", "GiB", "the largest crop that fits is ["
    )


def test_C15_home_and_relative_folders(given, tmp_path, monkeypatch):
    (tmp_path / "home" / "data").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for root in ("~/data", "home/data", f"{tmp_path}/home/data"):
        given("data=camvid", f"data.root={root}").accepted(f"data.root={tmp_path}/home/data\n")


def test_C27_half_precision_without_hardware(given, monkeypatch):
    monkeypatch.setattr("danet.engine.precision.has_bfloat16", lambda device: False)
    given("trainer.precision=bfloat16", "trainer.device=cpu").accepted(
        "trainer.precision=bfloat16: cpu computes in it more slowly"
    )


def test_C31_run_folder_that_cannot_be_written(given, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in ("file", "file/below"):
        given(f"run.dir={folder}").refused(f"run.dir={folder}: {tmp_path}/file is a file", code=4)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    given("run.dir=new/run").refused(f"run.dir=new/run: {tmp_path} may not be written", code=4)
    assert not (tmp_path / "new").exists()


def test_C32_run_folder_of_another_run(given, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text("seed: 1\n")
    given("run.dir=old").refused("run.dir=old: another run is there", "resume=auto", "another run.")
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ("trainer:\n\tsteps: 3\n", "line 5, column 1: found character '\\t'"),
        ("trainer:\n\tsteps: 3\n", "YAML is indented with blanks, not with tabs"),
        ("trainer:\n  steps: 3\n  steps: 4\n", "line 6, column 3: found duplicate key steps"),
        ("trainer: [3\nseed: 1\n", "line 5, column 5: expected ',' or ']'"),
        ("trainer:\n  stepz: 3\n", "there is no such key; did you mean trainer.steps?"),
    ],
)
def test_C34_config_file_with_a_fault(given, tmp_path, body, where):
    path = tmp_path / "mine.yaml"
    path.write_text("defaults:\n  - train\n  - _self_\n" + body)
    text = given("--config-dir", str(tmp_path), "--config-name", "mine").refused(where)
    assert "stepz" in body or str(path) in text


def check_of(*settings):
    """Returns a checked config."""
    return check(composed("train", [settings[0], "data.root=/data", *settings[1:]]))
