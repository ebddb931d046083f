"""The rows of the paper's tables are experiments, commands, and cells that runs fill."""

import importlib.util
import json
import os
import subprocess

import pytest
import yaml
from conftest import ROOT
from test_config import EXPERIMENTS, compose

from danet.config.validate import check
from danet.errors import UserError


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reproduce = script("reproduce")
TABLES = yaml.safe_load((ROOT / "scripts" / "tables.yaml").read_text())
ROWS = [(number, row) for number, table in TABLES.items() for row in table["rows"]]


def test_every_row_is_an_experiment_and_every_table_experiment_a_row():
    rows = {f"table{number}_{row}" for number, row in ROWS}
    assert rows == {name for name in EXPERIMENTS if name.startswith("table")}
    assert len(rows) == 21


@pytest.mark.parametrize(("number", "row"), ROWS)
def test_an_experiment_says_its_number_its_command_and_its_data(number, row):
    text = (ROOT / "configs/experiment" / f"table{number}_{row}.yaml").read_text()
    published = TABLES[number]["rows"][row]["published"]
    assert f"mIoU {published:.2f}" in text or f"mIoU {published}." in text
    assert f"python scripts/reproduce.py table={number} row={row} launch=torchrun" in text
    config = compose(f"experiment=table{number}_{row}", "data.root=/data")
    choice = (ROOT / "configs/data" / f"{TABLES[number]['data']}.yaml").read_text()
    assert f"_target_: {config.data.dataset._target_}" in choice
    parts = {"none": "FCN", "fcn": "FCN", "pam": "SingleAttention", "cam": "SingleAttention"}
    wanted = next((kind for key, kind in parts.items() if key in row), "DualAttention")
    assert config.model.head._target_ == f"danet.models.heads.dual.{wanted}Head"
    assert config.model.backbone.depth == (50 if "r50" in row else 101)


def test_the_recipes_are_the_stated_ones():
    """Numbers of the paper and of its authors' answers, written down once more."""
    config = check(compose("experiment=table2_multi_grid", "data.root=/data"))
    steps = 2975 // 8
    assert config.trainer.steps == 240 * steps == 89_040
    assert config.data.batch_size * 4 == 8
    crop = config.data.transforms["train"]["steps"]["scale_crop"]
    assert (crop["size"], crop["base"], crop["scale"]) == ([768, 768], 1024, [0.75, 2.0])
    expected = {"lr": 0.003, "head_multiplier": 10, "momentum": 0.9}
    expected |= {"weight_decay": 1e-4, "decay_norm": True}
    assert expected.items() <= config.optimizer.items()
    assert (config.schedule["power"], config.schedule["warmup_steps"]) == (0.9, 0)
    assert config.model["backbone"]["multi_grid"] == [4, 8, 16]
    assert config.model["auxiliary_head"] is None
    weights = config.loss["weights"]
    assert weights["position"] == weights["channel"] == 1
    plain = check(compose("experiment=table1_r50_pam", "data.root=/data"))
    assert plain.trainer.steps == 180 * steps == 66_780
    assert plain.optimizer["lr"] == 0.01
    assert plain.data.transforms["train"]["steps"]["scale_crop"]["scale"] == [1.0, 1.0]
    assert plain.model["backbone"]["multi_grid"] is None
    for table, images, epochs in ((4, 10_582, 240), (6, 4_998, 240), (7, 9_000, 180)):
        config = compose(f"experiment=table{table}_danet_r50", "data.root=/data")
        assert config.trainer.steps == epochs * (images // 16)
        assert config.data.batch_size * 4 == 16


def test_single_and_multi_scale_of_a_row_are_scored_on_one_training():
    _, rows = reproduce.rows_of({"table": "2"})
    by_name = {row.name: row for row in rows}
    assert by_name["multi_scale"].experiment == by_name["multi_grid"].experiment
    assert by_name["multi_scale"].scoring == ("danet_multi",)
    assert by_name["base"].experiment == "table1_r101_both"


def scored(runs, experiment, protocol, miou, split="val", step=66780, copy=""):
    folder = runs / experiment / f"eval_{split}_{protocol}{copy}"
    folder.mkdir(parents=True)
    facts = {"miou": miou, "step": step, "split": split}
    (folder / "metrics.json").write_text(json.dumps(facts))
    return folder / "metrics.json"


def test_the_table_is_filled_from_the_metrics_of_runs(tmp_path, capsys):
    scored(tmp_path, "table1_r50_pam", "danet_single", 0.7512)
    reproduce.main(["table=1", f"runs={tmp_path}", f"output={tmp_path / 'table.md'}"])
    out = capsys.readouterr().out
    assert "| r50_pam | 75.74 | 75.12 (-0.62; step 66780) |" in out
    assert "| r50_cam | 74.28 | - |" in out
    assert (tmp_path / "table.md").read_text() in out
    assert (
        f"scripts/launch/torchrun.sh {tmp_path}/table1_r50_none experiment=table1_r50_none" in out
    )
    assert "evaluation=danet_single" in out


@pytest.mark.bad_input("R05")
def test_the_score_of_the_last_checkpoint_counts(tmp_path):
    (row,) = reproduce.rows_of({"table": "1", "row": "r50_pam"})[1]
    of_row = (tmp_path, "table1_r50_pam", "danet_single")
    scored(*of_row, 0.5)
    later = scored(*of_row, 0.7, step=70000, copy="-2")
    scored(*of_row, 0.9, step=90000, copy="_other")
    assert reproduce.measured(row, "danet_single", tmp_path)["miou"] == 0.7
    last = tmp_path / "table1_r50_pam" / "last.pt"
    last.touch()
    os.utime(last, ns=(0, later.stat().st_mtime_ns + 1))
    assert reproduce.measured(row, "danet_single", tmp_path) is None, "it was trained on since"
    assert list(reproduce.score_commands(row, tmp_path, []))


@pytest.fixture
def called(monkeypatch):
    """Returns the commands that would have been started."""
    commands, done = [], subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(reproduce.subprocess, "run", lambda c, **_: commands.append(c) or done)
    return commands


def test_torchrun_trains_and_then_scores_what_is_not_scored(tmp_path, called):
    scored(tmp_path, "table4_fcn_r50", "danet_single", 0.7)
    reproduce.main(
        ["table=4", "row=fcn_r50", "launch=torchrun", f"runs={tmp_path}", "data.root=/d"]
    )
    train, score = called
    assert train[:3] == ["bash", "scripts/launch/torchrun.sh", str(tmp_path / "table4_fcn_r50")]
    assert train[3:] == ["experiment=table4_fcn_r50", "data.root=/d"]
    assert {"evaluation=danet_multi", "evaluation.crop=576", "data.root=/d"} <= set(score)
    assert f"checkpoint={tmp_path / 'table4_fcn_r50' / 'last.pt'}" in score


def test_slurm_submits_each_training_once_and_scoring_waits_for_it(tmp_path, called, capsys):
    reproduce.main(["table=2", "launch=slurm", f"runs={tmp_path}", "data.root=/d"])
    assert [command[0] for command in called] == ["sbatch"] * 3
    called.clear()
    reproduce.main(["table=2", "launch=score", f"runs={tmp_path}", "data.root=/d"])
    assert called == []
    assert "multi_scale: not trained yet" in capsys.readouterr().out
    (tmp_path / "table2_multi_grid").mkdir()
    (tmp_path / "table2_multi_grid" / "last.pt").touch()
    reproduce.main(["table=2", "launch=score", f"runs={tmp_path}", "data.root=/d"])
    assert [text for command in called for text in command if text.startswith("evaluation=")] == [
        "evaluation=danet_single",
        "evaluation=danet_multi",
    ]


def test_a_command_that_fails_ends_it(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="ended with exit code 3"):
        reproduce.main(["table=1", "launch=torchrun", f"runs={tmp_path}", "data.root=/d"])
