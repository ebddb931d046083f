"""The log of a run: console, one JSON object per line in metrics.jsonl, and trackers."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from danet import console
from danet.distributed import collectives
from danet.engine.settings import AVERAGES
from danet.engine.trackers import TRACKERS, Tracker, finite, plain_settings
from danet.evaluation.inference import describe
from danet.evaluation.metrics import ConfusionMatrix, single_class_warning
from danet.filesystem import atomic_write
from danet.plain import is_number


@dataclass(eq=False, repr=False)
class RunLog:
    """Writes the metrics of a run; on all processes but the first it does nothing.

    Attributes:
        trackers: By name, those that have not failed; none on other processes.
    """

    folder: Path | None  # of the run; None for a log that writes nothing
    _: KW_ONLY
    step: int  # where the run starts or continues; lines of later steps are dropped
    steps: int  # where it ends
    classes: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    log_to: Sequence[str] = ("tensorboard",)  # see danet.engine.trackers
    run_id: str = ""
    # Numbers of this process; the lines of training have their sums over all.
    count: Callable[[], Mapping[str, float]] = dict

    def __post_init__(self) -> None:
        self._has_warned = self._has_partial_line = False
        self.trackers: dict[str, Tracker] = {}
        if self.folder is not None:
            self._path = self.folder / "metrics.jsonl"
            _drop_lines_after(self._path, self.step)
            # ``run`` (folder, name, trackers) differs between runs and explains no score.
            settings = plain_settings({k: v for k, v in self.config.items() if k != "run"})
            for name in self.log_to:
                with self._leaving_out(name):
                    made = TRACKERS[name](self.folder, self.step, self.run_id, settings)
                    self.trackers[name] = made
        # tqdm redraws ten times a second by default, which fills the log file of a batch job.
        off = self.folder is None
        self._bar = tqdm(
            None, "train", self.steps, initial=self.step, unit="step", mininterval=1, disable=off
        )

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        self._bar.update()

    def write(self, text: str) -> None:
        """Print above the progress bar, which tqdm clears and redraws."""
        if self.folder is not None:
            tqdm.write(text, file=sys.stdout)

    def warn(self, text: str) -> None:
        """Print a warning above the progress bar."""
        if self.folder is not None:
            tqdm.write(f"warning: {text}", file=sys.stderr)

    def scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Log named numbers; ``kind`` is ``train``, ``val`` or ``attention``."""
        if self.folder is None:
            return
        known = finite(values)
        shown = {f"{kind}/{name}": value for name, value in known.items()}
        self._for_all_trackers(lambda tracker: tracker.scalars(step, shown))
        # Python writes NaN and Infinity, which are not JSON: other readers refuse the whole line.
        self._append({"step": step, "kind": kind, **{name: known.get(name) for name in values}})

    def _append(self, line: Mapping[str, Any]) -> None:
        # A disk that fills within a line leaves its first half; the next line starts a new one.
        after_partial, self._has_partial_line = self._has_partial_line, True
        try:
            # Opened for each line: closing it reports a full disk here, and readers miss nothing.
            with open(self._path, "a") as file:
                file.write("\n" * after_partial + json.dumps(line) + "\n")
            self._has_partial_line = False
        except OSError as error:  # days of training are worth more than lines of a log
            if not self._has_warned:
                self.warn(f"{self._path}: the log cannot be written ({error.strerror or error})")
            self._has_warned = True

    def train(self, step: int, losses: Mapping[str, float], figures: Mapping[str, float]) -> None:
        """Log a step: losses by name, rates and throughput, the counters of all processes."""
        named = {f"loss_{name}": loss for name, loss in losses.items()}
        values = {"loss": sum(losses.values()), **named, **figures}
        for name, count in self.count().items():
            values[name] = sum(collectives.gather(count))  # a collective: on all ranks
        shown = {"loss": f"{values['loss']:.3f}", "waiting": f"{values['data_waiting']:.0%}"}
        self._bar.set_postfix(shown, refresh=False)  # drawn with the next step
        self.scalars(step, "train", values)

    def validation(self, step: int, confusion: ConfusionMatrix, loss: float) -> dict[str, float]:
        """Log the scores of a step, as a table by class and as numbers; return the numbers.

        Confusion and loss are those of the whole validation set, all processes together.
        """
        scores = confusion.scores()
        named = {**{name: getattr(scores, name) for name in AVERAGES}, "loss": loss}
        head = f"step {step}: validation, {describe(self.config.get('evaluation', {}))}"
        table = class_table(self.classes, {"IoU": scores.iou, "accuracy": scores.accuracy})
        self.write(f"{head}\n{table}")  # at once: each call redraws the bar
        if warning := single_class_warning(confusion.matrix, self.classes):
            self.warn(f"step {step}: {warning}")
        per_class = {f"iou/{name}": v for name, v in zip(self.classes, scores.iou, strict=True)}
        self.scalars(step, "val", {**named, **per_class})
        return {**named, **per_class}

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Show pictures, uint8 (H, W, 3) RGB."""
        self._for_all_trackers(lambda tracker: tracker.images(step, images))

    def _for_all_trackers(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in tuple(self.trackers.items()):
            with self._leaving_out(name):
                call(tracker)

    @contextmanager
    def _leaving_out(self, tracker: str) -> Iterator[None]:
        """Turn any error of a tracker into a warning, and leave the tracker out from then on."""
        try:
            yield
        except Exception as error:  # each further call might wait for a server that is gone
            self.trackers.pop(tracker, None)
            reason = getattr(error, "strerror", None) or " ".join(repr(error).split())
            self.warn(f"run.log_to: {tracker} failed and is left out from now on ({reason})")

    def close(self, scores: Mapping[str, float | None] | None = None) -> None:
        """End the bar and write what is pending, with the last scores of a run that is finished."""
        self._bar.close()
        step = int(self._bar.n)
        if self.folder is not None:
            with suppress(OSError, ValueError):
                sys.stdout.flush()  # what is buffered may fail only here
            if reason := console.failure():  # which ends no training
                self._append({"step": step, "kind": "warning", "text": f"console: {reason}"})
        final = {f"final/{name}": value for name, value in finite(scores or {}).items()}
        self._for_all_trackers(lambda tracker: tracker.close(step, final))


def _drop_lines_after(path: Path, step: int) -> None:
    """Remove lines that a resumed run is going to write again, and partial ones."""
    if path.exists():
        kept = [x for x in path.read_text().splitlines() if _parse(x).get("step", math.inf) <= step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a metrics.jsonl, without values that are no finite number or null.

    There are none where there is no file.
    """
    # It may lie beside a foreign checkpoint, so nothing of its content is trusted.
    lines = path.read_text("utf-8").splitlines() if path.exists() else ()
    return [known for line in lines if (known := _parse(line))]


def _parse(line: str) -> dict[str, Any]:
    """Return a line of metrics.jsonl; empty for one without a step, or a partial one."""
    with suppress(ValueError, RecursionError, AttributeError):  # no JSON, nested too deep, a list
        values = json.loads(line).items()
        # Not math.isfinite, which raises on an integer beyond the range of a float.
        known = {k: v for k, v in values if is_number(v) and abs(v) <= sys.float_info.max}
        if "step" in known:
            return {k: v for k, v in values if k in known or k == "kind" or v is None}
    return {}


def class_table(classes: Sequence[str], columns: Mapping[str, Sequence[float]]) -> str:
    """Format per-class shares 0..1 as percentages; a dash where a class did not occur."""
    width = max(map(len, (*classes, "class")))
    lines = [f"  {'class':<{width}}" + "".join(f"{name:>10}" for name in columns)]
    for name, *values in zip(classes, *columns.values(), strict=True):
        shown = ("-" if math.isnan(value) else f"{100 * value:.2f}" for value in values)
        lines.append(f"  {name:<{width}}" + "".join(f"{text:>10}" for text in shown))
    return "\n".join(lines)
