"""Signals end a run between two steps with a checkpoint, or save one; nothing hangs."""

import os
import signal
import time

import pytest

from danet.checkpoint import format as checkpoint_format
from danet.distributed import signals
from faults.toy import (
    PATIENCE,
    TOY,
    all_end,
    errors,
    fingerprint,
    is_alive,
    lines,
    members,
    pictures,
    saved_step,
    step_of,
    until,
)

pytestmark = pytest.mark.slow

ENDLESS = [*TOY, "run.dir=run", "trainer.steps=100000"]
STOPPED = 143
EVALUATE = "danet.evaluation.evaluate.evaluate"
LIMIT = 25


def ended(folder):
    """Returns the steps at which the processes ended, from the plant ``record``."""
    return [int(path.read_text()) for path in sorted(folder.glob("ended-*"))]


@pytest.mark.fault("T12", "SIGTERM to the launcher")
def test_sigterm_to_torchrun_ends_all_processes_at_one_step(start, tmp_path, figure):
    plants = {"record": {"folder": str(tmp_path)}}
    launcher = start.torchrun(*ENDLESS, plants=plants)
    until(lambda: step_of(tmp_path / "run") >= 3, launcher, within=90, what="three steps")
    launcher.kill(signal.SIGTERM)
    seconds = launcher.ends(1, within=LIMIT)  # torchrun says 1 whatever its workers said
    first, second = ended(tmp_path)
    assert first == second
    assert saved_step(tmp_path / "run/last.pt") == first
    assert (tmp_path / "run/stopped").exists()
    assert not any(map(is_alive, start.workers()))
    figure(f"{seconds:.1f} s")


LAUNCHER, ONE, HANGUP = (
    pytest.mark.fault("T12", "SIGTERM to the launcher"),
    pytest.mark.fault("T13", "SIGTERM to one process of two"),
    pytest.mark.fault("T61", "SIGHUP, as of an ssh session that is closed"),
)


@pytest.mark.parametrize(
    ("name", "rank", "processes"),
    [
        pytest.param("SIGTERM", 0, 1, marks=LAUNCHER),
        *(pytest.param("SIGTERM", rank, 2, marks=ONE) for rank in (0, 1)),
        *(pytest.param("SIGHUP", count - 1, count, marks=HANGUP) for count in (1, 2)),
    ],
)
def test_a_signal_ends_all_processes_at_one_step_and_the_run_goes_on_bit_equal(
    start, straight, tmp_path, name, rank, processes
):
    run = tmp_path / "run"
    plants = {
        "signal_after": {"step": 5, "name": name, "rank": rank},
        "record": {"folder": str(tmp_path)},
    }
    how = {"processes": processes, "plants": plants, "code": STOPPED, "within": LIMIT}
    reported = errors(start.train_group(*TOY, "run.dir=run", **how))
    (step,) = set(ended(tmp_path))
    assert 5 <= step < 5 + processes  # what one raises, all know one step later
    assert reported.count("stopped by ") == 1
    assert f" at step {step} of 12; go on with resume=run/last.pt" in reported
    # Of two the one that reports first may know only that some process was signalled.
    assert f"stopped by {name}" in reported or processes > 1
    assert saved_step(run / "last.pt") == step
    assert (run / "stopped").exists()
    start.train_group("resume=run/last.pt", processes=processes)
    assert fingerprint(run / "last.pt") == straight(processes=processes)[0]
    assert not (run / "stopped").exists()


def held(tmp_path, runs):
    """Waits until a plant says that it is where it should be."""
    until(lambda: (tmp_path / "here").exists(), *runs, what="the place of the signal")


@pytest.mark.fault("T14", "SIGTERM while validating")
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_during_validation_leaves_it_and_loses_no_step(start, tmp_path, processes):
    plants = {"hold": {"place": EVALUATE, "path": str(tmp_path / "here")}}
    settings = [*TOY, "run.dir=run", "trainer.eval_every=6"]
    runs = start.fork_group(*settings, processes=processes, plants=plants)
    held(tmp_path, runs)
    for run in runs:
        run.kill(signal.SIGTERM)
    for run in runs:
        run.ends(STOPPED, within=LIMIT)
    assert saved_step(tmp_path / "run/last.pt") == 6
    # What was left out is made up for.
    start.train_group("resume=run/last.pt", processes=processes)
    assert [line["step"] for line in lines(tmp_path / "run", "val")] == [6, 12]


@pytest.mark.fault("T14", "SIGTERM while validating")
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_process_during_validation_hangs_nobody(start, tmp_path, rank):
    where = {"place": EVALUATE, "path": str(tmp_path / "here"), "seconds": 2.0}
    plants = {"hold": {**where, "rank": rank}}
    settings = [*TOY, "run.dir=run", "trainer.eval_every=6", "trainer.save_every=3"]
    runs = start.fork_group(*settings, plants=plants)
    held(tmp_path, runs)
    runs[rank].kill(signal.SIGTERM)
    all_end(runs, within=LIMIT)
    assert all(run.code() != 0 for run in runs)
    assert saved_step(tmp_path / "run/last.pt") == 6


@pytest.mark.fault("T14", "SIGTERM while a checkpoint is written")
@pytest.mark.parametrize("in_background", ["true", "false"])
def test_sigterm_during_a_save_lets_it_end(start, tmp_path, in_background):
    plants = {"hold_save": {"path": str(tmp_path / "here"), "seconds": 1.0, "step": 3}}
    settings = [*ENDLESS, "trainer.save_every=3", f"trainer.save_in_background={in_background}"]
    run = start.fork(*settings, plants=plants)
    held(tmp_path, [run])
    run.kill(signal.SIGTERM)
    run.ends(STOPPED, within=LIMIT)
    folder = tmp_path / "run"
    assert saved_step(folder / "step_000000003.pt") == 3
    assert saved_step(folder / "last.pt") >= 3
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.fault("T14", "SIGTERM while the last checkpoint is written")
def test_sigterm_during_the_last_save_lets_it_end(start, tmp_path):
    plants = {"hold_save": {"path": str(tmp_path / "here"), "seconds": 2.0, "step": 4}}
    run = start.fork(*TOY, "trainer.steps=4", "run.dir=run", plants=plants)
    held(tmp_path, [run])
    (tmp_path / "here").unlink()
    held(tmp_path, [run])  # once more, with the score
    time.sleep(0.5)  # by now the run waits for it
    run.kill(signal.SIGTERM)
    run.ends(0, within=LIMIT)
    saved = checkpoint_format.load(tmp_path / "run/last.pt")
    assert (saved["step"], saved["evaluated_at"]) == (4, 4)


@pytest.mark.fault("T14", "SIGTERM while the program is imported")
def test_sigterm_during_the_imports_ends_torchrun_and_leaves_nothing(start, tmp_path, figure):
    plants = {"hold": {"path": str(tmp_path / "here")}}
    launcher = start.torchrun(*ENDLESS, plants=plants)
    held(tmp_path, [launcher])
    launcher.kill(signal.SIGTERM)
    seconds = launcher.ends(1, within=LIMIT)
    assert not any(map(is_alive, start.workers()))
    assert not (tmp_path / "run").exists()
    figure(f"{seconds:.1f} s")


@pytest.mark.fault("T15", "a second SIGTERM, or Ctrl-C twice")
@pytest.mark.parametrize(("name", "pause"), [("SIGTERM", signals.SAME + 0.2), ("SIGINT", 0.0)])
def test_the_same_signal_again_ends_at_once(start, tmp_path, name, pause):
    plants = {"signal_after": {"step": 5, "name": name, "times": 2, "pause": pause}}
    number = 128 + signal.Signals[name]
    # In the background the checkpoint of step 3 might not have its name yet when the process ends.
    saving = ["trainer.save_every=3", "trainer.save_in_background=false"]
    run = start.train(*TOY, "run.dir=run", *saving, plants=plants, code=number)
    assert "stopped by" not in run.stderr()
    assert saved_step(tmp_path / "run/last.pt") == 3
    assert not (tmp_path / "run/stopped").exists()


@pytest.mark.fault("T16", "SIGUSR1")
@pytest.mark.parametrize("processes", [1, 2])
def test_sigusr1_saves_and_the_training_goes_on(start, straight, tmp_path, processes):
    plants = {
        "signal_after": {"step": 5, "name": "SIGUSR1", "rank": processes - 1},
        "record": {"folder": str(tmp_path)},
    }
    start.train_group(*TOY, "run.dir=run", processes=processes, plants=plants)
    saved = sorted(int(path.stem[5:]) for path in (tmp_path / "run").glob("step_*.pt"))
    assert saved == [4 + processes, 12]
    assert fingerprint(tmp_path / "run/last.pt") == straight(processes=processes)[0]


@pytest.mark.fault("T54", "Ctrl-C with loader processes")
@pytest.mark.parametrize("to_group", [False, True], ids=["alone", "whole group"])
def test_ctrl_c_leaves_no_processes_and_no_lock(start, tmp_path, to_group):
    """A terminal sends SIGINT to the loader's processes, too; a notebook to the main one alone."""
    settings = [*ENDLESS, "data.num_workers=2"]
    run = start.fork(*settings)
    until(lambda: step_of(tmp_path / "run") >= 3, run, what="three steps")
    group = members(run.pid)
    assert len(group) == 3
    (os.killpg if to_group else os.kill)(run.pid, signal.SIGINT)
    run.ends(STOPPED, within=LIMIT)
    until(lambda: not any(map(is_alive, group)), within=10, what="the end of the loader")
    assert "stopped by SIGINT at step" in run.stderr()
    assert "Traceback" not in run.stderr()
    step = saved_step(tmp_path / "run/last.pt")
    start.train("resume=auto", "run.dir=run", f"trainer.stop_at={step + 1}")


@pytest.mark.fault("T12", "SIGTERM to every process of a job, as Slurm sends it")
@pytest.mark.parametrize("during", ["training", "validation"])
def test_sigterm_to_loader_processes_too_still_ends_with_a_checkpoint(start, tmp_path, during):
    data = pictures(tmp_path / "data", val=40)
    plants = {}
    if during == "validation":
        where = {"place": EVALUATE, "path": str(tmp_path / "here"), "seconds": 1.0}
        plants = {"hold": where}
    settings = [*data, "run.dir=run", "trainer.steps=100000", "data.num_workers=2"]
    run = start.fork(*settings, "trainer.eval_every=6", plants=plants)
    if during == "validation":
        held(tmp_path, [run])
    else:
        until(lambda: step_of(tmp_path / "run") >= 3, run, what="three steps")
    since = time.monotonic()
    for pid in [*members(run.pid), run.pid]:  # torchrun sends it to the run a second time
        os.kill(pid, signal.SIGTERM)
    run.ends(STOPPED, within=LIMIT)
    assert saved_step(tmp_path / "run/last.pt") >= 3
    until(lambda: not members(run.pid), within=LIMIT, what="the end of the loader")
    assert time.monotonic() - since < LIMIT * PATIENCE
