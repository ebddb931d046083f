"""The log of a run survives a full disk and partial lines, and holds every figure."""

import itertools
import json

from conftest import batch
from conftest import make_trainer as make

from danet.engine.log import RunLog
from danet.engine.trackers import TensorBoard


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
    lines = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if line]
    assert [json.loads(line)["step"] for line in lines] == [1, 4]


def test_half_lines_within_a_log_are_dropped_when_it_goes_on(tmp_path):
    good = '{"step": 1, "kind": "train"}\n{"step": 2, "ki\n{"step": 3, "kind": "train"}\n[1]\n'
    (tmp_path / "metrics.jsonl").write_text(good)
    RunLog(tmp_path, step=5, steps=9).close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]


def test_every_line_of_the_log_has_pace_memory_and_counters(tmp_path):
    run = make(tmp_path, steps=2, log_every=1, count=lambda: {"bad_samples": 2})
    run.fit(map(batch, itertools.count()))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if line["kind"] == "train"):
        assert line["images_per_second"] > 0
        assert line["memory_gib"] > 0
        assert line["bad_samples"] == 2
