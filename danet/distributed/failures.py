"""Processes that died, and exchanges that failed because of them."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from danet.distributed import error_reporting
from danet.distributed.error_reporting import POLL
from danet.errors import ProcessError, UserError, first_line

TIMEOUT = timedelta(minutes=10)  # of an exchange; gloo's 30 hold the machines of a dead run
_NOTICE = 2.0  # seconds for a dead process to leave the process table once its connection broke
peers: dict[int, int] = {}  # rank -> process id, of the other processes of this host


def is_alive(pid: int) -> bool:
    """Return whether a process of this host runs; a zombie does not.

    Without /proc, as on macOS, every process counts as alive: a death is noticed by a time-out.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The name before the state may contain spaces and brackets itself. A dead worker is a
            # zombie until its launcher has read the exit code.
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return not os.path.isdir("/proc/self")


def dead_ranks() -> list[int]:
    """Return the ranks of this host whose process has ended."""
    return [rank for rank, pid in peers.items() if not is_alive(pid)]


def _wait(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL)


def is_reported_by_another(rank: int) -> bool:
    """Claim an error; return whether another rank reports it, once that rank has exited.

    See error_reporting.py for the reason.
    """
    try:
        # compare_set is atomic in the store: exactly one rank finds the key empty.
        reporter = int(_get_default_store().compare_set("reporter", "", str(rank)))
    except (RuntimeError, ValueError):  # the process that hosted the store has died
        return False
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        time.sleep(error_reporting.CLAIM)  # without torchrun rank 0 hosts the store
    # A reporter on another host is no peer, and the launcher of this host cannot end it.
    if reporter in peers:
        _wait(lambda: not is_alive(peers[reporter]), error_reporting.REPORT)
    return reporter != rank


def failed(exchange: str, error: BaseException | str) -> ProcessError:
    """Return the error of an exchange that failed, which names the ranks that died."""
    # One death breaks the exchange on all ranks; who reports is settled in error_reporting.py.
    cause = f"after at most {TIMEOUT}; another process has died, hangs, or took another path"
    _wait(dead_ranks, _NOTICE)
    if dead := dead_ranks():
        cause = f"process {' and '.join(map(str, dead))} of this machine has died"
    reason = error if isinstance(error, str) else first_line(error)
    return ProcessError(
        f"process {dist.get_rank()} of {dist.get_world_size()}: the exchange {exchange!r} "
        f"failed: {cause} ({reason})"
    )


@contextmanager
def naming_failures(exchange: str) -> Iterator[None]:
    """Raise ProcessError, with the ranks that died, if an exchange inside fails."""
    try:
        yield
    except RuntimeError as error:
        # NCCL raises nothing when a process dies: its watchdog or the launcher ends this process,
        # so on GPUs these messages are mostly those of set-up and of the gloo group. gloo raises a
        # plain RuntimeError, also inside backward(), where DDP reduces gradients.
        is_ours = isinstance(error, dist.DistError) or "gloo" in str(error)
        if isinstance(error, UserError) or not is_ours:
            raise
        raise failed(exchange, error) from error
