"""Experiment trackers behind one interface: TensorBoard, Weights & Biases, MLflow."""

import importlib
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from danet.errors import InputError
from danet.plain import flat

PlainSettings = dict[str, int | float | str | bool]


class Tracker(Protocol):
    """Receives the numbers and pictures of one run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log finite numbers; names have the form ``train/loss``."""

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Log pictures, uint8 (H, W, 3) RGB."""

    def summary(self, step: int, settings: PlainSettings, scores: Mapping[str, float]) -> None:
        """Log the settings of the run beside its last scores; called once, at the end."""

    def close(self) -> None:
        """Write what is pending."""


class TensorBoard:
    """Event files in the folder ``tensorboard`` of the run.

    Args:
        folder: Of the run.
        step: Where it starts or continues; what an earlier attempt wrote later is hidden.
        run_id: Not used: the folder identifies the run.
    """

    def __init__(self, folder: Path, *, step: int, run_id: str = "") -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow, and not needed by all

        self._previous_hook = threading.excepthook
        threading.excepthook = self._ignore_write_errors
        # purge_step hides events from that step on: those that a killed attempt wrote last.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log curves."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Log pictures with a slider over the steps."""
        for name, image in images.items():
            self._writer.add_image(name, image, step, dataformats="HWC")

    def summary(self, step: int, settings: PlainSettings, scores: Mapping[str, float]) -> None:
        """Fill the tab HPARAMS."""
        named = {f"final/{name}": value for name, value in scores.items()}
        # run_name: the default is a subfolder named by the time, another run in the list.
        self._writer.add_hparams(dict(settings), named, run_name=".", global_step=step)

    def close(self) -> None:
        """End TensorBoard's thread."""
        try:
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
    """A run of Weights & Biases; ``WANDB_PROJECT``, ``WANDB_MODE`` and so on set the place.

    Args:
        folder: Of the run; its name is shown.
        step: As TensorBoard.
        run_id: Kept by a run that is resumed.
    """

    def __init__(self, folder: Path, *, step: int, run_id: str = "") -> None:
        wandb = _import_optional("wandb")
        self._image = wandb.Image
        # resume="allow": the first start creates the run of this id, a resumed one continues it.
        self._run = wandb.init(
            dir=str(folder), name=folder.name, id=run_id or None, resume="allow", reinit=True
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers at a step."""
        # wandb's steps only grow: what a resumed run repeats is dropped there with a warning.
        self._run.log(dict(values), step=step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Log pictures at a step."""
        self._run.log({f"images/{k}": self._image(v) for k, v in images.items()}, step=step)

    def summary(self, step: int, settings: PlainSettings, scores: Mapping[str, float]) -> None:
        """Fill the config and the summary."""
        self._run.config.update(settings, allow_val_change=True)  # resumed runs may
        self._run.summary.update({f"final/{name}": value for name, value in scores.items()})

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class Mlflow:
    """A run of MLflow; ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` set the place.

    Args:
        folder: Of the run; its name is shown.
        step: As TensorBoard.
        run_id: Kept as a tag, by which a resumed run is found.
    """

    def __init__(self, folder: Path, *, step: int, run_id: str = "") -> None:
        mlflow = _import_optional("mlflow")
        self._error = mlflow.exceptions.MlflowException
        # The client, not mlflow.log_metric: that one works on a run global to the process.
        self._client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "danet")
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        # MLflow makes up the ids of runs itself, so ours can only be a tag to search for.
        has_tag = f"tags.danet_run_id = '{run_id}'"
        found = self._client.search_runs([experiment], has_tag, max_results=1)
        if run_id and found:
            self._id = found[0].info.run_id
        else:
            tags = {"danet_run_id": run_id}
            made = self._client.create_run(experiment, run_name=folder.name, tags=tags)
            self._id = made.info.run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics."""
        with self._as_os_error():
            for name, value in values.items():
                self._client.log_metric(self._id, _mlflow_name(name), value, step=step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Log artifacts below ``images/``."""
        with self._as_os_error():
            for name, image in images.items():
                # The step is part of the name: log_image with a path overwrites.
                path = f"images/{_mlflow_name(name)}_{step:09d}.png"
                self._client.log_image(self._id, image, path)

    def summary(self, step: int, settings: PlainSettings, scores: Mapping[str, float]) -> None:
        """Log parameters and the last scores."""
        with self._as_os_error():
            # A parameter cannot be changed; those of the first start stay when a run is resumed.
            known = self._client.get_run(self._id).data.params
            for name, value in settings.items():
                if (key := _mlflow_name(name)) not in known:
                    # 500 characters: older servers refuse more.
                    self._client.log_param(self._id, key, str(value)[:500])
        self.scalars(step, {f"final/{name}": value for name, value in scores.items()})

    def close(self) -> None:
        """End the run."""
        with self._as_os_error():
            self._client.set_terminated(self._id)

    @contextmanager
    def _as_os_error(self) -> Iterator[None]:
        """Raise OSError in the place of MLflow's error."""
        try:
            yield
        except self._error as error:  # RunLog treats a server that fails like a full disk
            raise OSError(str(error)) from error


TRACKERS: dict[str, type[TensorBoard] | type[Wandb] | type[Mlflow]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


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


def _import_optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"run.log_to: {module} is not installed: pip install {module}, or leave it out"
        ) from error


def _mlflow_name(name: str) -> str:
    # Another character, as in "traffic light (off)", would cost all metrics after it in the call.
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-./ ") else "_" for c in name)
