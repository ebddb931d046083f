"""A run of seconds, and the means to start, watch, hurt and compare it."""

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from conftest import ROOT, TINY, plant

from danet.checkpoint import format as checkpoint_format
from danet.distributed.failures import is_alive
from faults import driver

SMALL = ["data.size=[64,64]", "data.num_workers=0", "trainer.log_every=1", "trainer.steps=12"]
TOY = [*TINY, *SMALL]  # of one key the last value counts
PATIENCE = float(os.environ.get("DANET_FAULT_PATIENCE", "1"))
"""Multiplies every time limit, for machines that do other work meanwhile."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


def pictures(root, *, train=12, val=4):
    """Makes a folder of pictures with four classes; returns the settings that name it."""
    plant(root, values=range(4), splits=(("train", train), ("val", val)), size=(64, 64))
    return [
        "data=folder",
        f"data.root={root}",
        "data.classes=[a,b,c,d]",
        "data.crop=[64,64]",
        "data.batch_size=2",
        "data.num_workers=0",
        *(setting for setting in TOY if not setting.startswith("data.")),
    ]


class Started:
    """A process under way.

    Args:
        process: A subprocess.Popen, or a process of multiprocessing.
        output: Path before .stdout and .stderr of the files with what it says.
    """

    def __init__(self, process, output):
        self.process = process
        self.pid = process.pid
        self._output = output

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def code(self):
        """Returns the exit code, the negated signal, or None while it runs."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        return self.process.exitcode

    def ends(self, code=0, *, within=200.0):
        """Waits for the end and demands the exit code; returns how many seconds it took."""
        since = time.monotonic()
        until(lambda: self.code() is not None, self, within=within, what="its end")
        assert self.code() == code, f"exit {self.code()}\n{self.said()}"
        return time.monotonic() - since

    def stdout(self):
        return self._read("stdout")

    def stderr(self):
        return self._read("stderr")

    def _read(self, name):
        path = Path(f"{self._output}.{name}")
        return path.read_text() if path.exists() else ""

    def said(self):
        return f"{self.stdout()[-3000:]}\n{self.stderr()[-3000:]}"


def until(condition, *runs, within=60.0, what="this"):
    """Polls until ``condition()`` is true and returns its value; fails when time is up.

    A run that ends although the condition does not hold fails the test at once.
    """
    deadline = time.monotonic() + within * PATIENCE
    while True:
        ended = [run for run in runs if run.code() is not None]
        value = condition()
        if value:
            return value
        heard = "\n".join(run.said() for run in runs)
        assert not ended, f"ended with {[r.code() for r in ended]} before {what}\n{heard}"
        assert time.monotonic() < deadline, f"waited {within * PATIENCE} s for {what}\n{heard}"
        time.sleep(0.02)


def errors(runs):
    """Returns what all processes of a group wrote to stderr."""
    return "".join(run.stderr() for run in runs)


def all_end(runs, *, within):
    """Waits until all have ended, with whatever code."""
    for run in runs:
        until(lambda run=run: run.code() is not None, within=within, what="the end")


def members(session):
    """Returns the living processes of a session: a run that was started here, and its loader's."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and is_alive(int(entry)):
            with suppress(ProcessLookupError):
                if os.getsid(int(entry)) == session:
                    found.append(int(entry))
    return found


def lines(folder, kind="train"):
    """Returns the lines of metrics.jsonl of a kind, without one that is being written."""
    path = Path(folder) / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if line["kind"] == kind]


def step_of(folder):
    """Returns the last step that was logged, 0 before."""
    return max((line["step"] for line in lines(folder)), default=0)


def samples(folder, *, steps=None):
    """Returns step -> sorted (name, sum of pixels) over all processes, from the plant ``record``.

    Steps that were done again must have had the same samples.
    """
    per_rank = {}
    for path in sorted(Path(folder).glob("samples-*.jsonl")):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            pairs = list(zip(line["names"], line["sums"], strict=True))
            assert per_rank.setdefault((path.name, line["step"]), pairs) == pairs
    found = {}
    for (_, step), pairs in per_rank.items():
        found.setdefault(step, []).extend(pairs)
    return {step: sorted(pairs) for step, pairs in found.items() if steps is None or step < steps}


def forking():
    """Returns how to fork processes from one, made at the first use, that has all imports."""
    # The server finds its imports by the environment; in there it has one thread, as forks need.
    os.environ["PYTHONPATH"] = f"{driver.TESTS}{os.pathsep}{ROOT}"
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults.preload"])
    return context


class Starter:
    """Starts processes in a folder and leaves none behind.

    Args:
        folder: Where they run.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.pids = self.folder / ".pids"
        self.pids.mkdir()
        self._started = []
        self._count = 0
        self._context = forking()

    def _spec(self, tool, settings, plants):
        self._count += 1
        output = self.folder / f".process-{self._count}"
        return {
            "tool": tool,
            "settings": [str(setting) for setting in settings],
            "plants": plants or {},
            "pids": str(self.pids),
            "cwd": str(self.folder),
            "output": str(output),
        }

    def fork(self, *settings, plants=None, env=None, tool="train"):
        """Starts a tool in a process that has its imports already."""
        spec = self._spec(tool, settings, plants)
        process = self._context.Process(
            target=driver.child, args=(spec, {**ENVIRONMENT, **(env or {})})
        )
        process.start()
        return self._keep(Started(process, spec["output"]))

    def fork_group(self, *settings, processes=2, plants=None, env=None, tool="train"):
        """Starts processes that find each other, as torchrun would, without its seconds."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.fork(
                *settings,
                plants=plants,
                tool=tool,
                env={
                    **{k: str(v) for k, v in {**shared, "RANK": i, "LOCAL_RANK": i}.items()},
                    **(env or {}),
                },
            )
            for i in range(processes)
        ]

    def start(self, *settings, plants=None, env=None, tool="train", launcher=(), only=None):
        """Starts a tool in a fresh interpreter; ``only`` replaces the whole environment."""
        spec = self._spec(tool, settings, plants)
        command = [sys.executable, *launcher, str(Path(driver.__file__)), json.dumps(spec)]
        environment = {**os.environ, **ENVIRONMENT, **(env or {})} if only is None else only
        return self.execute(command, environment, spec["output"])

    def execute(self, command, environment, output=None):
        """Starts any program."""
        output = output or self._spec("", (), {})["output"]
        with open(f"{output}.stdout", "w") as out, open(f"{output}.stderr", "w") as err:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        return self._keep(Started(process, output))

    def torchrun(self, *settings, processes=2, restarts=0, options=("--standalone",), **rest):
        """Starts a tool under torchrun."""
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        launcher += [f"--max-restarts={restarts}", *options]
        return self.start(*settings, launcher=launcher, **rest)

    def train(self, *settings, code=0, within=200.0, **rest):
        """Trains to the end, alone."""
        run = self.fork(*settings, **rest)
        run.ends(code, within=within)
        return run

    def train_group(self, *settings, code=0, within=200.0, **rest):
        """Trains to the end with several processes."""
        runs = self.fork_group(*settings, **rest)
        for run in runs:
            run.ends(code, within=within)
        return runs

    def workers(self):
        """Returns the process ids of all tools that were started, by torchrun, too."""
        return [int(path.name) for path in self.pids.iterdir()]

    def _keep(self, run):
        self._started.append(run)
        return run

    def close(self):
        """Kills what is left, with the loader's processes, and waits for it."""
        sessions = {*self.workers(), *(run.pid for run in self._started)}
        for pid in {pid for session in sessions for pid in (session, *members(session))}:
            with suppress(ProcessLookupError, PermissionError):
                if is_alive(pid):
                    os.kill(pid, signal.SIGKILL)
        for run in self._started:
            if isinstance(run.process, subprocess.Popen):
                run.process.wait(10)
            else:
                run.process.join(10)
                if run.process.exitcode is not None:
                    run.process.close()


def fingerprint(path):
    """SHA-256 over weights and optimizer, tensor by tensor."""
    saved, digest = checkpoint_format.load(path), hashlib.sha256()

    def feed(node):
        if isinstance(node, dict):
            for key in sorted(node, key=str):
                digest.update(str(key).encode())
                feed(node[key])
        elif isinstance(node, (list, tuple)):
            for item in node:
                feed(item)
        elif isinstance(node, torch.Tensor):
            digest.update(node.contiguous().numpy().tobytes())
        else:
            digest.update(repr(node).encode())

    feed([saved["model"], saved["ema"], saved["optimizer"], saved["scaler"], saved["step"]])
    return digest.hexdigest()


def saved_step(path):
    """Returns the step of a checkpoint, which must be whole."""
    return checkpoint_format.load(path)["step"]
