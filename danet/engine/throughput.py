"""Images per second, time spent waiting for data, and memory, between two lines of the log."""

import sys
import time

import torch

from danet.distributed import collectives


class Throughput:
    """Measures a training between two calls of ``reset``.

    Args:
        device: That trains.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._since, self._waited, self._images = time.perf_counter(), 0.0, 0

    def update(self, waited: float, images: int) -> None:
        """Count a step: seconds of waiting for its data, and its images on this process."""
        self._waited += waited
        self._images += images

    def reset(self) -> dict[str, float]:
        """Return the figures since the last call, and start anew.

        ``data_waiting`` is a share of the time, ``images_per_second`` is that of all processes
        together, ``memory_gib`` the peak of this process since it started.
        """
        # No synchronize: the check of the losses, just before a line of the log, has waited.
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)  # two calls within the resolution of the clock
        figures = {
            "data_waiting": self._waited / seconds,
            # Processes have equal batches: no collective for a figure that only rank 0 writes.
            "images_per_second": self._images * collectives.world_size() / seconds,
            "memory_gib": _peak_memory(self.device) / 2**30,
        }
        self._since, self._waited, self._images = now, 0.0, 0
        return figures


def _peak_memory(device: torch.device) -> int:
    """Return the peak in bytes: of tensors on CUDA, else of the process (0 on Windows)."""
    if device.type == "cuda":
        # Of tensors: nvidia-smi shows more, with the allocator's cache and the CUDA context.
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
