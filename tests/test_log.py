"""The log of a run survives full disks and resuming, and losses that are not finite are named."""

import itertools
import json
import math
import os
import time

import pytest
import torch
from conftest import batch, no_waiting, poisoned
from conftest import make_trainer as make
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from danet.checkpoint import format as checkpoint_format
from danet.distributed import collectives
from danet.engine.log import RunLog, class_table, read_metrics
from danet.engine.nonfinite import NonFiniteGuard
from danet.engine.trackers import TensorBoard
from danet.errors import DivergedError


def lines(folder):
    """Returns the lines of a log, which other programs can read, too."""
    text = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in text if line]


def test_a_resumed_log_goes_on_from_its_step_and_drops_what_was_later(tmp_path):
    first = RunLog(tmp_path, step=0, steps=10)
    for step in (2, 4, 6):
        first.scalars(step, "train", {"loss": step / 10})
    first.scalars(4, "val", {"miou": 0.25, "iou/sky": math.nan, "b": math.inf})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "ki\n[1]\n{"step": 3, "kind": "train"}')
    second = RunLog(tmp_path, step=4, steps=10)
    second.scalars(6, "train", {"loss": 0.9})
    second.close()
    assert lines(tmp_path) == [
        {"step": 2, "kind": "train", "loss": 0.2},
        {"step": 4, "kind": "train", "loss": 0.4},
        {"step": 4, "kind": "val", "miou": 0.25, "iou/sky": None, "b": None},
        {"step": 3, "kind": "train"},
        {"step": 6, "kind": "train", "loss": 0.9},
    ]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "tensorboard"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/miou")] == [(4, 0.25)]
    assert "val/iou/sky" not in events.Tags()["scalars"]


def test_half_a_line_of_metrics_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    too_large = f'{{"step": 1e999}}\n{{"step": 1{"0" * 400}}}'
    path.write_text(f'{{"step": 1, "kind": "train", "a": null, "b": "x"}}\n{too_large}\n[2]\n{{"st')
    assert read_metrics(path) == [{"step": 1, "kind": "train", "a": None}]


def test_a_log_without_a_folder_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    silent = RunLog(None, step=0, steps=10)
    silent.advance()
    silent.write("hello")
    silent.scalars(1, "train", {"loss": 1.0})
    silent.images(1, {"a": None})
    silent.close()
    assert os.listdir(tmp_path) == []
    assert capsys.readouterr() == ("", "")


def test_a_table_shows_percentages_and_a_dash_for_what_did_not_occur():
    table = class_table(["sky", "building"], {"IoU": (0.5, math.nan), "accuracy": (1.0, 0.12345)})
    assert table.split("\n") == [
        "  class          IoU  accuracy",
        "  sky          50.00    100.00",
        "  building         -     12.35",
    ]


def test_a_log_on_a_full_disk_warns_once_and_goes_on(tmp_path, monkeypatch, capfd):
    log = RunLog(tmp_path, step=0, steps=9)
    log.scalars(1, "train", {"loss": 1.0})

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("builtins.open", refuse)
        full.setattr(TensorBoard, "scalars", refuse)
        log.scalars(2, "train", {"loss": 1.0})
        log.scalars(3, "train", {"loss": 1.0})
    log.scalars(4, "train", {"loss": 1.0})
    log.close()
    assert capfd.readouterr().err.count("the log cannot be written (No space left on device)") == 1
    assert [line["step"] for line in lines(tmp_path)] == [1, 4]


def test_every_line_of_the_log_has_pace_memory_and_counters(tmp_path, monkeypatch):
    run = make(tmp_path, steps=2, log_every=1, count=lambda: {"bad_samples": 2})
    run.fit(map(batch, itertools.count()))
    for line in (line for line in lines(tmp_path) if line["kind"] == "train"):
        assert line["images_per_second"] > 0
        assert line["bad_samples"] == 2
    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    clock = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def slow():
        while True:
            clock[0] += 0.25
            yield batch(0)

    run.restart_clock()
    for _ in range(4):
        run.next_batches(slow())
        clock[0] += 1.5
    values = run.throughput()
    assert values["images_per_second"] == pytest.approx(3 * 4 * 4 / 8)
    assert values["data_waiting"] == pytest.approx(0.25)
    assert 0.05 < values["memory_gib"] < 100
    clock[0] += 1.0
    assert run.throughput()["images_per_second"] == 0


# Losses and weights that are not finite


def test_the_first_loss_that_is_not_finite_is_named_with_its_samples(tmp_path):
    guard = NonFiniteGuard(tmp_path)
    for step, value in ((4, 1.0), (5, math.inf), (6, math.nan), (7, 1.0)):
        with no_waiting():
            guard.append(step, [f"{step}_{i}" for i in range(10)], {"main": torch.full((), value)})
    with pytest.raises(DivergedError) as error:
        guard.check()
    assert str(error.value) == (
        "step 5: the loss is not finite (inf) on process 0 of 1; its samples: 5_0, 5_1, 5_2, 5_3, "
        "5_4, 5_5, 5_6, 5_7 and 2 more; to see it again: python tools/train.py "
        f"--config-dir {tmp_path} --config-name config run.dir=null trainer.stop_at=5"
    )
    for step in range(3):
        guard.append(step, ["a"], {"main": torch.tensor(float(step)), "aux": torch.tensor(0.5)})
    assert guard.check() == {"main": 2.0, "aux": 0.5}
    guard.append(3, ["a"], {"main": torch.tensor(9.0)})
    assert guard.check() == {"main": 9.0}, "what was checked is forgotten"


def test_a_run_that_diverges_between_two_logs_names_the_step_and_saves_nothing(tmp_path):
    run = poisoned(make(tmp_path, steps=20, log_every=20, save_every=3, eval_every=20), at=3)
    with pytest.raises(DivergedError, match=r"step 4: the loss is not finite \(nan\).*a, b, a, b"):
        run.fit(map(batch, itertools.count()))
    assert checkpoint_format.load(tmp_path / "last.pt")["step"] == 3
    assert run.step == 6, "noticed before the next checkpoint"
    named = f"resume={tmp_path / 'last.pt'} trainer.stop_at=4"
    assert run.guard.replay(4).endswith(named)


@pytest.mark.parametrize("place", ["weight", "running_var"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_never_saved_nor_scored(tmp_path, place, value):
    run = make(tmp_path)
    getattr(run.train_step.model.backbone.first[1], place).data[1] = value
    with pytest.raises(DivergedError) as error:
        run.save()
    named = f"step 0: 1 of 4 values of backbone.first.1.{place} are not finite on process 0 of 1"
    assert str(error.value).startswith(named)
    assert list(tmp_path.glob("*.pt")) == []


def test_large_weights_are_finite(tmp_path):
    model = nn.Linear(2, 2)
    model.weight.data.fill_(3e38)
    NonFiniteGuard(tmp_path).require_finite(model, 1, on_all=True)
