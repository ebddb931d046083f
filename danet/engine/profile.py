"""Profile of training steps: a trace, the top costs, the time spent waiting for data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule

FIRST = 5  # steps before the recorded ones: kernels are chosen and caches filled in them
STEPS = 5  # recorded steps
WAITING = "waiting for data"  # name of the span in which a step waits for its batches


@contextmanager
def profiling(folder: Path | None, write: Callable[[str], None]) -> Iterator[Callable[[], object]]:
    """Record a few steps of a training; yield the function to call after each.

    ``trace.json`` (for chrome://tracing or ui.perfetto.dev) and ``costs.txt`` go into the folder;
    None records nothing.
    """
    if folder is None:
        yield lambda: None
        return

    def finish(recorded: profile) -> None:
        steps = recorded.step_num - FIRST
        if steps == 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        trace, costs = folder / "trace.json", folder / "costs.txt"
        recorded.export_chrome_trace(str(trace))
        averages = recorded.key_averages()
        waited = sum(event.cpu_time_total for event in averages if event.key == WAITING)
        is_on_cpu = not any(event.self_device_time_total for event in averages)
        by = f"self_{'cpu' if is_on_cpu else 'device'}_time_total"
        table = averages.table(sort_by=by, row_limit=15, max_name_column_width=48)
        seconds = f"{waited / steps / 1e6:.3f} s"
        text = f"{steps} steps from step {FIRST + 1} on, each {seconds} {WAITING}\n{table}"
        costs.write_text(f"{text}\n", encoding="utf-8")
        write(f"profile: {text}\nprofile: {trace}, {costs}")

    plan = schedule(wait=FIRST - 1, warmup=1, active=STEPS, repeat=1)
    # Memory: the trace then shows which operators hold it, at some cost of time in each.
    recorder = profile(
        schedule=plan, on_trace_ready=finish, record_shapes=True, profile_memory=True
    )
    with recorder:
        yield recorder.step
    if recorder.step_num <= FIRST:
        write(f"profile: it begins at step {FIRST + 1} and this had {recorder.step_num}")
