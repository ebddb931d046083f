"""Worker processes of a loader: how they start, and errors for those that die or hang."""

import ctypes
import errno
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from types import TracebackType

import cv2

from danet.errors import ProcessError, StorageError

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_SHARED = "/dev/shm"
_MAX_NAMES = 12
Names = Callable[[], Sequence[str]]


def init_worker(_: int) -> None:
    """Set up a new worker: one core, no signals meant for the trainer, an end with the trainer.

    A terminal and torchrun send a signal to a whole process group. The trainer handles it at the
    end of a step and needs its workers until then, so each has a group of its own. Workers exit
    with the trainer: on Linux at once, elsewhere when torch checks the parent, every few seconds.
    """
    cv2.setNumThreads(0)  # otherwise OpenCV starts a pool of threads in each worker
    sys.excepthook = _excepthook
    # Handlers are inherited, and the trainer's set flags that are not read here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if os.name == "posix":
        with suppress(OSError):
            os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
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
    error: Exception, workers: Sequence[BaseProcess], names: Names, timeout: float
) -> ProcessError | StorageError | None:
    """Return the error that describes a dead or hanging worker; None for errors of other causes.

    ``error`` is of torch's DataLoader, ``timeout`` the setting ``data.timeout``. ``names`` returns
    those of the samples being read, the awaited first.
    """
    text = f"{error.__cause__} {error}"
    # Of a batch, or of the workers' locks, which lie in shared memory as well.
    is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if is_full or ("shared memory" in text and "No space left" in text):
        return StorageError(f"no room for the batches of data.num_workers: {_shared_memory()}")
    if "timed out after" in text:
        return ProcessError(
            f"no batch came within data.timeout={timeout:g} seconds: a worker hangs, or the "
            f"storage is slow; waited for {_shorten(names())}"
        )
    if isinstance(error, (ConnectionError, EOFError)):
        # A connection breaks a little before its process has an exit code.
        exited = connection.wait([worker.sentinel for worker in workers], timeout=1.0)
        for worker in workers:
            if worker.sentinel in exited:
                worker.join()  # a sentinel may be ready before the exit code is
    elif "DataLoader worker (pid" not in text:  # of torch's signal handler, or of its loader
        return None
    return exit_error(workers, names)


def exit_error(workers: Sequence[BaseProcess], names: Names) -> ProcessError | None:
    """Return the error for a worker that has exited; None if all run."""
    exited = [(worker.exitcode, worker.pid) for worker in workers if worker.exitcode is not None]
    if not exited:
        return None
    code, number = min(exited)  # signals are negative, and the others may follow from them
    how = f"exited with code {code}"
    if code < 0:
        how = f"is killed by signal: {signal.strsignal(-code)}"
    if "Kill" in how:  # as by the kernel, when memory is exhausted
        how += "; unless somebody killed it, memory was full: fewer data.num_workers need less"
    elif "Bus" in how:  # from a write to a mapping that has no space left
        how += f"; shared memory was full: {_shared_memory()}"
    how = f"a worker that reads samples (process {number}) {how}"
    return ProcessError(f"{how}; being read were {_shorten(names())}")


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


def _shorten(samples: Sequence[str]) -> str:
    return ", ".join(samples[:_MAX_NAMES]) + (", ..." if len(samples) > _MAX_NAMES else "")


def terminate(workers: Sequence[BaseProcess]) -> bool:
    """Terminate the workers that still run; return whether all have ended.

    Torch alone would wait some seconds for each.
    """
    # In a forked copy of this process they are the children of another, and must live on.
    mine = set(multiprocessing.active_children())
    running = [worker for worker in workers if worker in mine]
    joins: list[Callable[[], None]] = [partial(worker.join, timeout=1.0) for worker in running]
    # Joined twice, since torch's handler of SIGCHLD may raise anywhere that one was terminated.
    for step in [*(worker.terminate for worker in running), *joins, *joins]:
        with suppress(RuntimeError):
            step()
    return all(worker.exitcode is not None for worker in workers)  # None for those of another
