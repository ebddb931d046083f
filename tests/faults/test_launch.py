"""The launch scripts tell a preemption from a crash, with stand-ins for what Slurm provides."""

import os
import signal
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from danet.distributed.launcher import require_sound
from faults.toy import TOY, members, saved_step, step_of, until

pytestmark = pytest.mark.slow

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
echo "$@" >> "$CALLS/srun"
if [ -n "${STAND_IN:-}" ]; then eval "$STAND_IN"; fi
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$CALLS/scontrol"
if [ "$1 $2" = "show hostnames" ]; then echo localhost; fi
"""


@pytest.fixture
def calls(tmp_path):
    """Returns a folder with stand-ins for srun and scontrol, which note how they are called."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    return tmp_path


def requeues(folder):
    path = folder / "scontrol"
    return path.read_text().splitlines().count("requeue 7") if path.exists() else 0


@pytest.fixture
def launch(start, calls):
    """Returns a function that starts a launch script for the folder ``run``."""

    def launched(script, *settings, env=None):
        environment = {
            **{**os.environ, "PATH": f"{calls / 'bin'}{os.pathsep}{os.environ['PATH']}"},
            **{"CALLS": str(calls), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
            **{"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_GPUS_ON_NODE": "2"},
            **{"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", **(env or {})},
        }
        path = ROOT / "scripts/launch" / script
        return start.execute(["bash", str(path), str(calls / "run"), *settings], environment)

    return launched


def step_processes(run):
    """Returns the processes that Slurm signals: those of srun, not the script of the job."""
    found = []
    for pid in members(run.pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"tools/train.py" in words:
            found.append(pid)
    return found


@pytest.mark.fault("T58", "a process dies, and the launcher ends the others with SIGTERM")
def test_a_crash_is_not_taken_for_a_preemption(launch, calls, figure):
    """Process 1 is killed at the first evaluation of every attempt, as by a lack of memory."""
    (calls / "plant").mkdir()
    (calls / "plant/sitecustomize.py").write_text(
        "import glob, os, signal, threading, time\n"
        "def watch():\n"
        "    while not glob.glob(os.environ['WATCH']):\n"
        "        time.sleep(0.02)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if os.environ.get('RANK') == '1':\n"
        "    threading.Thread(target=watch, daemon=True).start()\n"
    )
    env = {"RESTARTS": "1", "PROCESSES": "2", "PYTHONPATH": str(calls / "plant")}
    env["WATCH"] = str(calls / "run/step_000000004.pt")
    launch("torchrun.sh", *TOY, "trainer.eval_every=4", env=env).ends(1)
    assert not (calls / "run/stopped").exists()
    assert saved_step(calls / "run/last.pt") >= 4
    figure("2 attempts, no `stopped`")


@pytest.mark.fault("T59", "preemption on Slurm: the job goes back into the queue while it advances")
def test_a_preempted_job_goes_back_into_the_queue_and_ends_when_it_is_done(launch, calls, figure):
    settings = [*TOY, "trainer.steps=100000", "trainer.save_minutes=0"]
    job = launch("slurm.sbatch", *settings)
    until(lambda: step_of(calls / "run") >= 3, job, within=100, what="three steps")
    for pid in step_processes(job):
        os.kill(pid, signal.SIGTERM)
    job.ends()
    assert requeues(calls) == 1
    assert (calls / "run/stopped").exists()
    step = saved_step(calls / "run/last.pt")
    # From the queue: the same line again. It ends, and nothing asks for more.
    launch("slurm.sbatch", f"trainer.stop_at={step + 2}").ends()
    assert saved_step(calls / "run/last.pt") == step + 2
    assert not (calls / "run/stopped").exists()
    assert requeues(calls) == 1
    figure(f"stopped at step {step}, requeued once, went on to step {step + 2}")


@pytest.mark.fault("T59", "preemption on Slurm: the job goes back into the queue while it advances")
@pytest.mark.parametrize("allowed", [0, 2])
def test_a_job_that_comes_no_further_is_not_put_back_for_ever(launch, calls, allowed):
    folder = calls / "run"
    folder.mkdir()
    env = {"STALLS": str(allowed)} if allowed else {}

    def job(*files, code=0):
        env["STAND_IN"] = f"touch {' '.join(str(folder / f) for f in ('stopped', *files))}; exit 1"
        ended = launch("slurm.sbatch", env=env)
        ended.ends(code)
        return ended.said()

    for _ in range(allowed + 1):  # the first time there is nothing to compare with
        job()
    assert "error: stopped at step 0, where the job before was stopped, too" in job(code=1)
    assert requeues(calls) == allowed + 1
    # One that advances is always put back, and the count restarts.
    for step in range(8, 13):
        job(f"step_{step:09d}.pt")
    assert requeues(calls) == allowed + 6
    for _ in range(allowed):
        job()
    job(code=1)
    assert requeues(calls) == 2 * allowed + 6


@pytest.mark.fault("T59", "preemption on Slurm: the job goes back into the queue while it advances")
@pytest.mark.parametrize(("stand_in", "code"), [("exit 1", 1), ("exit 0", 0), ("exit 3", 3)])
def test_a_job_that_failed_or_is_done_is_not_put_back(launch, calls, stand_in, code):
    folder = calls / "run"
    folder.mkdir()
    (folder / "requeued").write_text(f"a[$(touch {calls}/ran)] 0\n")
    launch("slurm.sbatch", env={"STAND_IN": stand_in}).ends(code)
    assert requeues(calls) == 0
    launch("slurm.sbatch", env={"STAND_IN": f"touch {folder}/stopped; exit 1"}).ends()
    assert requeues(calls) == 1
    assert not (calls / "ran").exists()


@pytest.mark.fault("T60", "variables of a launcher that cannot be right")
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"LOCAL_RANK": "0"},
        {"MASTER_PORT": "tcp://10.0.0.1:80"},  # Kubernetes, of a service called master
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"},
    ],
    ids=str,
)
def test_variables_that_may_be_right_pass(variables):
    require_sound(variables)


@pytest.mark.fault("T60", "variables of a launcher that cannot be right")
@pytest.mark.parametrize(
    ("variables", "reported"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2: expected at most 1"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two: expected a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 and no MASTER_ADDR"),
        ({"RANK": "1"}, "RANK=1 and no WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 and no RANK"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1: expected a whole number"),
        ({"RANK": "", "WORLD_SIZE": "1"}, "RANK=: expected a whole number"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x: expected a whole number"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2 of LOCAL_WORLD_SIZE=2"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "99999"},
            "MASTER_PORT=99999: expected 1 to 65535",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "http"},
            "MASTER_PORT=http: expected a whole number",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("tool", ["train", "eval", "predict"])
def test_launcher_variables_are_refused_at_once(start, variables, reported, tool):
    typed = TOY if tool == "train" else ["checkpoint=x"]
    # Usually 0.1 s; a process that waits for others does so for minutes.
    run = start.train(*typed, env=variables, tool=tool, code=2, within=30)
    (line,) = run.stderr().strip().splitlines()
    assert line.startswith(f"error: {reported}")
    assert line.endswith("start the processes with torchrun, or unset the variable")
