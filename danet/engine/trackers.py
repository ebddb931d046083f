"""Experiment trackers behind one interface: TensorBoard, Weights & Biases, MLflow.

Each class is made of the folder of a run, the step where it starts or continues, its id (the same
after resuming) and its settings, and has the methods of ``TensorBoard``. Whatever they raise,
RunLog makes a warning of it.
"""

import math
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from danet.plain import flat

PlainSettings = dict[str, int | float | str | bool]


class TensorBoard:
    """Event files in the folder ``tensorboard`` of the run."""

    def __init__(self, folder: Path, step: int, run_id: str, settings: PlainSettings) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow, and not needed by all

        self._settings = settings
        # purge_step hides events from that step on: those that a killed attempt wrote last.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._previous_hook = threading.excepthook
        threading.excepthook = self._ignore_write_errors

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log finite numbers; names have the form ``train/loss``."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Log pictures, uint8 (H, W, 3) RGB."""
        for name, image in images.items():
            self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self, step: int, scores: Mapping[str, float]) -> None:
        """Write what is pending, with the last scores of a finished run, named ``final/miou``."""
        try:
            if scores:  # the tab HPARAMS; by default it makes a subfolder named by the time
                settings = dict(self._settings)
                self._writer.add_hparams(settings, dict(scores), run_name=".", global_step=step)
            self._writer.close()
        finally:
            threading.excepthook = self._previous_hook

    def _ignore_write_errors(self, error: threading.ExceptHookArgs) -> None:
        """Print the error of a thread, except an OSError of TensorBoard's."""
        # Its thread ends with a traceback on a full disk; the next add_scalar raises the same error
        # in this thread, where RunLog makes one warning of it.
        is_tensorboard = "tensorboard" in type(error.thread).__module__
        if not (is_tensorboard and isinstance(error.exc_value, OSError)):
            self._previous_hook(error)


class Wandb:
    """A run of Weights & Biases; ``WANDB_PROJECT``, ``WANDB_MODE`` and so on set the place."""

    def __init__(self, folder: Path, step: int, run_id: str, settings: PlainSettings) -> None:
        import wandb

        self._image = wandb.Image
        # resume="allow": the first start creates the run of this id, a resumed one continues it.
        self._run = wandb.init(dir=str(folder), name=folder.name, id=run_id, resume="allow")
        self._run.config.update(settings, allow_val_change=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers; those of a step that a resumed run repeats are dropped with a warning."""
        self._run.log(dict(values), step=step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Log pictures."""
        self._run.log({f"images/{k}": self._image(v) for k, v in images.items()}, step=step)

    def close(self, step: int, scores: Mapping[str, float]) -> None:
        """Fill the summary and end the run."""
        self._run.summary.update(dict(scores))
        self._run.finish()


class Mlflow:
    """A run of MLflow; ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` set the place."""

    def __init__(self, folder: Path, step: int, run_id: str, settings: PlainSettings) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "danet"))
        # MLflow makes up the ids of runs itself, so ours can only be a tag to search for.
        wanted = f"tags.danet_run_id = '{run_id}'"
        found: Any = mlflow.search_runs(filter_string=wanted, output_format="list")
        known = found[0].info.run_id if found else None
        mlflow.start_run(known, run_name=folder.name, tags={"danet_run_id": run_id})
        if not found:  # MLflow refuses to change those of the first start
            mlflow.log_params(settings)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics; characters that MLflow refuses in a name become underscores."""
        named = {re.sub(r"[^\w\-./ ]", "_", name): value for name, value in values.items()}
        self._mlflow.log_metrics(named, step=step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Log pictures."""
        for name, image in images.items():
            self._mlflow.log_image(image, key=name, step=step)

    def close(self, step: int, scores: Mapping[str, float]) -> None:
        """Log the last scores and end the run."""
        self.scalars(step, scores)
        self._mlflow.end_run()


Tracker = TensorBoard | Wandb | Mlflow
TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}


def plain_settings(config: Mapping[str, Any]) -> PlainSettings:
    """Return a config as one level of plain values with dotted keys; lists become text."""
    # NaN, which is not equal to itself, becomes text.
    return {
        key: value if isinstance(value, (int, float, str, bool)) and value == value else str(value)
        for key, value in flat(config).items()
    }


def finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """Return the values that can be plotted: no None, no NaN, no infinity."""
    return {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
