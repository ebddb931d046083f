"""What a run tells: console, TensorBoard, and one JSON object per line in metrics.jsonl."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class RunLog:
    """Writes the metrics of a run; on all processes but the first it does nothing.

    Args:
        folder: Of the run; None for a log that does nothing.
        step: Where the run starts or goes on; later lines of an earlier attempt are dropped.
        steps: Where it ends.
    """

    def __init__(self, folder: Path | None, *, step: int, steps: int) -> None:
        self.folder = folder
        if folder is None:
            return
        self._drop_after(folder / "metrics.jsonl", step)
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._bar = tqdm(
            total=steps, initial=step, desc="train", unit="step", dynamic_ncols=True, mininterval=1
        )

    @staticmethod
    def _drop_after(path: Path, step: int) -> None:
        """Removes lines that a resumed run is going to write again."""
        if path.exists():
            lines = path.read_text().splitlines()
            if lines and not lines[-1].endswith("}"):  # the machine stopped while it was written
                del lines[-1]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            temporary.replace(path)

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

    def scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Writes named numbers; ``kind`` is ``train`` or ``val``."""
        if self.folder is None:
            return
        for name, value in values.items():
            if math.isfinite(value):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        line = {"step": step, "kind": kind, **{k: _json_number(v) for k, v in values.items()}}
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Shows pictures, uint8 (H, W, 3) RGB, in TensorBoard."""
        if self.folder is not None:
            for name, image in images.items():
                self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Ends the progress bar and writes what is pending."""
        if self.folder is not None:
            self._bar.close()
            self._tensorboard.close()


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
