"""Whatever moment a process is killed at, the run ends as if nothing had happened."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from danet.checkpoint import format as checkpoint_format
from danet.checkpoint.manager import by_age, path_at
from faults.toy import (
    TOY,
    all_end,
    fingerprint,
    forking,
    is_alive,
    samples,
    saved_step,
    step_of,
    until,
)

pytestmark = pytest.mark.slow

STEPS = 12
OFTEN = ["trainer.save_every=3"]


def save_for_ever(folder, first):
    """Saves step after step; the target of the processes that are killed."""
    from danet.checkpoint.manager import CheckpointManager, remove_leftovers
    from danet.engine.settings import TrainSettings

    folder = Path(folder)
    remove_leftovers(folder)
    settings = TrainSettings(steps=1, keep_last=2, save_in_background=False)
    manager, step = CheckpointManager(folder, settings), first
    (folder / "ready").touch()
    while True:
        step += 1
        state = {
            "format": checkpoint_format.FORMAT,
            "step": step,
            "model": {"weight": torch.full((200_000,), float(step))},
        }
        manager.save(state, score=step / 1e9)


@pytest.mark.fault("T01", "kill -9 at a random moment while checkpoints are written")
def test_200_kills_leave_a_whole_newest_checkpoint(tmp_path, figure):
    context = forking()
    draw, step, kills, torn = random.Random(1), 0, 200, 0
    for number in range(kills):
        process = context.Process(target=save_for_ever, args=(str(tmp_path), step), daemon=True)
        process.start()
        wanted = "ready" if number else "last.pt"
        until((tmp_path / wanted).exists, what="the start of saving")
        time.sleep(draw.random() * 0.3)
        os.kill(process.pid, signal.SIGKILL)
        (tmp_path / "ready").unlink()
        process.join()
        process.close()
        torn += len(list(tmp_path.glob(".*.tmp")))
        found = by_age(tmp_path)
        assert found[0].name == "last.pt"
        for path in found:
            saved = checkpoint_format.load(path)  # refuses what is not whole
            assert bool((saved["model"]["weight"] == saved["step"]).all())
        newest = saved_step(tmp_path / "last.pt")
        assert newest >= step
        step = newest
    assert torn > 0, "no kill fell into a write"
    figure(f"{kills} kills, {torn} within a write, {step} checkpoints: 0 unreadable, 0 missing")


@pytest.mark.fault("T02", "kill -9 between writing a checkpoint and renaming it")
def test_a_checkpoint_that_was_not_renamed_is_not_used_and_removed(start, straight, tmp_path):
    plants = {"die_before_rename": {"step": 6}}
    start.train(*TOY, *OFTEN, "run.dir=run", plants=plants, code=-signal.SIGKILL)
    folder = tmp_path / "run"
    (leftover,) = folder.glob(".*.tmp")
    assert leftover.name.startswith(".step_000000006.pt.")
    assert saved_step(folder / "last.pt") == 3
    start.train(*TOY, *OFTEN, "run.dir=run", "resume=auto")
    assert not leftover.exists()
    assert fingerprint(folder / "last.pt") == straight(*OFTEN)[0]


@pytest.mark.fault("T03", "kill -9 after each step")
def test_a_run_killed_after_any_step_ends_like_a_whole_one(start, straight, tmp_path, figure):
    expected, _ = straight(*OFTEN)
    for step in range(1, STEPS + 1):
        settings = [*TOY, *OFTEN, f"run.dir=run{step}", "resume=auto"]
        start.train(*settings, plants={"signal_after": {"step": step}}, code=-signal.SIGKILL)
        start.train(*settings)
        assert fingerprint(tmp_path / f"run{step}/last.pt") == expected, step
    figure(f"{STEPS} of {STEPS} runs: SHA-256 equal")


@pytest.mark.fault("T04", "kill -9 of one of two processes")
@pytest.mark.parametrize("step", [5, 12])
def test_two_processes_of_which_one_is_killed_go_on_bit_equal(start, straight, tmp_path, step):
    settings = [*TOY, *OFTEN, "run.dir=run", "resume=auto"]
    runs = start.fork_group(*settings, plants={"signal_after": {"step": step, "rank": 1}})
    all_end(runs, within=30)
    assert runs[1].code() == -signal.SIGKILL
    assert runs[0].code() != 0
    start.train_group(*settings, plants={"record": {"folder": str(tmp_path)}})
    expected, whole = straight(*OFTEN, processes=2)
    assert fingerprint(tmp_path / "run/last.pt") == expected
    again, before = samples(tmp_path), samples(whole)
    assert again == {step: before[step] for step in again}


@pytest.mark.fault("T05", "kill -9 with loader processes, with accumulation, average and OHEM")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_stopping_anywhere_changes_nothing(
    start, straight, tmp_path, figure, processes, workers, accumulate
):
    """The matrix of what takes part in a step: each cell is stopped once and killed once."""
    more = [*OFTEN, f"trainer.accumulate={accumulate}", "trainer.ema_decay=0.9", "loss=ohem"]
    expected, _ = straight(*more, processes=processes)  # without loader processes
    settings = [*TOY, *more, f"data.num_workers={workers}", "run.dir=run", "resume=auto"]
    draw = random.Random(f"{processes} {workers} {accumulate}")
    stop, kill = draw.randint(1, 5), draw.randint(6, 11)
    start.train_group(*settings, f"trainer.stop_at={stop}", processes=processes)
    plant = {"signal_after": {"step": kill, "rank": processes - 1}}
    runs = start.fork_group(*settings, processes=processes, plants=plant)
    all_end(runs, within=60)
    assert runs[-1].code() == -signal.SIGKILL
    start.train_group(*settings, processes=processes)
    assert fingerprint(tmp_path / "run/last.pt") == expected
    figure(f"processes {processes}, workers {workers}, accumulation {accumulate}: equal")


@pytest.mark.fault("T09", "kill -9 of one of two processes under torchrun --max-restarts=1")
def test_torchrun_restarts_a_run_to_the_same_end(start, straight, tmp_path, figure):
    repeats = int(os.environ.get("DANET_FAULT_RESTARTS", "2"))
    expected, _ = straight(*OFTEN, processes=2)
    for number in range(repeats):
        settings = [*TOY, *OFTEN, f"run.dir=run{number}", "resume=auto"]
        killed = {"signal_after": {"step": 5, "rank": 1, "once": str(tmp_path / f"killed{number}")}}
        start.torchrun(*settings, restarts=1, plants=killed).ends(0, within=200)
        assert (tmp_path / f"killed{number}").exists()
        assert fingerprint(tmp_path / f"run{number}/last.pt") == expected
    figure(f"{repeats} of {repeats} restarts finished, SHA-256 equal")


@pytest.mark.fault("T11", "the launcher is killed with -9")
def test_processes_do_not_outlive_their_launcher(start, tmp_path, figure):
    launcher = start.torchrun(*TOY, "run.dir=run", "trainer.steps=100000")
    until(lambda: step_of(tmp_path / "run") >= 3, launcher, within=90, what="three steps")
    workers = start.workers()
    assert len(workers) == 2
    assert all(map(is_alive, workers))
    launcher.kill()
    since = time.monotonic()
    until(lambda: not any(map(is_alive, workers)), within=10, what="the end of the workers")
    figure(f"workers gone after {time.monotonic() - since:.1f} s")
    saved = checkpoint_format.load(tmp_path / "run/last.pt")  # they had the time to write one
    assert saved["step"] >= 3
    assert path_at(tmp_path / "run", saved["step"]).exists()


@pytest.mark.fault("T07", "going on with another number of processes")
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_every_step_has_its_samples_on_any_number_of_processes(
    start, straight, tmp_path, before, after
):
    _, whole = straight("data.batch_size=4")
    sizes = {1: "data.batch_size=4", 2: "data.batch_size=2"}
    plants = {"record": {"folder": str(tmp_path)}}
    first = [*TOY, sizes[before], "run.dir=run", "trainer.stop_at=5"]
    start.train_group(*first, processes=before, plants=plants)
    assert samples(tmp_path) == samples(whole, steps=5)
    again = ["resume=auto", "run.dir=run", sizes[after]]
    runs = start.train_group(*again, processes=after, plants=plants)
    assert "so weights are not bit-equal" in runs[0].stdout()
    assert samples(tmp_path) == samples(whole)


@pytest.mark.fault("T08", "stopping inside an epoch that batches do not fill")
def test_no_sample_is_lost_or_repeated_in_an_epoch(start, tmp_path, figure):
    """Ten pictures, four a step: three epochs are seven and a half steps."""
    data = [*TOY, "data.lengths={train:10,val:2,test:2}", "trainer.steps=15", "run.dir=run"]
    plants = {"record": {"folder": str(tmp_path)}}
    start.train_group(*data, "trainer.stop_at=4", plants=plants)
    start.train_group("resume=auto", "run.dir=run", plants=plants)
    per_step = samples(tmp_path)
    stream = [name for step in range(15) for name, _ in per_step[step]]
    assert len(stream) == 60
    counts = {name: stream.count(name) for name in stream}
    assert len(counts) == 10
    assert set(counts.values()) == {6}
    # Within one step samples are sorted, so the borders are looked at where steps end epochs.
    for epoch in range(0, 60, 20):
        assert sorted(stream[epoch : epoch + 20]) == sorted(list(counts) * 2)
    figure("6 epochs of 10 pictures in steps of 4: each once an epoch")
