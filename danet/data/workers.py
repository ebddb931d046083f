"""Worker processes of a loader: how they start, and errors for those that die or hang."""

import ctypes
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from types import TracebackType

import cv2

from danet.errors import ProcessError, StorageError

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_SHARED = "/dev/shm"
_MAX_NAMES = 12
# Messages of torch's signal handler in C++ (one process) and of its loader in Python (several).
_DEAD = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by signal: [^.]*|exited \w+)"
)


def init_worker(_: int) -> None:
    """Set up a new worker: one core, no signals meant for the trainer, an end with the trainer.

    A terminal and torchrun send a signal to a whole process group. The trainer handles it at the
    end of a step and needs its workers until then, so each has a group of its own. Workers exit
    with the trainer: on Linux at once, elsewhere when torch checks the parent, every few seconds.
    """
    cv2.setNumThreads(0)  # otherwise OpenCV starts a pool of threads in each worker
    sys.excepthook = _excepthook
    # Handlers are inherited, and the trainer's set flags that nobody reads here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if os.name == "posix":
        with suppress(OSError):
            os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        trainer = multiprocessing.parent_process()
        is_forked = multiprocessing.get_start_method() == "fork"
        # A worker of a fork server has the server as its parent.
        if is_forked and trainer is not None and os.getppid() != trainer.pid:
            os._exit(1)  # the trainer died before prctl
        # Slurm and systemd send SIGTERM to every process of a job, and torch's handler would exit.
        # Blocked before the thread starts, since sigwaitinfo needs it blocked in all threads.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_trainer, daemon=True).start()


def _excepthook(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an uncaught exception, unless the trainer has closed the connection."""
    # It does so after the death of another worker, which it reports itself.
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _exit_with_trainer() -> None:
    """Exit this worker on SIGTERM from the trainer; ignore it from other processes."""
    trainer = multiprocessing.parent_process()  # os.getppid may be a fork server
    assert trainer is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer.pid:
        pass
    os._exit(0)  # sys.exit would end this thread only


def explain(
    error: RuntimeError,
    samples: Sequence[str],
    timeout: float,
    codes: Mapping[int | None, int | None] | None = None,
) -> ProcessError | StorageError | None:
    """Return the error that describes a dead or hanging worker; None for errors of other causes.

    Args:
        error: Raised by torch's DataLoader.
        samples: Names of those being read, the awaited first.
        timeout: The setting ``data.timeout``.
        codes: Exit codes of the workers by process, negative for signals; torch's message does not
            always contain the signal.
    """
    text = f"{error.__cause__ or error} {error}"  # the cause names the signal
    if "shared memory" in text and "No space left" in text:
        return shared_memory_error()
    if "timed out after" in text:
        return ProcessError(
            f"no batch came within data.timeout={timeout:g} seconds: a worker hangs, or the "
            f"storage is slow; waited for {_shorten(samples)}"
        )
    killed = _DEAD.search(text)
    if not killed:
        return None
    numbers, how = killed[1].strip(), killed[2].strip()
    code = (codes or {}).get(int(numbers)) if numbers.isdigit() else None
    return _exit_error(numbers, _exit_text(code) if code is not None and code < 0 else how, samples)


def shared_memory_error() -> StorageError:
    """Return the error for full shared memory, through which workers pass batches."""
    return StorageError(f"no room for the batches of data.num_workers: {_shared_memory()}")


def _shared_memory() -> str:
    try:
        size, _, free = shutil.disk_usage(_SHARED)
        sizes = f"{_SHARED} has {free / 2**20:.1f} of {size / 2**20:.1f} MiB free"
    except OSError:
        sizes = "shared memory is full"
    return (
        f"{sizes}; data.num_workers=0 needs none, or enlarge it: docker run --shm-size=2g, or "
        f"mount -o remount,size=2g {_SHARED}"
    )


def exit_error(codes: Mapping[int | None, int | None], samples: Sequence[str]) -> ProcessError:
    """Return the error for workers that exited before the last batch; arguments as in explain."""
    number, code = next((number, code) for number, code in codes.items() if code is not None)
    return _exit_error(str(number), _exit_text(code), samples)


def _exit_text(code: int) -> str:
    if code < 0:
        return f"is killed by signal: {signal.strsignal(-code)}"
    return f"exited with code {code}"


def _shorten(samples: Sequence[str]) -> str:
    return ", ".join(samples[:_MAX_NAMES]) + (", ..." if len(samples) > _MAX_NAMES else "")


def _exit_error(numbers: str, how: str, samples: Sequence[str]) -> ProcessError:
    hint = ""
    if "Kill" in how:  # as by the kernel, when memory is exhausted
        hint = "; if nobody did that, the memory was full: fewer data.num_workers need less"
    elif "Bus" in how:  # from a write to a mapping that has no space left
        hint = f"; shared memory was full: {_shared_memory()}"
    return ProcessError(
        f"a worker that reads samples (process {numbers}) {how}{hint}; being read were "
        f"{_shorten(samples)}"
    )


def wait_for_exit(workers: Sequence[BaseProcess], seconds: float = 1.0) -> None:
    """Wait until a worker exits, at most ``seconds``."""
    exited = connection.wait([worker.sentinel for worker in workers], timeout=seconds)
    for worker in workers:
        if worker.sentinel in exited:
            worker.join()  # a sentinel may be ready before the exit code is


def terminate(workers: Sequence[BaseProcess]) -> None:
    """Terminate the workers that still run; torch would wait some seconds for each."""
    # In a forked copy of this process they are the children of another, and must live on.
    mine = set(multiprocessing.active_children())
    for worker in workers:
        if worker in mine:
            worker.terminate()
