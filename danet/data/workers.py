"""The processes that read samples: how they start, and what is said when one dies or hangs."""

import ctypes
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

import cv2

from danet.errors import ProcessError

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_SHOWN = 12
_DEAD = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by signal: [^.]*|exited \w+)"
)


def start(_: int) -> None:
    """Is called in a new worker: one core, no signals meant for the trainer, no life after it.

    OpenCV would start a pool of threads in each worker. A terminal and torchrun send a signal to
    the whole group of a process; the trainer acts on it when its step is done, and needs its
    workers until then, so they have a group of their own. They end when the trainer does, on Linux
    at once, elsewhere when torch looks after its parent, every few seconds.
    """
    cv2.setNumThreads(0)
    # Handlers are inherited, and the trainer's take notes that nobody here would read.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if os.name == "posix":
        with suppress(OSError):
            os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        # Slurm and systemd send SIGTERM to every process of a job, and torch's handler would obey.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_the_trainer, daemon=True).start()


def _obey_the_trainer() -> None:
    """Ends this worker when SIGTERM comes from the trainer; from others it is ignored."""
    trainer = multiprocessing.parent_process()  # the system's parent may be a server of forks
    assert trainer is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer.pid:
        pass
    os._exit(0)


def explain(
    error: RuntimeError,
    samples: Sequence[str],
    timeout: float,
    codes: Mapping[int, int | None] | None = None,
) -> ProcessError | None:
    """Says what became of a worker; None where the error is about something else.

    Args:
        error: What torch's DataLoader raised.
        samples: Names of those being read, the awaited first.
        timeout: The setting ``data.timeout``.
        codes: Exit codes of the workers by process, negated signals; torch does not always know.
    """
    text = f"{error.__cause__ or error} {error}"  # the cause knows the signal
    names = ", ".join(samples[:_SHOWN]) + (", ..." if len(samples) > _SHOWN else "")
    if "timed out after" in text:
        return ProcessError(
            f"no batch came within data.timeout={timeout:g} seconds: a worker hangs, or the "
            f"storage is slow; waited for {names}"
        )
    killed = _DEAD.search(text)
    if not killed:
        return None
    numbers, how = killed[1].strip(), killed[2].strip()
    code = (codes or {}).get(int(numbers)) if numbers.isdigit() else None
    if code is not None and code < 0:
        how = f"is killed by signal: {signal.strsignal(-code)}"
    hint = ""
    if "Kill" in how:
        hint = "; if nobody did that, the memory was full: fewer data.num_workers need less"
    elif "Bus" in how:
        hint = "; shared memory was full: enlarge /dev/shm, or use fewer data.num_workers"
    return ProcessError(
        f"a worker that reads samples (process {numbers}) {how}{hint}; being read were {names}"
    )
