"""What all processes do at the same step: requests, the end of a run, the wait for a slow one."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from danet.distributed import failures, signals
from danet.distributed.collectives import is_first, world_size
from danet.distributed.error_reporting import POLL
from danet.distributed.failures import naming_failures

_LONGEST_EVALUATION = 86400.0  # seconds that ``wait_patiently`` waits for a process that is alive
_LAUNCHER_NOTICE = 3.0  # seconds for the launcher to notice a dead process and to signal the others


class Agreement:
    """Requests that all processes obey at the same step, without waiting for one another.

    Flags raised by any process in one call are returned to all in the next. The exchange runs
    over gloo beside the step, so the device is never waited for.
    """

    def __init__(self) -> None:
        self._flags = torch.zeros(1, dtype=torch.int64)
        self._group: Any = None
        self._work: Any = None
        if world_size() > 1:
            # NCCL has no bitwise reductions, and its collectives would queue behind the step.
            self._group = dist.new_group(backend="gloo", timeout=failures.TIMEOUT)

    def exchange(self, flags: int) -> int:
        """Raise flags (bits), and return those that any process raised in the call before.

        A single process gets its own flags back at once.
        """
        if self._group is None:
            return flags
        raised = self.finish()  # begun a step ago, so it costs no wait
        self._flags = torch.tensor([flags])
        operation = dist.ReduceOp.BOR
        self._work = dist.all_reduce(self._flags, operation, group=self._group, async_op=True)
        return raised

    def finish(self) -> int:
        """Finish the last exchange, so that no process is left alone in it; return its flags."""
        if self._work is None:
            return 0
        with naming_failures("agreement between steps"):
            self._work.wait()
        self._work = None
        return int(self._flags.item())


def arrive() -> None:
    """Count this process among those that reach the common end of a run."""
    _count("the end", 1)
    if is_first():
        _count("the end of the first", 1)


def all_arrived() -> bool:
    """Return whether all processes arrived; called when this one has nothing left to write.

    A launcher sends SIGTERM when one process has died, and a preempted job sends it to all. Only
    in the second case do all processes arrive, for which rank 0 waits some seconds: within an
    evaluation each stops at its own copy of the signal. The others wait until it has written the
    checkpoint, since a launcher ends all as soon as one has ended.
    """
    if is_first():
        _wait_for("the end", world_size(), signals.SAME)
        _count("the last checkpoint", 1)
    # In two waits: a rank 0 that died on another host must not cost the whole TIMEOUT.
    elif _wait_for("the end of the first", 1, signals.SAME):
        _wait_for("the last checkpoint", 1, failures.TIMEOUT.total_seconds())
    return _count("the end") == world_size()


def wait_patiently(name: str) -> None:
    """Wait for all processes after work that may take each a very different time.

    ``name`` is used once per run. Raises ProcessError if a process of this host or the launcher
    has died.
    """
    # A barrier fails after TIMEOUT, but one process may evaluate hours longer than another; and it
    # blocks in C++, where Python handles no signal.
    _count(name, 1)
    if not _wait_for(name, world_size(), _LONGEST_EVALUATION):
        time.sleep(_LAUNCHER_NOTICE)  # its SIGTERM lets this process save a checkpoint
        raise failures.failed(f"waiting for {name}", "not all arrived")


def _count(name: str, amount: int = 0) -> int:
    """Add to a counter of the store and return its value; -1 if the store is gone."""
    if world_size() == 1:
        return 1
    # Adding 0 reads a counter; get() would block until the key exists.
    try:
        return _get_default_store().add(f"arrived/{name}", amount)
    except (RuntimeError, ValueError):  # it died with the launcher or with rank 0
        return -1


def _wait_for(name: str, count: int, seconds: float) -> bool:
    """Wait until a counter reaches ``count``; give up when a process of this host has died."""
    pause, deadline = POLL / 10, time.monotonic() + seconds
    while (value := _count(name)) < count:
        if value < 0 or failures.dead_ranks() or time.monotonic() > deadline:
            return False
        time.sleep(pause)
        # 5 ms at first, for ranks that are nearly equal; 1 s at most, to spare the store.
        pause = min(2 * pause, 20 * POLL)
    return True
