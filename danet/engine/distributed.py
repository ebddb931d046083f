"""Several processes as one: joining, ranks, sums. Everything works alone, too."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from danet.errors import InputError, UserError

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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    except UserError as error:
        # A bad file may be in the share of any process: whoever comes first tells it.
        store = dist.distributed_c10d._get_default_store()
        error.is_told = store.add("user_error", 1) > 1
        raise
    finally:
        dist.destroy_process_group()


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
    dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_in_place(counts: Tensor) -> None:
    """Adds up a tensor of counts over all processes."""
    if world_size() > 1:
        dist.all_reduce(counts)


def mean(terms: dict[str, Tensor]) -> dict[str, float]:
    """Averages named scalars over all processes; waits for the device."""
    values = torch.stack([term.detach().float() for term in terms.values()])
    if world_size() > 1:
        dist.all_reduce(values)
    return dict(zip(terms, (values / world_size()).tolist(), strict=True))


def share_buffers(module: nn.Module) -> None:
    """Copies the buffers of the first process to all, so that all evaluate the same network."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def wait() -> None:
    """Returns when all processes have come here."""
    if world_size() > 1:
        dist.barrier()
