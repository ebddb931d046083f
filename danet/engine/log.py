"""The log of a run: console, one JSON object per line in metrics.jsonl, and trackers."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from danet import console
from danet.engine.trackers import TRACKERS, Tracker, finite, plain_settings
from danet.evaluation.inference import describe
from danet.evaluation.metrics import ConfusionMatrix, single_class_warning
from danet.filesystem import atomic_write


class RunLog:
    """Writes the metrics of a run; on all processes but the first it does nothing.

    Args:
        folder: Of the run; None for a log that writes nothing.
        step: Where the run starts or continues; later lines of an earlier attempt are dropped.
        steps: Where it ends.
        classes: Names for the tables of scores.
        config: Of the run.
        log_to: Names of trackers, see danet.engine.trackers.
        run_id: Of the run, the same after resuming.
        count: Returns further numbers for the lines of training; called on all processes.

    Raises:
        InputError: The package of a tracker is not installed.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        step: int,
        steps: int,
        classes: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        log_to: Sequence[str] = ("tensorboard",),
        run_id: str = "",
        count: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self.folder = folder
        self.classes = classes
        self.config = config or {}
        self._count = count
        if folder is None:  # other ranks: every method is a no-op, and callers need no test
            return
        self._has_warned = False
        self._has_partial_line = False
        self._has_logged_console_failure = False
        self._path = folder / "metrics.jsonl"
        self._drop_lines_after(self._path, step)
        self._trackers: list[Tracker] = [
            TRACKERS[name](folder, step=step, run_id=run_id) for name in log_to
        ]
        # tqdm redraws ten times a second by default, which fills the log file of a batch job.
        self._bar = tqdm(
            total=steps, initial=step, desc="train", unit="step", dynamic_ncols=True, mininterval=1
        )

    @staticmethod
    def _drop_lines_after(path: Path, step: int) -> None:
        """Remove lines that a resumed run is going to write again, and partial ones."""
        if path.exists():
            # A line is partial if the machine stopped or the disk was full while it was written.
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            with atomic_write(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept))

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        if self.folder is not None:
            self._bar.update()

    def status(self, **values: str) -> None:
        """Show short values beside the progress bar."""
        if self.folder is not None:
            self._bar.set_postfix(values, refresh=False)  # drawn with the next step

    def write(self, text: str) -> None:
        """Print above the progress bar."""
        if self.folder is not None:
            # print() would start in the middle of the bar's line; tqdm clears and redraws it.
            self._bar.write(text, file=sys.stdout)

    def warn(self, text: str) -> None:
        """Print a warning above the progress bar."""
        if self.folder is not None:
            self._bar.write(f"warning: {text}", file=sys.stderr)

    def scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Log named numbers; ``kind`` is ``train`` or ``val``."""
        if self.folder is None:
            return
        shown = {f"{kind}/{name}": value for name, value in finite(values).items()}
        for tracker in self._trackers:
            with self._warn_once_on_error():  # one by one: the others still get the numbers
                tracker.scalars(step, shown)
        self._append({"step": step, "kind": kind} | {k: _json_number(v) for k, v in values.items()})
        self._log_console_failure(step)

    def _log_console_failure(self, step: int) -> None:
        """Log once that the console fails, which ends no training."""
        if (reason := console.failure()) and not self._has_logged_console_failure:
            self._has_logged_console_failure = True
            self._append({"step": step, "kind": "warning", "text": f"console: {reason}"})

    def _append(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with self._warn_once_on_error():
            # A disk that fills within a line leaves its first half; the next line starts a new one.
            after_partial, self._has_partial_line = self._has_partial_line, True
            # Opened for each line: closing it reports a full disk here, and readers miss nothing.
            with open(self._path, "a") as file:
                file.write("\n" * after_partial + json.dumps(line) + "\n")
            self._has_partial_line = False

    def train(self, step: int, losses: Mapping[str, float], figures: Mapping[str, float]) -> None:
        """Log a step: losses by name, rates and throughput, the counters of all processes."""
        named = {f"loss_{name}": loss for name, loss in losses.items()}
        values = {"loss": sum(losses.values()), **named, **figures}
        values |= self._count()  # on all ranks: the count is a collective
        self.status(loss=f"{values['loss']:.3f}", waiting=f"{values['data_waiting']:.0%}")
        self.scalars(step, "train", values)

    def validation(
        self, step: int, confusion: ConfusionMatrix, best_miou: float | None
    ) -> dict[str, float]:
        """Log the scores of a step, as a table by class and as numbers.

        Args:
            step: Of the run.
            confusion: Of the whole validation set, all processes together.
            best_miou: Of the steps before; None if there is none.

        Returns:
            The scores over all classes, by name.
        """
        scores = confusion.scores()
        averages = {
            "miou": scores.miou,
            "pixel_accuracy": scores.pixel_accuracy,
            "mean_accuracy": scores.mean_accuracy,
            "frequency_weighted_iou": scores.frequency_weighted_iou,
        }
        if self.folder is None:  # the other ranks need the scores for the best checkpoint
            return averages
        self.write(f"step {step}: validation, {describe(self.config.get('evaluation', {}))}")
        self.write(class_table(self.classes, {"IoU": scores.iou, "accuracy": scores.accuracy}))
        if warning := single_class_warning(confusion.matrix, self.classes):
            self.warn(f"step {step}: {warning}")
        per_class = {f"iou/{name}": v for name, v in zip(self.classes, scores.iou, strict=True)}
        self.scalars(step, "val", {**averages, **per_class})
        self.write(
            f"  mIoU {100 * scores.miou:.2f} (best "
            f"{100 * max(scores.miou, best_miou or 0.0):.2f}), "
            f"pixel accuracy {100 * scores.pixel_accuracy:.2f}"
        )
        return averages

    def takes_images(self) -> bool:
        """Return whether a tracker of this process shows pictures."""
        return self.folder is not None and bool(self._trackers)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Show pictures, uint8 (H, W, 3) RGB."""
        for tracker in self._trackers if self.folder is not None else ():
            with self._warn_once_on_error():
                tracker.images(step, images)

    def summary(self, step: int, scores: Mapping[str, float | None]) -> None:
        """Show the settings of the run beside its last scores."""
        # ``run`` (folder, name, trackers) differs between runs and explains no score.
        config = {key: value for key, value in self.config.items() if key != "run"}
        for tracker in self._trackers if self.folder is not None else ():
            with self._warn_once_on_error():
                tracker.summary(step, plain_settings(config), finite(scores))

    @contextmanager
    def _warn_once_on_error(self) -> Iterator[None]:
        """Turn the first OSError into a warning and drop further ones."""
        try:
            yield
        except OSError as error:  # days of training are worth more than lines of a log
            if not self._has_warned:
                self._has_warned = True
                self.warn(f"{self.folder}: the log cannot be written ({error.strerror or error})")

    def close(self) -> None:
        """End the progress bar and write what is pending."""
        if self.folder is not None:
            self._bar.close()
            with suppress(OSError, ValueError):
                sys.stdout.flush()  # what is buffered may fail only here
            self._log_console_failure(int(self._bar.n))
            for tracker in self._trackers:
                with self._warn_once_on_error():
                    tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; none where there is no file.

    Partial lines are left out, and so are values that are not numbers.
    """
    lines = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):  # a run that was killed, or that is writing right now
            continue
        # The file may lie beside a foreign checkpoint, so nothing of its content is trusted.
        if isinstance(found, dict) and isinstance(found.get("step"), (int, float)):
            lines.append({k: v for k, v in found.items() if k == "kind" or _is_score(v)})
    return lines


def _is_score(value: Any) -> bool:
    """Return whether a value is a finite number, or the null that stands for NaN."""
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))


def _step_of(line: str) -> float:
    """Return the step of a line of metrics.jsonl; infinity for a partial line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _json_number(value: float) -> float | None:
    # Python writes NaN and Infinity, which are not JSON: other readers refuse the whole line.
    return value if math.isfinite(value) else None


def class_table(classes: Sequence[str], columns: Mapping[str, Sequence[float]]) -> str:
    """Format per-class shares 0..1 as percentages; a dash where a class did not occur."""
    width = max(map(len, (*classes, "class")))
    lines = [f"  {'class':<{width}}" + "".join(f"{name:>10}" for name in columns)]
    for i, name in enumerate(classes):
        cells: list[Any] = [values[i] for values in columns.values()]
        shown = "".join(f"{'-' if math.isnan(v) else format(100 * v, '.2f'):>10}" for v in cells)
        lines.append(f"  {name:<{width}}{shown}")
    return "\n".join(lines)
