"""The processes that read samples: how they start, and what is said when one dies or hangs."""

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
    sys.excepthook = _tell
    # Handlers are inherited, and the trainer's take notes that nobody here would read.
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
        if is_forked and trainer is not None and os.getppid() != trainer.pid:
            os._exit(1)  # it died before it could be followed
        # Slurm and systemd send SIGTERM to every process of a job, and torch's handler would obey.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_the_trainer, daemon=True).start()


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints what a thread has met, unless the trainer broke off the fetching of a batch.

    It does so when it hears that another worker died, which it tells itself.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


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
    codes: Mapping[int | None, int | None] | None = None,
) -> ProcessError | StorageError | None:
    """Says what became of a worker; None where the error is about something else.

    Args:
        error: What torch's DataLoader raised.
        samples: Names of those being read, the awaited first.
        timeout: The setting ``data.timeout``.
        codes: Exit codes of the workers by process, negated signals; torch does not always know.
    """
    text = f"{error.__cause__ or error} {error}"  # the cause knows the signal
    if "shared memory" in text and "No space left" in text:
        return no_room()
    if "timed out after" in text:
        return ProcessError(
            f"no batch came within data.timeout={timeout:g} seconds: a worker hangs, or the "
            f"storage is slow; waited for {_names(samples)}"
        )
    killed = _DEAD.search(text)
    if not killed:
        return None
    numbers, how = killed[1].strip(), killed[2].strip()
    code = (codes or {}).get(int(numbers)) if numbers.isdigit() else None
    return _lost(numbers, _end(code) if code is not None and code < 0 else how, samples)


def no_room() -> StorageError:
    """Returns what is wrong when the memory by which workers hand over batches is full."""
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


def lost(codes: Mapping[int | None, int | None], samples: Sequence[str]) -> ProcessError:
    """Says that workers have ended, which none does before the last batch.

    Args:
        codes: See ``explain``.
        samples: See ``explain``.
    """
    number, code = next((number, code) for number, code in codes.items() if code is not None)
    return _lost(str(number), _end(code), samples)


def _end(code: int) -> str:
    if code < 0:
        return f"is killed by signal: {signal.strsignal(-code)}"
    return f"exited with code {code}"


def _names(samples: Sequence[str]) -> str:
    return ", ".join(samples[:_SHOWN]) + (", ..." if len(samples) > _SHOWN else "")


def _lost(numbers: str, how: str, samples: Sequence[str]) -> ProcessError:
    hint = ""
    if "Kill" in how:
        hint = "; if nobody did that, the memory was full: fewer data.num_workers need less"
    elif "Bus" in how:
        hint = f"; shared memory was full: {_shared_memory()}"
    return ProcessError(
        f"a worker that reads samples (process {numbers}) {how}{hint}; being read were "
        f"{_names(samples)}"
    )


def await_end(readers: Sequence[BaseProcess], seconds: float = 1.0) -> None:
    """Waits for one that seems to die: its connections end a little before it does."""
    ending = connection.wait([reader.sentinel for reader in readers], timeout=seconds)
    for reader in readers:
        if reader.sentinel in ending:
            reader.join()


def end(readers: Sequence[BaseProcess]) -> None:
    """Ends those that still run; torch would wait some seconds for each.

    In a copy of this process, made by a fork, they are not its own, and nothing happens.
    """
    mine = set(multiprocessing.active_children())
    for reader in readers:
        if reader in mine:
            reader.terminate()
