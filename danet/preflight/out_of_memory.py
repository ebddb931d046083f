"""Out-of-memory errors: recognising them, and the settings to change."""

import torch

from danet.config.schema import TrainConfig
from danet.errors import InputError

_SHORT = ("can't allocate memory", "out of memory", "_ALLOC_FAILED")
"""Parts of the messages of torch on a CPU, of CUDA, and of cuBLAS and cuDNN."""


def is_shortage(error: BaseException) -> bool:
    """Return whether an error is a failed allocation of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT)


def explain(config: TrainConfig, device: torch.device, *, training: bool) -> InputError:
    """Return an error with the settings to try, those first that change the results least.

    Args:
        config: Of the run.
        device: Of the run.
        training: Whether a training step failed, rather than an evaluation.
    """
    if not training:
        return InputError(
            f"out of memory on {device} in an evaluation; use evaluation=sliding, or a smaller "
            "evaluation.crop"
        )
    size = config.data.crop or config.data.size
    return InputError(
        f"out of memory on {device} in a step of data.batch_size={config.data.batch_size}"
        f"{f' with {size[0]} x {size[1]}' if size else ''}; try in this order: "
        "trainer.precision=bfloat16, model.backbone.recompute=[1,2,3,4], a smaller "
        "data.batch_size with a larger trainer.accumulate, a smaller data.crop; dry_run=true "
        "shows what fits"
    )
