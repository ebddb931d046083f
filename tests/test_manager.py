"""A run keeps the checkpoints it promises, whole, whatever happens to the process."""

import itertools
import math
import os
import random
import subprocess
import sys
import time

import pytest
import torch
from conftest import batch
from conftest import make_trainer as make

from danet.checkpoint import format as checkpoint_format
from danet.checkpoint.manager import CheckpointManager, path_at, remove_leftovers
from danet.engine.settings import TrainSettings
from danet.errors import InputError, StorageError


def state_at(step, size=1000):
    return {
        "format": checkpoint_format.FORMAT,
        "step": step,
        "model": {"weight": torch.full((size,), float(step))},
        "scores": {"miou": 0.5},
    }


def manager_of(folder, best=(), **settings):
    """Return a manager that writes at once, unless the settings say otherwise."""
    policy = TrainSettings(**{"steps": 1, "save_in_background": False, **settings})
    return CheckpointManager(folder, policy, best=best)


def steps_in(folder):
    return [checkpoint_format.load(p)["step"] for p in sorted(folder.glob("step_*.pt"))]


@pytest.mark.parametrize(
    ("settings", "scores", "kept", "best"),
    [
        ({"keep_last": 2}, (0.3, 0.9, 0.4, None, 0.2), [2, 4, 5], 2),
        ({"keep_best": 2, "keep_every": 4, "keep_last": 1}, (5, 1, 7, 2, 6), [3, 4, 5], 3),
        ({}, (0.5, 0.5), [1, 2], 1),
        ({"best_by": "loss", "keep_best": 2}, (0.3, 0.9, 0.2, 0.8, 0.7), [1, 3, 4, 5], 3),
        ({"keep_best": 2}, (math.nan, 0.1, math.nan, 0.2, math.inf), [2, 4, 5], 4),
    ],
    ids=[
        *("the newest and the best", "several best and round ones", "the earlier of equal ones"),
        *("the lowest loss", "numbers alone"),
    ],
)
def test_the_checkpoints_that_are_asked_for_are_kept(tmp_path, settings, scores, kept, best):
    manager = manager_of(tmp_path, **settings)
    for step, score in enumerate(scores, start=1):
        manager.save(state_at(step), score=score)
    assert steps_in(tmp_path) == kept
    assert checkpoint_format.load(tmp_path / "last.pt")["step"] == len(scores)
    assert checkpoint_format.load(tmp_path / "best.pt")["step"] == best


def test_a_step_that_is_saved_again_is_one_of_the_best_once(tmp_path):
    manager = manager_of(tmp_path, keep_last=1, keep_best=2)
    for step, score in ((1, 0.45), (2, 0.5), (2, 0.5), (3, 0.1)):
        manager.save(state_at(step), score=score)
    assert manager.best == [(0.5, 2), (0.45, 1)]
    assert steps_in(tmp_path) == [1, 2, 3]
    assert checkpoint_format.load(tmp_path / "best.pt")["step"] == 2


@pytest.mark.parametrize("has_best", [True, False])
def test_an_attempt_that_was_given_up_is_set_aside(tmp_path, has_best):
    first = manager_of(tmp_path, keep_last=9, keep_best=2)
    for step in (1, 2, 3, 4):
        score = step / 10 if has_best or step > 2 else None
        first.save(state_at(step), score=score)
    saved = checkpoint_format.load(path_at(tmp_path, 2))
    second = manager_of(tmp_path, keep_last=1, best=[tuple(pair) for pair in saved["best"]])
    second.save(state_at(3), score=0.1 if has_best else None)
    assert steps_in(tmp_path) == ([2, 3] if has_best else [3])
    assert checkpoint_format.load(tmp_path / "last.pt")["step"] == 3
    kept = sorted(path.name for path in (tmp_path / "abandoned").iterdir())
    if has_best:
        assert checkpoint_format.load(tmp_path / "best.pt")["step"] == 2
        assert kept == ["step_000000004.pt"]
    else:
        assert not (tmp_path / "best.pt").exists()
        assert kept == ["best.pt", "step_000000004.pt"]
    second.save(state_at(4), score=0.9)
    assert checkpoint_format.load(tmp_path / "best.pt")["step"] == 4


def test_names_share_one_file_where_links_work_and_copy_it_where_not(tmp_path, monkeypatch):
    manager_of(tmp_path).save(state_at(1), score=0.5)
    assert (tmp_path / "last.pt").samefile(path_at(tmp_path, 1))

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    manager_of(tmp_path).save(state_at(2), score=0.6)
    assert not (tmp_path / "last.pt").samefile(path_at(tmp_path, 2))
    for name in ("last.pt", "best.pt"):
        assert checkpoint_format.load(tmp_path / name)["step"] == 2


@pytest.mark.fault("T26", "training goes on while a checkpoint is written")
def test_what_is_written_in_the_background_is_the_state_of_its_step(tmp_path, monkeypatch):
    write = checkpoint_format.save

    def slow(path, content):
        time.sleep(0.3)
        write(path, content)

    monkeypatch.setattr(checkpoint_format, "save", slow)
    manager = manager_of(tmp_path, save_in_background=True)
    weight = torch.ones(10)
    numbers = {"list": [1.0]}
    manager.save({**state_at(1), "model": {"weight": weight}, "x": numbers})
    weight.zero_()
    numbers["list"][0] = 2.0
    manager.close()
    saved = checkpoint_format.load(tmp_path / "last.pt")
    assert torch.equal(saved["model"]["weight"], torch.ones(10))
    assert saved["x"] == {"list": [1.0]}


def test_leftovers_of_dead_processes_are_removed_and_others_left(tmp_path):  # T02
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftover = tmp_path / f".step_000000003.pt.{dead.pid}.tmp"
    ours, foreign = tmp_path / f".last.pt.{os.getpid()}.tmp", tmp_path / ".notes.tmp"
    for path in (leftover, ours, foreign):
        path.write_bytes(b"x")
    remove_leftovers(tmp_path)
    assert not leftover.exists()
    assert ours.exists()
    assert foreign.exists()


@pytest.mark.fault("T21", "a flipped byte in the weights or the keys, an appended tail")
def test_any_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint_format.save(path, state_at(7))
    written = path.read_bytes()
    places = random.Random(0).sample(range(len(written)), 150)
    for place in [*places, 0, len(written) - 1, len(written) - 32, len(written) - 40]:
        data = bytearray(written)
        data[place] ^= 1 << (place % 8)
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"damaged|not a checkpoint"):
            checkpoint_format.load(path)
    path.write_bytes(written + b"x")
    with pytest.raises(InputError, match="damaged"):
        checkpoint_format.load(path)


@pytest.fixture
def full_disk(monkeypatch):
    """Returns the steps whose checkpoints fail."""
    failing, save = set(), checkpoint_format.save

    def fail(path, content):
        if content["step"] in failing:
            raise StorageError(f"{path}: the disk is full")
        save(path, content)

    monkeypatch.setattr(checkpoint_format, "save", fail)
    return failing


@pytest.mark.fault("T17", "the disk is full, or a quota is reached, while a checkpoint is written")
def test_a_failed_checkpoint_may_only_be_reported(tmp_path, full_disk, capfd):
    full_disk |= {2, 6}
    run = make(tmp_path, steps=8, save_every=2, on_storage_error="warn")
    run.fit(map(batch, itertools.count()))
    said = capfd.readouterr().err
    assert said.count("the disk is full; the training goes on") == 2
    assert checkpoint_format.load(tmp_path / "last.pt")["step"] == 8


@pytest.mark.parametrize(
    ("failing", "settings"),
    [
        (2, {"steps": 30, "eval_every": 30, "save_every": 2, "save_in_background": False}),
        (4, {"steps": 4, "on_storage_error": "stop"}),
        (4, {"steps": 4, "on_storage_error": "warn"}),
    ],
    ids=["at the next step", "the last one", "the last one must be written"],
)
def test_a_failed_checkpoint_stops_the_run(tmp_path, full_disk, failing, settings):
    full_disk.add(failing)
    run = make(tmp_path, **settings)
    with pytest.raises(StorageError, match=rf"step_00000000{failing}.pt: the disk is full"):
        run.fit(map(batch, itertools.count()))
    assert run.step <= failing + 1
