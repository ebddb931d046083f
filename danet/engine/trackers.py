"""Where the log of a run is shown: TensorBoard, Weights & Biases, MLflow, behind one interface."""

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

Plain = dict[str, int | float | str | bool]


class Writer(Protocol):
    """Shows numbers and pictures of one run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows finite numbers; names look like ``train/loss``."""

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Shows pictures, uint8 (H, W, 3) RGB."""

    def summary(self, step: int, settings: Plain, scores: Mapping[str, float]) -> None:
        """Shows the settings of the run beside its last scores; called once, at the end."""

    def close(self) -> None:
        """Writes what is pending."""


class TensorBoard:
    """Event files in the folder ``tensorboard`` of the run.

    Args:
        folder: Of the run.
        step: Where it starts or goes on; what an earlier attempt wrote later is not shown.
        run_id: Not used: the folder says which run it is.
    """

    def __init__(self, folder: Path, *, step: int, run_id: str = "") -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._before = threading.excepthook
        threading.excepthook = self._quiet
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows them as curves."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Shows them with a slider over the steps."""
        for name, image in images.items():
            self._writer.add_image(name, image, step, dataformats="HWC")

    def summary(self, step: int, settings: Plain, scores: Mapping[str, float]) -> None:
        """Fills the tab HPARAMS."""
        named = {f"final/{name}": value for name, value in scores.items()}
        self._writer.add_hparams(dict(settings), named, run_name=".", global_step=step)

    def close(self) -> None:
        """Ends TensorBoard's thread."""
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._before

    def _quiet(self, error: threading.ExceptHookArgs) -> None:
        """Keeps TensorBoard's thread from printing what the next call raises again."""
        is_its = "tensorboard" in type(error.thread).__module__
        if not (is_its and isinstance(error.exc_value, OSError)):
            self._before(error)


class Wandb:
    """A run of Weights & Biases; ``WANDB_PROJECT``, ``WANDB_MODE`` and so on say where.

    Args:
        folder: Of the run; its name is shown.
        step: As TensorBoard.
        run_id: A run that is resumed goes on under the same one.
    """

    def __init__(self, folder: Path, *, step: int, run_id: str = "") -> None:
        wandb = _optional("wandb")
        self._image = wandb.Image
        self._run = wandb.init(
            dir=str(folder), name=folder.name, id=run_id or None, resume="allow", reinit=True
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs them at the step."""
        self._run.log(dict(values), step=step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Logs them at the step."""
        self._run.log({f"images/{k}": self._image(v) for k, v in images.items()}, step=step)

    def summary(self, step: int, settings: Plain, scores: Mapping[str, float]) -> None:
        """Fills the config and the summary."""
        self._run.config.update(settings, allow_val_change=True)
        self._run.summary.update({f"final/{name}": value for name, value in scores.items()})

    def close(self) -> None:
        """Ends the run there."""
        self._run.finish()


class Mlflow:
    """A run of MLflow; ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` say where.

    Args:
        folder: Of the run; its name is shown.
        step: As TensorBoard.
        run_id: A tag by which a resumed run finds itself.
    """

    def __init__(self, folder: Path, *, step: int, run_id: str = "") -> None:
        mlflow = _optional("mlflow")
        self._fault = mlflow.exceptions.MlflowException
        self._client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "danet")
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        same = f"tags.danet_run_id = '{run_id}'"
        found = self._client.search_runs([experiment], same, max_results=1)
        if run_id and found:
            self._id = found[0].info.run_id
        else:
            tags = {"danet_run_id": run_id}
            made = self._client.create_run(experiment, run_name=folder.name, tags=tags)
            self._id = made.info.run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs them as metrics."""
        with self._told():
            for name, value in values.items():
                self._client.log_metric(self._id, _mlflow_name(name), value, step=step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Keeps them as artifacts below ``images/``."""
        with self._told():
            for name, image in images.items():
                path = f"images/{_mlflow_name(name)}_{step:09d}.png"
                self._client.log_image(self._id, image, path)

    def summary(self, step: int, settings: Plain, scores: Mapping[str, float]) -> None:
        """Logs parameters, which MLflow lets nobody change, and the last scores."""
        with self._told():
            known = self._client.get_run(self._id).data.params
            for name, value in settings.items():
                if (key := _mlflow_name(name)) not in known:
                    self._client.log_param(self._id, key, str(value)[:500])
        self.scalars(step, {f"final/{name}": value for name, value in scores.items()})

    def close(self) -> None:
        """Ends the run there."""
        with self._told():
            self._client.set_terminated(self._id)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Makes a server that fails what a full disk is: told once, and the training goes on."""
        try:
            yield
        except self._fault as error:
            raise OSError(str(error)) from error


KINDS: dict[str, type[TensorBoard] | type[Wandb] | type[Mlflow]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


def plain_settings(config: Mapping[str, Any], prefix: str = "") -> Plain:
    """Returns a config as one level of plain values with dotted keys; lists become text."""
    flat: Plain = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= plain_settings(value, f"{prefix}{name}.")
        else:
            is_plain = isinstance(value, (int, float, str, bool)) and value == value
            flat[f"{prefix}{name}"] = value if is_plain else str(value)
    return flat


def finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """Leaves out what cannot be drawn."""
    return {k: v for k, v in values.items() if v is not None and math.isfinite(v)}


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"run.log_to: {module} is not installed: pip install {module}, or leave it out"
        ) from error


def _mlflow_name(name: str) -> str:
    """MLflow takes letters, digits, and ``_-./ ``."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-./ ") else "_" for c in name)
