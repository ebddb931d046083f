"""Processes that died, and exchanges that failed because of them."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from danet.distributed.error_reporting import POLL
from danet.errors import ProcessError, UserError, first_line

TIMEOUT = timedelta(minutes=10)  # gloo's default, 30 minutes, holds the machines of a dead run
"""How long an exchange waits for the other processes."""

_NOTICE = 2.0
"""Seconds for a dead process to disappear from the process table once its connection broke."""


def announce(store: Store, rank: int) -> None:
    """Record host and process id of a rank, so that other ranks can check whether it is alive."""
    store.set(f"process/{rank}", f"{socket.gethostname()} {os.getpid()}")


def local_pid(store: Store, rank: int) -> int | None:
    """Return the process id of a rank; None if it runs on another host or has none recorded."""
    key = f"process/{rank}"
    if not store.check([key]):
        return None
    host, pid = store.get(key).decode().split()
    return int(pid) if host == socket.gethostname() else None


def is_alive(pid: int) -> bool:
    """Return whether a process of this host runs; a zombie does not."""
    if os.name != "posix":  # on Windows signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists, under another user
        return True
    # Signal 0 reaches a zombie, which a dead worker is until its launcher has read the exit code.
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The name before the state may contain spaces and brackets itself.
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return not os.path.isdir("/proc/self")  # macOS has no /proc


def dead_ranks(seconds: float = 0.0) -> list[int]:
    """Return the ranks of this host whose process has ended; wait until one has.

    Args:
        seconds: The longest wait.
    """
    try:
        store = default_store()
        others = [other for other in range(dist.get_world_size()) if other != dist.get_rank()]
        pids = {other: local_pid(store, other) for other in others}
    except (RuntimeError, ValueError):  # the store died with the launcher
        return []
    deadline = time.monotonic() + seconds
    while True:
        dead = [other for other, pid in pids.items() if pid is not None and not is_alive(pid)]
        if dead or time.monotonic() >= deadline:
            return dead
        time.sleep(POLL)


def default_store() -> Store:
    """Return the store of the process group."""
    return dist.distributed_c10d._get_default_store()


@contextmanager
def naming_failures(exchange: str) -> Iterator[None]:
    """Name the exchange that failed inside, and the ranks that died.

    Raises:
        ProcessError: The exchange failed.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        # NCCL raises nothing when a process dies: its watchdog or the launcher ends this process,
        # so on GPUs these messages are mostly those of set-up and of the gloo group.
        is_other = isinstance(error, (UserError, torch.OutOfMemoryError))
        # torch's signal handler raises this one anywhere, also in the midst of an exchange.
        is_worker = str(error).startswith("DataLoader worker")
        if not dist.is_initialized() or dist.get_world_size() == 1 or is_other or is_worker:
            raise
        # One death breaks the exchange on all ranks; who reports is settled in error_reporting.py.
        dead = dead_ranks(_NOTICE)
        cause = (
            f"process {' and '.join(map(str, dead))} of this machine has died"
            if dead
            else f"after at most {TIMEOUT}; another process has died, hangs, or took another path"
        )
        raise ProcessError(
            f"process {dist.get_rank()} of {dist.get_world_size()}: the exchange {exchange!r} "
            f"failed: {cause} ({first_line(error)})"
        ) from error


@contextmanager
def naming_gradient_failures(step: int) -> Iterator[None]:
    """Like ``naming_failures``, around a whole training step, whose own errors pass unchanged."""
    try:
        yield
    except RuntimeError as error:
        # DDP reduces gradients inside backward(), and gloo raises a plain RuntimeError.
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        with naming_failures(f"gradients of step {step}"):
            raise
