"""Living with runs: what TensorBoard and others are shown, comparing, sweeping, profiling."""

import itertools
import json
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, batch, call, make_trainer, tool
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from danet.config import schema
from danet.engine import trackers
from danet.engine.log import RunLog, read_metrics
from danet.tools import compare

sys.path.insert(0, str(ROOT / "scripts"))
import sweep

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training with the profiler on."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    settings = [*TINY, "trainer.steps=11", "trainer.profile=true", "data.num_workers=0"]
    call("train", *settings, f"run.dir={folder}")
    return folder


def test_tensorboard_shows_classes_pictures_attention_and_settings_with_the_score(run):
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    logged = {"train/loss", "val/miou", "val/loss", "val/iou/bus", "final/miou", "final/best_miou"}
    assert logged <= set(tags["scalars"])
    assert {"val_000000", "val_000000_attention", "val_000004"} <= set(tags["images"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert events.Scalars("final/miou")[0].value == pytest.approx(lines[-1]["miou"])
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    settings = content.session_start_info.hparams
    assert settings["optimizer.lr"].number_value == 0.002
    assert settings["model.head._target_"].string_value.endswith("DualAttentionHead")


def test_the_profile_leaves_a_trace_costs_and_the_share_of_waiting(run):
    reported = (run / "profile" / "costs.txt").read_text()
    assert re.match(r"5 steps from step 6 on, each 0.\d+ s waiting for data", reported)
    assert "convolution" in reported
    trace = json.loads((run / "profile" / "trace.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert any("convolution_backward" in name for name in names)
    assert {"waiting for data", "ProfilerStep#5", "ProfilerStep#9"} <= names
    assert not {"ProfilerStep#4", "ProfilerStep#10"} & names


@pytest.mark.parametrize(
    ("steps", "says"), [(5, "it begins at step 6 and this had 5"), (7, "2 steps from step 6 on")]
)
def test_a_run_too_short_for_a_profile_says_so(tmp_path, capsys, steps, says):
    make_trainer(tmp_path, steps=steps, profile=True).fit(map(batch, itertools.count()))
    assert f"profile: {says}" in capsys.readouterr().out


def test_writers_are_those_that_a_config_may_name():
    assert tuple(trackers.TRACKERS) == schema.LOG_TO


CONFIG = {"a": {"b": [1, 2], "c": None}, "lr": 1.5, "run": {"dir": None}}
PICTURE = np.full((4, 6, 3), 7, np.uint8)


def show(folder, name, *, step=0):
    """Shows a tracker a run, or how it goes on from a step."""
    log = RunLog(folder, step=step, steps=9, config=CONFIG, log_to=[name], run_id="id1")
    values = {"loss": 2.0 - step, "iou/große Straße (a)": 0.5, "bad": float("nan")}
    log.scalars(step + 1, "train", values)
    log.images(step + 1, {"val_0": PICTURE})
    log.close({"miou": 0.25, "none": None})
    assert list(log.trackers) == [name]


def wandb_records(path):
    """Yields what a file of W&B (LevelDB's format of logs, within one block) holds."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position = path.read_bytes(), 7
    while position + 7 < len(content):
        start = position + 7
        (length,) = struct.unpack("<H", content[position + 4 : position + 6])
        position = start + length
        yield Record.FromString(content[start:position])


def test_wandb_is_shown_a_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    show(tmp_path, "wandb")
    wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*-id1/*.wandb")
    records = list(wandb_records(path))
    (run,) = {(r.run.run_id, r.run.display_name) for r in records if r.HasField("run")}
    assert run == ("id1", tmp_path.name)
    settings = {x.key: x.value_json for r in records for x in r.config.update}
    settings |= {x.key: x.value_json for r in records for x in r.run.config.update}
    del settings["_wandb"]
    assert settings == {"a.b": '"[1, 2]"', "a.c": '"None"', "lr": "1.5"}
    logged = {x.nested_key[0]: x.value_json for r in records for x in r.history.item}
    assert (logged["_step"], logged["train/loss"]) == ("1", "2")
    assert logged["train/iou/große Straße (a)"] == "0.5"
    assert "images/val_0" in logged
    assert "train/bad" not in logged
    final = {x.key: x.value_json for r in records for x in r.summary.update}
    assert {k: v for k, v in final.items() if k.startswith("final/")} == {"final/miou": "0.25"}


def test_mlflow_is_shown_a_run_and_goes_on_with_it(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    show(tmp_path, "mlflow")
    show(tmp_path, "mlflow", step=1)
    (found,) = mlflow.search_runs(experiment_names=["danet"], output_format="list")
    assert (found.info.run_name, found.info.status) == (tmp_path.name, "FINISHED")
    assert found.data.params == {"a.b": "[1, 2]", "a.c": "None", "lr": "1.5"}
    assert found.data.metrics == {
        "train/loss": 1.0,
        "train/iou/große Straße _a_": 0.5,
        "final/miou": 0.25,
    }
    client = mlflow.MlflowClient()
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(x.step, x.value) for x in history] == [(1, 2.0), (2, 1.0)]
    pictures = sorted((tmp_path / "store").glob("*/*/artifacts/images/val_0*.png"))
    assert len(pictures) == 2
    assert np.array_equal(Image.open(pictures[0]), PICTURE)


class Failing:
    """A tracker whose server is gone."""

    def __init__(self, folder, step, run_id, settings):
        if folder.name == "at once":
            raise ConnectionError("no server\nat all")

    def scalars(self, step, values):
        raise ValueError("no server")

    images = close = scalars


@pytest.mark.parametrize(
    ("name", "reason"),
    [("at once", r"ConnectionError('no server\nat all')"), ("later", "no server")],
)
def test_a_tracker_that_fails_costs_a_line_and_no_training(
    tmp_path, monkeypatch, capfd, name, reason
):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Failing)
    folder = tmp_path / name
    folder.mkdir()
    log = RunLog(folder, step=0, steps=9, log_to=["wandb", "tensorboard"])
    for step in (1, 2):
        log.scalars(step, "train", {"loss": 1.0})
        log.images(step, {"a": PICTURE})
    log.close()
    (line,) = (x for x in capfd.readouterr().err.splitlines() if "warning" in x)
    assert line.startswith("warning: run.log_to: wandb failed and is left out from now on (")
    assert reason in line
    assert len(read_metrics(folder / "metrics.jsonl")) == 2
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


def write_run(folder, lr, mious, extra=None):
    folder.mkdir(parents=True)
    config = {
        "optimizer": {"lr": lr, **(extra or {})},
        "trainer": {"steps": 20},
        "run": {"dir": str(folder)},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    lines = [{"step": 5, "kind": "train", "loss": 1.25, "images_per_second": 8.0}]
    lines += [
        {"step": 10 * (i + 1), "kind": "val", "miou": m, "pixel_accuracy": m + 0.2, "loss": 1 - m}
        for i, m in enumerate(mious)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 30, "ki')


def test_compare_prints_scores_beside_what_differs_and_draws_curves(tmp_path, capsys):
    write_run(tmp_path / "x" / "1", 0.1, [0.5, 0.25])
    write_run(tmp_path / "y" / "1", 0.2, [0.375], {"momentum": 0.9})
    page = tmp_path / "page.html"
    compare.main([str(tmp_path / "x" / "1"), str(tmp_path / "y" / "1"), "--page", str(page)])
    head, first, second, last = capsys.readouterr().out.strip().splitlines()
    assert head.split("  ")[0] == "run"
    assert "optimizer.lr" in head
    assert "optimizer.momentum" in head
    assert "trainer.steps" not in head
    assert first.split() == ["x/1", "20", "50.00", "25.00", "45.00", "1.2500", "8.0", "0.1", "-"]
    assert second.split() == ["y/1", "10", "37.50", "37.50", "57.50", "1.2500", "8.0", "0.2", "0.9"]
    assert last == str(page)
    text = page.read_text()
    assert text.count("<svg") == 5
    assert ">x/1<" in text


def test_compare_turns_a_wide_table_and_refuses_what_is_no_run(tmp_path, capsys):
    write_run(tmp_path / "a", 0.1, [0.5], {f"key{i}": "x" * 30 for i in range(5)})
    write_run(tmp_path / "b", 0.2, [0.5], {f"key{i}": "y" * 30 for i in range(5)})
    compare.main([str(tmp_path / "a"), str(tmp_path / "b" / "config.yaml")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "a", "b"]
    assert lines[-1].split() == ["optimizer.key4", "x" * 30, "y" * 30]
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(tmp_path)])
    assert "not the folder of a run" in capsys.readouterr().err


def test_optuna_finds_the_better_setting_and_goes_on_after_a_stop(tmp_path):
    pytest.importorskip("optuna", reason="optuna is not installed")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    calls = []

    def start(folder, settings):
        calls.append((folder.name, settings))
        if len(calls) == 3:
            raise KeyboardInterrupt
        values = dict(setting.split("=") for setting in settings)
        if len(calls) == 5:
            raise subprocess.CalledProcessError(sweep.DIVERGED, "train")
        bonus = 0.1 if values["model/head"] == "dual" else 0.0
        miou = 0.5 - abs(float(values["optimizer.lr"]) - 0.01) + bonus
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"kind": "val", "miou": miou}) + "\n")

    arguments = [*("trainer.steps=9", "optimizer.lr=log(0.001,0.1)"), "model/head=choice(dual,fcn)"]
    with pytest.raises(KeyboardInterrupt):
        sweep.search(tmp_path / "s", 8, arguments, start)
    study = sweep.search(tmp_path / "s", 8, arguments, start)
    assert calls[0][1][0] == "trainer.steps=9"
    assert calls[3] == calls[2], "the trial that was cut off goes on in its folder"
    states = [trial.state.name for trial in study.trials]
    assert (states.count("COMPLETE"), states.count("PRUNED")) == (7, 1)
    assert len({str(settings) for _, settings in calls}) == 8, "nothing is tried twice"
    assert study.best_params["model/head"] == "dual"
    with pytest.raises(SystemExit, match=r"had other settings \(trainer.steps=8 trainer.steps=9\)"):
        sweep.search(tmp_path / "s", 9, ["trainer.steps=8", *arguments[1:]], start)
    with pytest.raises(SystemExit, match="nothing to search"):
        sweep.search(tmp_path / "s", 1, ["optimizer.lr=0.1"], start)


def test_a_sweep_runs_each_point_under_torchrun(tmp_path):
    small = ["debug=one_step", "run.log_to=[]", "data.num_workers=0", "model/head=dual,position"]
    done = tool("train", "-m", *TINY, *small, "run.processes=2", "run.name=swept", cwd=tmp_path)
    folders = list((tmp_path / "runs" / "swept").iterdir())
    assert len(folders) == 2
    assert done.stdout.count("of 4 images") == 2
    heads = {compare.read_run(f, f.name).config["model.head._target_"] for f in folders}
    assert len(heads) == 2


def test_flags_of_the_command_line_are_handed_on_without_those_of_a_sweep(monkeypatch):
    from danet import cli

    line = "train.py -m --config-dir x --config-name=y a=1,2 +b=3 -cn z"
    monkeypatch.setattr("sys.argv", line.split())
    assert cli.flags() == ["--config-dir", "x", "--config-name=y", "-cn", "z"]
