"""The device of a process, and joining the processes that a launcher such as torchrun started."""

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from glob import glob
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

import danet
from danet.distributed import collectives, error_reporting, failures
from danet.errors import InputError, ProcessError, UserError, first_line

SHARED = "DANET_SHARE_DEVICE"
"""Variable of the environment: 1 lets several processes compute on one CUDA device and exchange by
gloo, since NCCL refuses that. It is slow, and meant for tests on a single GPU."""


def choose_device(wanted: str, *, key: str = "device") -> torch.device:
    """Return the device of this process: ``auto`` is CUDA where there is one.

    ``key`` names the setting in messages. Raises InputError where there is no such device.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        one = "CUDA_VISIBLE_DEVICES=1 before the command chooses the second GPU"
        raise InputError(f"{key}={wanted}: expected auto, cpu or cuda; {one}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{key}=cuda: there is no CUDA device here; use {key}=cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    # Without the variable (srun sets none) this process is the only evidence.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    count = torch.cuda.device_count()
    if os.environ.get(SHARED) == "1":
        return torch.device("cuda", local_rank % count)
    if here > count:  # NCCL fails with two ranks on one
        raise InputError(
            f"{here} processes on a machine with {count} CUDA device(s): "
            "start one process per device"
        )
    return torch.device("cuda", local_rank)


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
    is_nccl = device.type == "cuda" and os.environ.get(SHARED) != "1"
    timeout = failures.TIMEOUT
    store, rank, size = join(timeout)
    dist.init_process_group(
        "nccl" if is_nccl else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        # Connects at once, and leaves no collective to guess the device.
        device_id=device if is_nccl else None,
    )
    own = socket.gethostname(), os.getpid()
    hosts = enumerate(collectives.gather(own))
    failures.peers.update((r, pid) for r, (host, pid) in hosts if host == own[0] and r != rank)
    try:
        yield
    except UserError as error:  # others are bugs, whose traceback every process prints
        error.is_reported = failures.is_reported_by_another(rank)
        raise
    dist.destroy_process_group()


def join(timeout: timedelta) -> tuple[Store, int, int]:
    """Return a store of this attempt alone, the rank of this process, and the number of processes.

    Raises ProcessError if the store cannot be reached, InputError if processes did not arrive.
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
            missing = sorted(waiting)
            raise InputError(f"processes {missing} of {size} did not arrive within {timeout}")
        time.sleep(error_reporting.POLL / 2)
    return own


def require_same(config: Mapping[str, Any], data: Mapping[str, str]) -> None:
    """Raise InputError if config, code or data of the processes differ; ``data`` are digests."""
    plain = {**config, "run": None, "resume": None}
    text = json.dumps(plain, sort_keys=True, ensure_ascii=True, default=str)
    facts = {"config": hashlib.sha256(text.encode()).hexdigest()[:16], "code": _code_version()}
    facts |= {name.replace("_", " "): digest for name, digest in data.items()}
    # Gathered on all, so that all raise and none waits for the others in the next exchange.
    everywhere = collectives.gather(facts)
    for rank, others in enumerate(everywhere):
        for name, value in everywhere[0].items():
            if others[name] != value:
                raise InputError(
                    f"process {rank} has another {name} than process 0: {others[name]} against "
                    f"{value}; all processes of a run must start with the same"
                )


def _code_version() -> str:
    """Return the versions of this package and of torch, and a digest of the package's sources."""
    # Of the sources, not a git revision: a wheel has none, and local edits count.
    root = Path(danet.__file__).parent
    digest = hashlib.sha256()
    # In a checkout danet/datasets is a symbolic link, which glob follows and Path.rglob does not.
    for name in sorted(glob("**/*.py", root_dir=root, recursive=True)):
        digest.update(name.encode() + (root / name).read_bytes())
    return f"danet {danet.__version__} ({digest.hexdigest()[:16]}), torch {torch.__version__}"
