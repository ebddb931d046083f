"""How the processes of an attempt find each other, and which of them still run."""

import os
import socket
import time
from datetime import timedelta
from uuid import uuid4

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from danet.errors import InputError, ProcessError

_ASKING = 2.0
"""Seconds for others to ask who tells an error that they met, too."""


def meet(timeout: timedelta) -> tuple[Store, int, int]:
    """Returns a store of this attempt alone, the number of this process and how many there are.

    Raises:
        ProcessError: There is no store of the launcher or the first process, or its port is taken.
        InputError: Some did not come.
    """
    try:
        store, number, size = next(iter(rendezvous("env://", timeout=timeout)))
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        failed = ProcessError(
            f"process {os.environ.get('RANK')} could not meet the others at {place} ({first}); "
            "torchrun --standalone finds a free port, --master-port names another"
        )
        failed.is_told = False  # the others may be well
        raise failed from error
    # After a restart the launcher's store still holds the addresses of the processes that died.
    return PrefixStore(_attempt(store, number, size, timeout), store), number, size


def _attempt(store: Store, number: int, size: int, timeout: timedelta) -> str:
    """Returns a name that the processes of this attempt share, and no earlier ones knew.

    The first process makes it up and tells it to whoever says hello with a fresh name; the count of
    restarts would not do, since each machine counts its own.
    """
    me = uuid4().hex
    if number > 0:
        store.set(f"hello/{number}", me)
        attempt = store.get(f"attempt/{me}").decode()  # waits
        store.set(f"here/{attempt}/{number}", "")
        return attempt
    greeted: set[str] = set()
    deadline = time.monotonic() + timeout.total_seconds()
    others = range(1, size)
    while not all(store.check([f"here/{me}/{other}"]) for other in others):
        for other in others:
            if store.check([f"hello/{other}"]):
                name = store.get(f"hello/{other}").decode()  # perhaps of one that died
                if name not in greeted:
                    store.set(f"attempt/{name}", me)
                    greeted.add(name)
        if time.monotonic() > deadline:
            missing = [n for n in others if not store.check([f"here/{me}/{n}"])]
            raise InputError(f"processes {missing} of {size} did not come within {timeout}")
        time.sleep(0.02)
    return me


def announce(store: Store, number: int) -> None:
    """Lets the others know which process this is, so that they can tell when it has died."""
    store.set(f"process/{number}", f"{socket.gethostname()} {os.getpid()}")


def gone(store: Store, me: int, size: int, seconds: float) -> list[int]:
    """Returns the other processes of this machine that have ended.

    Args:
        store: Where they were announced.
        me: This process.
        size: How many there are.
        seconds: How long to wait until one has.
    """
    others = {other: _id_here(store, other) for other in range(size) if other != me}
    here = {other: process for other, process in others.items() if process is not None}
    deadline = time.monotonic() + seconds
    while True:
        ended = [other for other, process in here.items() if not runs(process)]
        if ended or time.monotonic() > deadline:
            return ended
        time.sleep(0.05)


def leave_to_first(store: Store, me: int, size: int) -> tuple[bool, int | None]:
    """Leaves an error to the process that comes here first.

    Without torchrun the first process keeps the store; it waits for others with the same question,
    since it is about to end.

    Returns:
        Whether that is another one, and the system's number of that one if it is on this machine.
    """
    first = int(store.compare_set("teller", "", str(me)))
    asked = store.add("askers", 1)
    deadline = time.monotonic() + _ASKING
    keeps_store = me == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while keeps_store and asked < size and time.monotonic() < deadline:
        time.sleep(0.05)
        asked = store.add("askers", 0)
    return first != me, None if first == me else _id_here(store, first)


def wait_for_end(process: int, seconds: float) -> None:
    """Returns when a process of this machine has ended, or after some seconds."""
    deadline = time.monotonic() + seconds
    while runs(process) and time.monotonic() < deadline:
        time.sleep(0.05)


def _id_here(store: Store, number: int) -> int | None:
    """Returns the system's number of an announced process; None if on another machine."""
    key = f"process/{number}"
    if not store.check([key]):
        return None
    host, process = store.get(key).decode().split()
    return int(process) if host == socket.gethostname() else None


def runs(number: int) -> bool:
    """Tells whether a process of this machine runs; one that ended and is not reaped does not."""
    if os.name != "posix":
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return os.name != "posix" or not os.path.isdir("/proc/self")
