"""Benchmark the start: the import, the answer of the command line, the first step."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.measure import Options, Row

ROOT = Path(__file__).resolve().parents[2]
TRAIN = [sys.executable, str(ROOT / "tools" / "train.py")]
BARS = {"import": 2.0, "config": 3.0, "first step": 10.0}
"""Upper bounds in seconds."""
PATIENCE = 300.0
"""Seconds to wait for the first step."""


def run(options: Options) -> list[Row]:
    """Measure medians of 3 (of 1 when quick), on the device of ``trainer.device=auto``."""
    repeats = 1 if options.quick else 3
    imports: list[list[float]] = [[], []]
    for _ in range(repeats):
        for spent, code in zip(imports, ("import danet", "import torch"), strict=True):
            spent.append(_seconds([sys.executable, "-c", code]))
    ours, torchs = (statistics.median(spent) for spent in imports)
    config = statistics.median(_seconds([*TRAIN, "--cfg", "job"]) for _ in range(repeats))
    first = statistics.median(_first_step(options.quick) for _ in range(repeats))
    note = f"import danet {ours:.2f} s, import torch {torchs:.2f} s"
    return [
        _row("import", "import danet, without import torch", max(0.0, ours - torchs), note),
        _row("config", "tools/train.py --cfg job", config),
        _row("first step", "to the first step of the default run", first),
    ]


def _row(bar: str, case: str, value: float, note: str = "") -> Row:
    verdict = f"bar {BARS[bar]:g} s: {'kept' if value <= BARS[bar] else 'NOT KEPT'}"
    return Row("startup", case, "time", "s", value, note="; ".join(filter(None, (verdict, note))))


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - start


def _first_step(quick: bool) -> float:
    """Return the seconds from the start of the process to the log line of step 1."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "run", "metrics.jsonl")
        settings = [f"run.dir={log.parent}", "trainer.log_every=1"]
        if quick:
            settings += ["data.size=[48,96]", "data.cue_radius=2", "data.batch_size=2"]
        start = time.perf_counter()
        with subprocess.Popen(
            [*TRAIN, *settings],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                while not (log.is_file() and log.stat().st_size):
                    if process.poll() is not None or time.perf_counter() - start > PATIENCE:
                        raise RuntimeError("the default run came to no first step")
                    time.sleep(0.01)
                return time.perf_counter() - start
            finally:
                process.terminate()
                process.wait()
