"""What a run tells: console, one JSON object per line in metrics.jsonl, and writers for people."""

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
from danet.engine.trackers import KINDS, Writer, finite, plain_settings
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
        InputError: The package of a writer is not installed.
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
        if folder is None:
            return
        self._is_warned = False
        self._is_torn = False
        self._is_console_noted = False
        self._path = folder / "metrics.jsonl"
        self._drop_after(self._path, step)
        self._writers: list[Writer] = [
            KINDS[name](folder, step=step, run_id=run_id) for name in log_to
        ]
        self._bar = tqdm(
            total=steps, initial=step, desc="train", unit="step", dynamic_ncols=True, mininterval=1
        )

    @staticmethod
    def _drop_after(path: Path, step: int) -> None:
        """Removes lines that a resumed run is going to write again.

        So it does with half lines: the machine stopped, or the disk was full, when they were
        written.
        """
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            with atomic_write(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept))

    def advance(self) -> None:
        """Moves the progress bar by one step."""
        if self.folder is not None:
            self._bar.update()

    def status(self, **values: str) -> None:
        """Shows short values beside the progress bar."""
        if self.folder is not None:
            self._bar.set_postfix(values, refresh=False)

    def say(self, text: str) -> None:
        """Prints above the progress bar."""
        if self.folder is not None:
            self._bar.write(text, file=sys.stdout)

    def warn(self, text: str) -> None:
        """Prints above the progress bar, as something that stops nothing."""
        if self.folder is not None:
            self._bar.write(f"warning: {text}", file=sys.stderr)

    def scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Writes named numbers; ``kind`` is ``train`` or ``val``."""
        if self.folder is None:
            return
        shown = {f"{kind}/{name}": value for name, value in finite(values).items()}
        for writer in self._writers:
            with self._forgiving():
                writer.scalars(step, shown)
        self._write({"step": step, "kind": kind} | {k: _json_number(v) for k, v in values.items()})
        self._note_console(step)

    def _note_console(self, step: int) -> None:
        """Writes once that the console fails, which ends no training."""
        if (reason := console.failure()) and not self._is_console_noted:
            self._is_console_noted = True
            self._write({"step": step, "kind": "warning", "text": f"console: {reason}"})

    def _write(self, line: Mapping[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        with self._forgiving():
            was_torn, self._is_torn = self._is_torn, True
            with open(self._path, "a") as file:
                file.write("\n" * was_torn + json.dumps(line) + "\n")
            self._is_torn = False

    def train(self, step: int, losses: Mapping[str, float], figures: Mapping[str, float]) -> None:
        """Log a step: losses by name, rates and throughput, the counters of all processes."""
        named = {f"loss_{name}": loss for name, loss in losses.items()}
        values = {"loss": sum(losses.values()), **named, **figures, **self._count()}
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
        if self.folder is None:
            return averages
        self.say(f"step {step}: validation, {describe(self.config.get('evaluation', {}))}")
        self.say(class_table(self.classes, {"IoU": scores.iou, "accuracy": scores.accuracy}))
        if warning := single_class_warning(confusion.matrix, self.classes):
            self.warn(f"step {step}: {warning}")
        per_class = {f"iou/{name}": v for name, v in zip(self.classes, scores.iou, strict=True)}
        self.scalars(step, "val", {**averages, **per_class})
        self.say(
            f"  mIoU {100 * scores.miou:.2f} (best "
            f"{100 * max(scores.miou, best_miou or 0.0):.2f}), "
            f"pixel accuracy {100 * scores.pixel_accuracy:.2f}"
        )
        return averages

    def takes_images(self) -> bool:
        """Return whether a tracker of this process shows pictures."""
        return self.folder is not None and bool(self._writers)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Shows pictures, uint8 (H, W, 3) RGB."""
        for writer in self._writers if self.folder is not None else ():
            with self._forgiving():
                writer.images(step, images)

    def summary(self, step: int, scores: Mapping[str, float | None]) -> None:
        """Show the settings of the run beside its last scores."""
        config = {key: value for key, value in self.config.items() if key != "run"}
        for writer in self._writers if self.folder is not None else ():
            with self._forgiving():
                writer.summary(step, plain_settings(config), finite(scores))

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Lets a training go on whose log cannot be written; that is told once."""
        try:
            yield
        except OSError as error:
            if not self._is_warned:
                self._is_warned = True
                self.warn(f"{self.folder}: the log cannot be written ({error.strerror or error})")

    def close(self) -> None:
        """Ends the progress bar and writes what is pending."""
        if self.folder is not None:
            self._bar.close()
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            self._note_console(int(self._bar.n))
            for writer in self._writers:
                with self._forgiving():
                    writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl; none where there is no file.

    Half a line, of a run that was killed or goes on right now, is left out, and so is all that is
    no number: the file may lie beside somebody else's checkpoint.
    """
    lines = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), (int, float)):
            lines.append({k: v for k, v in found.items() if k == "kind" or _is_shown(v)})
    return lines


def _is_shown(value: Any) -> bool:
    """Return whether a value of a line is one that a run wrote as a score; null stands for NaN."""
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))


def _step_of(line: str) -> float:
    """Returns the step of a line of metrics.jsonl; infinity for half a line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _json_number(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def class_table(classes: Sequence[str], columns: Mapping[str, Sequence[float]]) -> str:
    """Lays out per-class shares 0..1 as percentages; a dash where a class did not occur."""
    width = max(map(len, (*classes, "class")))
    lines = [f"  {'class':<{width}}" + "".join(f"{name:>10}" for name in columns)]
    for i, name in enumerate(classes):
        cells: list[Any] = [values[i] for values in columns.values()]
        shown = "".join(f"{'-' if math.isnan(v) else format(100 * v, '.2f'):>10}" for v in cells)
        lines.append(f"  {name:<{width}}{shown}")
    return "\n".join(lines)
