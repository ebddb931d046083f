"""Several processes as one: joining, ranks, sums. Everything works alone, too."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from danet.errors import InputError, ProcessError, UserError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others before it gives up."""


def choose_device(wanted: str) -> torch.device:
    """Returns the device of this process: ``auto`` is CUDA where there is one.

    Raises:
        InputError: CUDA is asked for and there is none.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise InputError(f"device={wanted}: expected auto, cpu or cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: there is no CUDA device here; use device=cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"{local_rank + 1} or more processes on a machine with {torch.cuda.device_count()} "
            "CUDA device(s): start one process per device"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started, if it did, and leaves them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, number, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    # After a restart the launcher's store still holds the addresses of the processes that died.
    store = PrefixStore(_attempt(store, number, size), store)
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=TIMEOUT)
    try:
        yield
    except UserError as error:
        # A bad file may be in the share of any process: whoever comes first tells it.
        store = dist.distributed_c10d._get_default_store()
        error.is_told = store.add("user_error", 1) > 1
        raise
    finally:
        dist.destroy_process_group()


def _attempt(store: Store, number: int, size: int) -> str:
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
    deadline = time.monotonic() + TIMEOUT.total_seconds()
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
            raise InputError(f"processes {missing} of {size} did not come within {TIMEOUT}")
        time.sleep(0.02)
    return me


class Agreement:
    """What the processes agree on between two steps, without waiting for one another.

    Flags that any process raises at one call are known to all of them at the next, so all act on
    them at the same step. The exchange runs beside the step, over the CPU.
    """

    def __init__(self) -> None:
        self._flags = torch.zeros(1, dtype=torch.int64)
        self._group: Any = None
        self._work: Any = None
        if world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def exchange(self, flags: int) -> int:
        """Raises flags (bits) and returns those that any process raised at the call before.

        Alone, the flags come back at once.
        """
        if self._group is None:
            return flags
        raised = self._settle()
        self._flags = torch.tensor([flags])
        self._work = dist.all_reduce(
            self._flags, dist.ReduceOp.BOR, group=self._group, async_op=True
        )
        return raised

    def _settle(self) -> int:
        if self._work is None:
            return 0
        with collective("agreement between steps"):
            self._work.wait()
        self._work = None
        return int(self._flags.item())

    def close(self) -> None:
        """Waits for the last exchange, so that no process leaves one behind."""
        self._settle()


@contextmanager
def collective(name: str) -> Iterator[None]:
    """Gives what fails inside a name: which exchange between the processes it was.

    Raises:
        ProcessError: The processes could not exchange; one has died, hangs, or did something else.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if world_size() == 1 or isinstance(error, UserError):
            raise
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ProcessError(
            f"process {rank()} of {world_size()}: the exchange {name!r} failed after at most "
            f"{TIMEOUT}; another process has died, hangs, or left the common path ({first})"
        ) from error


def rank() -> int:
    """Returns the number of this process, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Tells whether this process is the one that writes and prints."""
    return rank() == 0


def from_first(value: T) -> T:
    """Returns what the first process passed, on all of them."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    with collective("broadcast from the first process"):
        dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_in_place(counts: Tensor) -> None:
    """Adds up a tensor of counts over all processes."""
    if world_size() > 1:
        with collective("sum of counts"):
            dist.all_reduce(counts)


def mean(terms: dict[str, Tensor]) -> dict[str, float]:
    """Averages named scalars over all processes; waits for the device."""
    values = torch.stack([term.detach().float() for term in terms.values()])
    if world_size() > 1:
        with collective("mean of losses"):
            dist.all_reduce(values)
    return dict(zip(terms, (values / world_size()).tolist(), strict=True))


def share_buffers(module: nn.Module) -> None:
    """Copies the buffers of the first process to all, so that all evaluate the same network."""
    if world_size() > 1:
        with collective("sharing of buffers"):
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)


def wait() -> None:
    """Returns when all processes have come here."""
    if world_size() > 1:
        with collective("waiting for one another"):
            dist.barrier()
