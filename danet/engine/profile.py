"""Where the time of a training step goes: a trace, the top costs, the share of data waiting."""

import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from danet.engine.log import RunLog

FIRST = 5
"""Steps before it: kernels are chosen and caches filled in them."""
STEPS = 5
"""That are recorded."""
_ROWS = 15
_TRACE, _COSTS = "trace.json", "costs.txt"


class StepProfile:
    """Records a few steps of a training, on the first process; does nothing afterwards.

    Args:
        folder: Where ``trace.json`` (for chrome://tracing or ui.perfetto.dev) and ``costs.txt``
            go; None for one that does nothing.
        device: That trains.
        log: Is told the result.
    """

    def __init__(self, folder: Path | None, device: torch.device, log: RunLog) -> None:
        self._folder, self._device, self._log = folder, device, log
        self._seen = 0
        self._waited = self._spent = self._start = 0.0
        self._profile: profile | None = None

    def begin(self) -> None:
        """Stands before each step."""
        if self._profile is not None:
            self._start = time.perf_counter()  # between steps there may have been an evaluation
        if self._folder is None or self._seen != FIRST:
            return
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._wait_for_device()
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()
        self._start = time.perf_counter()

    def end(self, waited: float) -> None:
        """Stands behind each step, which waited so many seconds for its data."""
        self._seen += 1
        if self._profile is None:
            return
        self._waited += waited
        is_last = self._seen == FIRST + STEPS
        if is_last:
            self._wait_for_device()
        self._spent += time.perf_counter() - self._start
        if is_last:
            self._finish(self._profile)

    def close(self) -> None:
        """Stands behind the last step: writes what there is of a run that had too few."""
        if self._profile is not None:
            self._finish(self._profile)
        elif self._folder is not None:
            self._log.say(
                f"profile: nothing was recorded, since it begins at step {FIRST + 1} and this had "
                f"{self._seen}"
            )

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _finish(self, recorded: profile) -> None:
        recorded.stop()
        steps, seconds = self._seen - FIRST, self._spent
        self._profile, folder = None, self._folder
        self._folder = None
        assert folder is not None
        folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(folder / _TRACE))
        by = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        costs = recorded.key_averages().table(sort_by=by, row_limit=_ROWS, max_name_column_width=48)
        told = (
            f"{steps} steps from step {FIRST + 1} on: {seconds / steps:.3f} s a step, "
            f"{100 * self._waited / seconds:.1f} % of it waiting for data"
        )
        (folder / _COSTS).write_text(f"{told}\n{costs}\n", encoding="utf-8")
        self._log.say(f"profile: {told}")
        self._log.say(costs)
        self._log.say(f"profile: {folder / _TRACE}, {folder / _COSTS}")
