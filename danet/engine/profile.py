"""Profile of training steps: a trace, the top costs, the time spent waiting for data."""

from pathlib import Path

import torch
from torch.profiler import profile, schedule

from danet.engine.log import RunLog

FIRST = 5
"""Steps before the recorded ones: kernels are chosen and caches filled in them."""
STEPS = 5
"""Recorded steps."""
WAITING = "waiting for data"
"""Name of the span in which a step waits for its batches."""
_ROWS = 15


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
        self._profile: profile | None = None
        if folder is not None:
            # Memory: the trace then shows which operators hold it, at some cost of time in each.
            self._profile = profile(
                schedule=schedule(wait=FIRST - 1, warmup=1, active=STEPS, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
                profile_memory=True,
            )
            self._profile.start()

    def step(self) -> None:
        """Count a step."""
        if self._profile is not None:
            self._profile.step()
            if self._profile.step_num == FIRST + STEPS:
                self._profile = None

    def close(self) -> None:
        """Write what there is of a run that had too few steps; call after the last one."""
        if self._profile is not None:
            if (steps := self._profile.step_num) <= FIRST:
                self._profile.on_trace_ready = None
                self._log.write(
                    f"profile: nothing was recorded, since it begins at step {FIRST + 1} and this "
                    f"had {steps}"
                )
            self._profile.stop()

    def _write(self, recorded: profile) -> None:
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        trace, costs = self._folder / "trace.json", self._folder / "costs.txt"
        recorded.export_chrome_trace(str(trace))
        averages = recorded.key_averages()
        waited = sum(event.cpu_time_total for event in averages if event.key == WAITING)
        steps = recorded.step_num - FIRST
        by = f"self_{'cpu' if self._device.type == 'cpu' else 'device'}_time_total"
        table = averages.table(sort_by=by, row_limit=_ROWS, max_name_column_width=48)
        seconds = f"{waited / steps / 1e6:.3f} s"
        text = f"{steps} steps from step {FIRST + 1} on, each {seconds} {WAITING}\n{table}"
        costs.write_text(f"{text}\n", encoding="utf-8")
        self._log.write(f"profile: {text}\nprofile: {trace}, {costs}")
