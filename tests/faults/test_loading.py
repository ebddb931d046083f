"""Bad files, bad labels, dying loaders: reported with their path, skipped by rule, never a hang."""

import math
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from danet.checkpoint import format as checkpoint_format
from faults.toy import (
    TOY,
    all_end,
    errors,
    is_alive,
    lines,
    members,
    pictures,
    samples,
    saved_step,
    step_of,
    until,
)

pytestmark = pytest.mark.slow

SKIP = ["data.on_bad_sample=skip"]


@pytest.fixture
def data(tmp_path):
    """Settings of a run of twelve pictures."""
    return [*pictures(tmp_path / "data"), "run.dir=run"]


def cut_later(tmp_path, name, **where):
    """Plants that a picture is cut off after a step, behind the look at the start of a run."""
    path = tmp_path / "data/images/train" / f"{name}.png"
    half = tmp_path / f"half_{name}.png"
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return {"call": {"place": "os.replace", "arguments": [half, path], "step": 1, **where}}


@pytest.mark.fault("T28", "a picture is cut off: data.on_bad_sample=error")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_cut_picture_ends_all_processes_with_its_path(start, tmp_path, data, workers):
    plants = cut_later(tmp_path, "train_5", rank=0)
    settings = [*data, "trainer.steps=100000", f"data.num_workers={workers}"]
    runs = start.fork_group(*settings, plants=plants)
    all_end(runs, within=60)
    codes = {run.code() for run in runs}
    assert 2 in codes
    assert codes <= {1, 2}
    reported = errors(runs)
    assert "train_5.png: not a readable image" in reported
    assert "Traceback" not in reported


@pytest.mark.bad_input("I03")
@pytest.mark.fault("T29", "a picture is cut off: data.on_bad_sample=skip")
def test_a_skipped_picture_costs_no_process_a_step_and_is_listed_once(start, tmp_path, data):
    plants = {**cut_later(tmp_path, "train_5", rank=0), "record": {"folder": str(tmp_path)}}
    runs = start.train_group(*data, *SKIP, "trainer.steps=18", plants=plants)
    per_step = samples(tmp_path)
    assert {step: len(pairs) for step, pairs in per_step.items()} == dict.fromkeys(range(18), 4)
    said = "".join(run.stdout() for run in runs)
    assert "1 sample(s) could not be read and were replaced by others" in said
    assert said.count("train_5.png: not a readable image") == 1
    assert lines(tmp_path / "run")[-1]["bad_samples"] >= 1


@pytest.mark.bad_input("I04")
@pytest.mark.fault("T30", "more pictures are cut off than data.max_bad_share forgives")
def test_too_many_bad_pictures_end_the_run_with_the_list(start, tmp_path, data):
    for i in range(0, 12, 2):
        path = tmp_path / f"data/images/train/train_{i}.png"
        path.write_bytes(path.read_bytes()[:200])
    run = start.train(*data, *SKIP, code=2)
    assert "samples seen cannot be read, more than data.max_bad_share=0.01" in run.stderr()
    assert run.stderr().count("not a readable image") >= 4


@pytest.mark.fault("T31", "a loader process is killed")
@pytest.mark.parametrize("killed", ["a loader process", "the run"])
def test_a_killed_loader_process_is_named_with_what_it_read(start, tmp_path, data, figure, killed):
    run = start.fork(*data, "trainer.steps=100000", "data.num_workers=2")
    until(lambda: step_of(tmp_path / "run") >= 3, run, what="three steps")
    worker, _ = group = [pid for pid in members(run.pid) if pid != run.pid]
    if killed == "the run":
        run.kill()
        until(lambda: not any(map(is_alive, group)), within=10, what="the end of the loader")
        return
    os.kill(worker, signal.SIGKILL)
    seconds = run.ends(1, within=10)
    assert f"(process {worker}) is killed by signal: Killed" in run.stderr()
    assert "train_" in run.stderr()
    assert "Traceback" not in run.stderr()
    until(lambda: not members(run.pid), within=10, what="the end of the other loader process")
    figure(f"{seconds:.1f} s")


@pytest.mark.fault("T32", "a loader process hangs")
def test_a_hanging_loader_process_is_given_up_after_the_set_time(start, data, figure):
    settings = [*data, "data.num_workers=2", "data.timeout=3"]
    run = start.train(*settings, plants={"hang_on": {"name": "train_5"}}, code=1, within=60)
    assert "no batch came within data.timeout=3 seconds" in run.stderr()
    assert "train_5" in run.stderr()
    until(lambda: not members(run.pid), within=10, what="the end of the loader")
    figure("data.timeout=3 s")


@pytest.mark.fault("T33", "a batch in which every pixel is ignored")
@pytest.mark.parametrize(
    ("where", "loss"),
    [({}, "ohem"), ({"rank": 1}, "cross_entropy")],
    ids=["on both", "on one"],
)
def test_an_ignored_batch_has_the_loss_zero_and_harms_nothing(start, tmp_path, where, loss):
    plants = {"spoil": {"what": "labels", "step": 5, **where}}
    start.train_group(*TOY, f"loss={loss}", "run.dir=run", plants=plants)
    found = {line["step"]: line["loss"] for line in lines(tmp_path / "run")}
    assert len(found) == 12
    assert all(map(math.isfinite, found.values()))
    assert found[5] == 0 if not where else 0 < found[5] < found[4]
    saved = checkpoint_format.load(tmp_path / "run/last.pt")
    assert all(bool(torch.isfinite(v).all()) for v in saved["model"].values())


@pytest.mark.fault("T34", "a loss or a weight that is no number, on one process")
@pytest.mark.parametrize(
    "plant",
    [
        {"what": "loss", "value": "inf", "rank": 1},
        {"what": "loss", "value": "nan", "rank": 0},
        {"what": "weight", "value": "nan", "rank": 1},
    ],
    ids=str,
)
def test_all_processes_end_at_one_step_and_name_the_samples(start, tmp_path, plant):
    plants = {"spoil": {**plant, "step": 5}, "record": {"folder": str(tmp_path)}}
    settings = [*TOY, "run.dir=run", "trainer.save_every=3"]
    runs = start.train_group(*settings, plants=plants, code=3, within=60)
    first, second = ((tmp_path / f"ended-{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert "its samples: train_0" in errors(runs)
    assert saved_step(tmp_path / "run/last.pt") == 3


@pytest.mark.fault("T35", "a label out of range appears in the middle of a run")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_label_without_meaning_ends_the_run_with_its_path(start, tmp_path, data, workers):
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(tmp_path / "nine.png")
    path = tmp_path / "data/masks/train/train_5.png"
    plant = {"place": "os.replace", "arguments": [tmp_path / "nine.png", path], "step": 1}
    settings = [*data, "trainer.steps=100000", f"data.num_workers={workers}"]
    run = start.train(*settings, plants={"call": plant}, code=2)
    assert "train_5.png" in run.stderr()
    assert "9" in run.stderr()
    assert "Traceback" not in run.stderr()


@pytest.mark.fault("T47", "the same random numbers in several loader processes or epochs")
def test_draws_are_the_same_with_any_number_of_workers_and_never_repeat(
    start, straight, tmp_path, figure
):
    plants = {"record": {"folder": str(tmp_path)}}
    data = pictures(tmp_path / "data")
    start.train(*data, "run.dir=two", "trainer.steps=24", "data.num_workers=2", plants=plants)
    two = samples(tmp_path)
    (tmp_path / "samples-0.jsonl").unlink()
    start.train(*data, "run.dir=none", "trainer.steps=24", plants=plants)
    assert samples(tmp_path) == two
    drawn = [pair for pairs in two.values() for pair in pairs]
    assert len(drawn) == 48
    assert len(set(drawn)) == 48
    figure("48 of 48 draws of 4 epochs distinct, equal with 0 and 2 workers")
