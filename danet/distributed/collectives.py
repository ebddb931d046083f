"""Several processes as one: joining, ranks, sums. Everything works alone, too."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from danet.distributed import rendezvous
from danet.errors import InputError, ProcessError, UserError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others before it gives up."""

_PATIENCE = timedelta(hours=24)
"""How long it waits where they may take very different times, as in an evaluation."""
_GRACE = 3
"""Seconds for the launcher to notice, too, that a process has ended."""
_COMING = 5.0
"""Seconds for all processes to stop when one does."""
_TELLING = 20.0
"""Seconds for a process to tell an error and end."""


def choose_device(wanted: str, *, key: str = "device") -> torch.device:
    """Returns the device of this process: ``auto`` is CUDA where there is one.

    Args:
        wanted: auto, cpu or cuda.
        key: The setting, for messages.

    Raises:
        InputError: CUDA is asked for and there is none.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise InputError(f"{key}={wanted}: expected auto, cpu or cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{key}=cuda: there is no CUDA device here; use {key}=cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    if here > torch.cuda.device_count():
        raise InputError(
            f"{here} processes on a machine with {torch.cuda.device_count()} CUDA device(s): "
            "start one process per device"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started, if it did, and leaves them at the end.

    Not after an error: leaving NCCL waits for the other processes, which may wait for this one.
    ``cli.run`` then ends the process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, number, size = rendezvous.meet(TIMEOUT)
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=TIMEOUT)
    store = dist.distributed_c10d._get_default_store()
    rendezvous.announce(store, number)
    try:
        yield
    except UserError as error:
        # A bad file may be in the share of any process: whoever comes first tells it.
        try:
            error.is_told, teller = rendezvous.leave_to_first(store, number, size)
        except RuntimeError:  # the process that kept the store is the one that died
            error.is_told, teller = False, None
        if teller is not None:  # the launcher would end it with this one, before it has told
            rendezvous.wait_for_end(teller, _TELLING)
        raise
    dist.destroy_process_group()


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
        is_other = isinstance(error, (UserError, torch.OutOfMemoryError))
        # torch may raise that a loader's worker died in the midst of anything.
        if world_size() == 1 or is_other or str(error).startswith("DataLoader worker"):
            raise
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        gone = _gone(seconds=2)
        who = (
            f"process {' and '.join(map(str, gone))} of this machine has died"
            if gone
            else (
                f"after at most {TIMEOUT}; another process has died, hangs, or left the common path"
            )
        )
        raise ProcessError(
            f"process {rank()} of {world_size()}: the exchange {name!r} failed: {who} ({first})"
        ) from error


@contextmanager
def gradients(step: int) -> Iterator[None]:
    """As ``collective``, around a step: it computes, too, and other errors pass as they are.

    Raises:
        ProcessError: As ``collective``.
    """
    try:
        yield
    except RuntimeError as error:
        is_exchange = isinstance(error, dist.DistError) or "gloo" in str(error)
        if world_size() == 1 or not is_exchange:
            raise
        with collective(f"gradients of step {step}"):
            raise


def _gone(seconds: float) -> list[int]:
    """Returns the other processes of this machine that have ended; waits until one has."""
    try:
        return rendezvous.gone(
            dist.distributed_c10d._get_default_store(), rank(), world_size(), seconds
        )
    except (RuntimeError, ValueError):  # the store died with the launcher
        return []


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
    return from_process(0, value)


def from_process(number: int, value: T) -> T:
    """Returns what the process of that number passed, on all of them."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    with collective(f"broadcast from process {number}"):
        dist.broadcast_object_list(box, src=number)
    return box[0]


def gather(value: T) -> list[T]:
    """Returns what the processes passed, in their order, on all of them."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    with collective("gathering"):
        dist.all_gather_object(box, value)
    return box


def sum_in_place(counts: Tensor) -> None:
    """Adds up a tensor of counts over all processes."""
    if world_size() > 1:
        with collective("sum of counts"):
            dist.all_reduce(counts)


def sum_of(values: Tensor, name: str) -> list[float]:
    """Returns the sums of a vector's elements over all processes; waits for the device."""
    if world_size() > 1:
        with collective(name):
            dist.all_reduce(values)
    return values.tolist()


def share_buffers(module: nn.Module) -> None:
    """Copies the buffers of the first process to all, so that all evaluate the same network."""
    if world_size() > 1:
        with collective("sharing of buffers"):
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)


def synchronised(model: nn.Module) -> nn.Module:
    """Returns the network with batch norms whose statistics are those of all processes.

    timm's batch norms compute an activation, too, which torch's own conversion would drop.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if any(type(norm).__module__.startswith("timm.") for norm in norms):
        from timm.layers.norm_act import convert_sync_batchnorm

        converted: nn.Module = convert_sync_batchnorm(model)
        return converted
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def wait() -> None:
    """Returns when all processes have come here."""
    if world_size() > 1:
        with collective("waiting for one another"):
            dist.barrier()


class Farewell:
    """Where all processes end together: who came, and that the first has written what it had to.

    A launcher ends the others with SIGTERM when one process has died, and a preemption sends it to
    all; the processes that come here tell the two apart. Each counts itself in when this is made.
    """

    def __init__(self) -> None:
        self._count("ending")
        if is_first():
            self._count("the first ends")

    def all_came(self) -> bool:
        """Return whether all processes came; to be called when this one has nothing left to do.

        The first waits some seconds for the others. They wait for it, if it came, since a launcher
        ends all as soon as one has ended.
        """
        if world_size() == 1:
            return True
        if is_first():
            came = self._wait("ending", world_size(), _COMING)
            self._count("the first is done")
            return came
        if self._wait("the first ends", 1, _COMING):
            self._wait("the first is done", 1, TIMEOUT.total_seconds())
        return self._count("ending", 0) == world_size()

    def _count(self, name: str, more: int = 1) -> int:
        if world_size() == 1:
            return 1
        try:
            return dist.distributed_c10d._get_default_store().add(f"farewell/{name}", more)
        except (RuntimeError, ValueError):  # the store died with the launcher or the first process
            return -1

    def _wait(self, name: str, enough: int, seconds: float) -> bool:
        """Return whether so many were counted; a process of this machine that died ends it."""
        deadline = time.monotonic() + seconds
        while 0 <= (count := self._count(name, 0)) < enough and time.monotonic() < deadline:
            if _gone(seconds=0):
                return False
            time.sleep(0.05)
        return count >= enough


def wait_patiently(name: str) -> None:
    """Returns when all processes have come here, however long one takes.

    An exchange gives up after TIMEOUT, so this precedes one behind work of very different lengths.
    Each process counts itself in and looks whether the others have; meanwhile signals are heard.

    Args:
        name: Of the place; a fresh one each time, the same on all processes.

    Raises:
        ProcessError: A process of this machine has died, or the launcher has.
    """
    if world_size() == 1:
        return
    pause, deadline = 0.005, time.monotonic() + _PATIENCE.total_seconds()
    with collective(f"waiting for {name}"):
        store = dist.distributed_c10d._get_default_store()
        store.add(f"arrived/{name}", 1)
        while store.add(f"arrived/{name}", 0) < world_size():
            if _gone(seconds=0):
                time.sleep(_GRACE)  # the launcher may end this process, too, which then saves
                raise RuntimeError("it will not come")
            if time.monotonic() > deadline:
                raise RuntimeError(f"others did not come within {_PATIENCE}")
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
