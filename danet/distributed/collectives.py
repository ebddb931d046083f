"""Ranks and exchanges between the processes of a run; a single process is a group of one."""

from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from danet.distributed.failures import naming_failures

T = TypeVar("T")


def rank() -> int:
    """Return the rank of this process, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Return whether this is rank 0, the process that writes files and prints."""
    return rank() == 0


def from_first(value: T) -> T:
    """Broadcast a picklable value from rank 0."""
    # With NCCL the pickled bytes travel over the current CUDA device, see rendezvous.py.
    box: list[Any] = [value]
    if world_size() > 1:
        with naming_failures("broadcast from process 0"):
            dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """Return the picklable values of all processes in the order of their ranks, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    with naming_failures("gathering"):
        dist.all_gather_object(box, value)
    return box


def sum_in_place(values: Tensor, name: str = "sum of counts") -> None:
    """Replace a tensor by its sum over all processes."""
    if world_size() > 1:
        with naming_failures(name):
            dist.all_reduce(values)  # on CUDA it is only queued: the caller does not wait


def broadcast_buffers(module: nn.Module) -> None:
    """Copy the buffers of rank 0 to all processes, so that all evaluate the same network."""
    if world_size() > 1:
        with naming_failures("broadcast of buffers"):
            # One by one, since dtypes differ: some 300 small messages, before evaluations only.
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)
