"""The device of this process."""

import os

import torch

from danet.errors import InputError


def choose_device(wanted: str, *, key: str = "device") -> torch.device:
    """Return the device of this process: ``auto`` is CUDA where there is one.

    ``key`` names the setting in messages. Raises InputError where there is no such device.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise InputError(f"{key}={wanted}: expected auto, cpu or cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{key}=cuda: there is no CUDA device here; use {key}=cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    # Without the variable (srun sets none) this process is the only evidence.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    if here > torch.cuda.device_count():  # NCCL fails with two ranks on one
        raise InputError(
            f"{here} processes on a machine with {torch.cuda.device_count()} CUDA device(s): "
            "start one process per device"
        )
    return torch.device("cuda", local_rank)
