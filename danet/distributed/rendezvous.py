"""Joining the processes that a launcher such as torchrun started."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from danet.distributed import collectives, error_reporting, failures
from danet.errors import InputError, ProcessError, UserError, first_line


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the process group if a launcher started several processes; leave it at the end.

    After an error the group is not left: ``error_reporting.leaving_the_group`` ends the process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        # NCCL's barriers and exchanges of objects use the current device: without this, all GPU 0.
        torch.cuda.set_device(device)
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", failures.TIMEOUT
    store, rank, size = join(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    failures.meet(collectives.gather((socket.gethostname(), os.getpid())), rank)
    try:
        yield
    except UserError as error:  # others are bugs, whose traceback every process prints
        error.is_reported = failures.is_reported_by_another(rank)
        raise
    dist.destroy_process_group()


def join(timeout: timedelta) -> tuple[Store, int, int]:
    """Return a store of this attempt alone, the rank of this process, and the number of processes.

    Raises:
        ProcessError: The store cannot be reached, or its port is taken.
        InputError: Some processes did not arrive in time.
    """
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        failed = ProcessError(
            f"process {os.environ.get('RANK')} could not reach the others at {address} "
            f"({first_line(error)}); torchrun --standalone finds a free port, --master-port names "
            "another"
        )
        failed.is_reported = False  # the others may be well, so this process reports itself
        raise failed from error
    # After a restart the launcher's store still holds the addresses of the dead processes, and gloo
    # connects to them: without a prefix 4 of 10 restarts succeeded.
    return PrefixStore(_agree_on_attempt(store, rank, size, timeout), store), rank, size


def _agree_on_attempt(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """Return a prefix that the processes of this attempt share, and that no earlier one used.

    Rank 0 generates it and answers every rank that greets with a fresh name.
    """
    # Not TORCHELASTIC_RESTART_COUNT: each host counts its own restarts.
    own = uuid4().hex
    if rank > 0:
        store.set(f"greeting/{rank}", own)
        attempt = store.get(f"attempt/{own}").decode()  # blocks until rank 0 has answered
        store.set(f"present/{attempt}/{rank}", "")
        return attempt
    waiting, deadline = set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while waiting:
        for other in waiting:
            if store.check([f"greeting/{other}"]):  # get() alone would block on one rank
                # Perhaps of a dead process, so each is answered until a living one is present.
                store.set(f"attempt/{store.get(f'greeting/{other}').decode()}", own)
        waiting = {n for n in waiting if not store.check([f"present/{own}/{n}"])}
        if waiting and time.monotonic() > deadline:
            raise InputError(
                f"processes {sorted(waiting)} of {size} did not arrive within {timeout}"
            )
        time.sleep(error_reporting.POLL / 2)
    return own
