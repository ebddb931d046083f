"""Profile of training steps: a trace, the top costs, the share of waiting for data."""

import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from danet.engine.log import RunLog

FIRST = 5
"""Steps before the recorded ones: kernels are chosen and caches filled in them."""
STEPS = 5
"""Recorded steps."""
_ROWS = 15
_TRACE, _COSTS = "trace.json", "costs.txt"


class StepProfile:
    """Records a few steps of a training, on the first process; does nothing afterwards.

    Args:
        folder: Where ``trace.json`` (for chrome://tracing or ui.perfetto.dev) and ``costs.txt``
            go; None for one that does nothing.
        device: That trains.
        log: Prints the result.
    """

    def __init__(self, folder: Path | None, device: torch.device, log: RunLog) -> None:
        self._folder, self._device, self._log = folder, device, log
        self._seen = 0
        self._waited = self._spent = self._start = 0.0
        self._profile: profile | None = None

    def begin(self) -> None:
        """Start recording if it is due; call before each step."""
        if self._profile is not None:
            self._start = time.perf_counter()  # between steps there may have been an evaluation
        if self._folder is None or self._seen != FIRST:
            return
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # Kernels still queued belong to steps before; without this wait they would be counted.
        self._wait_for_device()
        # Memory: the trace then shows which operators hold it, at some cost of time in each.
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()
        self._start = time.perf_counter()  # starting the profiler takes time itself

    def end(self, waited: float) -> None:
        """Count a step that waited so many seconds for its data; call after each step."""
        self._seen += 1
        if self._profile is None:
            return
        self._waited += waited
        is_last = self._seen == FIRST + STEPS
        if is_last:  # only here: a wait in each step would be measured as well
            self._wait_for_device()
        self._spent += time.perf_counter() - self._start
        if is_last:
            self._finish(self._profile)

    def close(self) -> None:
        """Write what there is of a run that had too few steps; call after the last one."""
        if self._profile is not None:
            self._finish(self._profile)
        elif self._folder is not None:
            self._log.write(
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
        # Newer releases of torch name it "device", and still take this name.
        by = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        costs = recorded.key_averages().table(sort_by=by, row_limit=_ROWS, max_name_column_width=48)
        summary = (
            f"{steps} steps from step {FIRST + 1} on: {seconds / steps:.3f} s a step, "
            f"{100 * self._waited / seconds:.1f} % of it waiting for data"
        )
        (folder / _COSTS).write_text(f"{summary}\n{costs}\n", encoding="utf-8")
        self._log.write(f"profile: {summary}")
        self._log.write(costs)
        self._log.write(f"profile: {folder / _TRACE}, {folder / _COSTS}")
