"""The schema of the configs: what Hydra holds a composed config against.

Hydra refuses unknown choices and, with the schema, unknown keys and wrong types of the fixed part.
``danet.config.validate`` looks at the rest, with what this module says of values and annotations.
"""

import difflib
import importlib.util
import inspect
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, Union

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from danet.engine.settings import TrainSettings
from danet.plain import is_int, is_number

_ELSEWHERE = {
    "ignore_index": "pixels that do not count have the value 255, always, and classes count from "
    "0; other values are mapped with data.values={0: 255, 1: 0, 2: 1} (data=folder)",
    "amp": "see trainer.precision (auto, float32, bfloat16, float16)",
    "thresh": "see loss.main.threshold with loss=ohem",
    "class_weights": "see loss.main.class_weights of loss=cross_entropy and ohem, "
    "loss.main.losses.0.class_weights of loss=dice and lovasz",
    "norm": "batch norm is the only one; see trainer.sync_batchnorm for several processes",
    "epochs": "durations are in updates: see trainer.steps",
    "max_iters": "see trainer.steps",
    "learning_rate": "see optimizer.lr",
}
"""Last parts of keys that other programs have -> what does it here."""


LOG_TO = ("tensorboard", "wandb", "mlflow")
"""Where a log can be shown; each is the name of its package, too."""


@dataclass
class RunSettings:
    """The config group ``run``: where a run keeps its files."""

    dir: str | None = None
    name: str | None = None
    log_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    processes: int | None = None

    def faults(self) -> list[str]:
        """Returns what is wrong with the values, one line each."""
        lines = []
        for name in self.log_to:
            if name not in LOG_TO:
                close = did_you_mean(name, LOG_TO)
                lines.append(f"run.log_to: there is no {name}{close}; choices: {', '.join(LOG_TO)}")
            elif importlib.util.find_spec(name) is None:
                lines.append(f"run.log_to: {name} is not installed: pip install {name}")
        if self.processes is not None and self.processes < 1:
            lines.append(f"run.processes={self.processes}: expected at least 1, or null")
        return lines


@dataclass
class TrainConfig:
    """The root of ``train.yaml``."""

    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    trainer: TrainSettings = MISSING
    run: RunSettings = field(default_factory=RunSettings)
    seed: int = 1
    resume: str | None = None
    allow_changes: bool = False
    init_from: str | None = None
    dry_run: bool = False
    device_memory: float | None = None


@dataclass
class DataFolder:
    """Where the data is now, when not where the checkpoint says; null leaves it."""

    root: str | None = None


@dataclass
class DataOverrides(DataFolder):
    """What may differ from the data settings inside a checkpoint; null leaves them."""

    num_workers: int | None = None


@dataclass
class EvalConfig:
    """The root of ``eval.yaml``."""

    checkpoint: str = MISSING
    split: str | None = None
    data: DataOverrides = field(default_factory=DataOverrides)
    evaluation: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    boundary_ratio: float | None = None
    device: str = "auto"
    output: str | None = None
    submission: str | None = None


@dataclass
class PredictConfig:
    """The root of ``predict.yaml``."""

    checkpoint: str = MISSING
    images: str = MISSING
    write: list[str] = field(default_factory=lambda: ["index", "overlay"])
    evaluation: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    max_pixels: int = 178_956_970
    opacity: float = 0.55
    device: str = "auto"
    output: str | None = None


@dataclass
class ExportConfig:
    """The root of ``export.yaml``."""

    checkpoint: str = MISSING
    formats: list[str] = field(default_factory=lambda: ["onnx"])
    opset: int = 20
    sizes: list[Any] = field(default_factory=lambda: [[256, 256], [125, 203], [77, 310]])
    metrics: str | None = None
    output: str | None = None
    push: str | None = None
    private: bool = True


@dataclass
class CheckConfig:
    """The root of ``check_data.yaml``."""

    data: dict[str, Any] = field(default_factory=dict)
    splits: list[str] | None = None
    full: bool = False
    show: int = 5
    samples: int = 12
    output: str | None = None


@dataclass
class ConvertConfig:
    """The root of ``convert.yaml``."""

    source: str = MISSING
    input: str = MISSING
    output: str = MISSING


@dataclass
class VisualizeConfig:
    """The root of ``visualize.yaml``."""

    checkpoint: str = MISSING
    split: str | None = None
    data: DataFolder = field(default_factory=DataFolder)
    images: str | None = None
    count: int = 6
    points: list[Any] | None = None
    classes: list[str] | None = None
    attention: bool = True
    by_class: bool = False
    channels: int = 1
    other: str | None = None
    report: bool = False
    opacity: float = 0.55
    device: str = "auto"
    output: str | None = None


def _class_names(source: Any) -> list[str]:
    """Reads names from a text file, so that a checkpoint holds them and not the file's path."""
    if not isinstance(source, str):
        return list(source)
    from danet.datasets.labels import read_class_names  # brings in torch

    return read_class_names(source)


def _class_colors(source: Any, colors: Any, values: Any, first: Any) -> Any:
    """Returns the colours of masks: those that are set, else those in a file of class names."""
    if colors or values or first or not isinstance(source, str):
        return colors
    from danet.datasets.labels import read_class_file

    return read_class_file(source).colors


def register() -> None:
    """Makes the schemas known to Hydra and the resolvers of the configs to OmegaConf."""
    store = ConfigStore.instance()
    for name, schema in (
        ("train_schema", TrainConfig),
        ("eval_schema", EvalConfig),
        ("visualize_schema", VisualizeConfig),
        ("check_schema", CheckConfig),
        ("convert_schema", ConvertConfig),
        ("predict_schema", PredictConfig),
        ("export_schema", ExportConfig),
    ):
        store.store(name=name, node=schema)
    OmegaConf.register_new_resolver("count", len, replace=True)
    OmegaConf.register_new_resolver("class_names", _class_names, replace=True)
    OmegaConf.register_new_resolver("class_colors", _class_colors, replace=True)


def mismatch(value: Any, hint: Any) -> str | None:
    """Says what is expected where a plain value does not fit an annotation; None where it does.

    Annotations of other things than plain values (modules, callables) are not judged.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        problems = [mismatch(value, option) for option in options]
        if None in problems:
            return None
        return next(
            p for p, option in zip(problems, options, strict=True) if option is not NoneType
        )
    if hint is NoneType:
        return None if value is None else "expected null"
    if origin is Literal:
        if value in options:
            return None
        return f"expected one of {', '.join(map(str, options))}{did_you_mean(value, options)}"
    simple = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if hint in simple:
        fits = {
            int: is_int(value),
            float: is_number(value),
            bool: isinstance(value, bool),
            str: isinstance(value, str),
        }[hint]
        return None if fits else f"expected {simple[hint]}, got {_describe(value)}"
    if inspect.isclass(origin) and issubclass(origin, Mapping) and not isinstance(value, dict):
        return f"expected a mapping, {{name: value}}, got {_describe(value)}"
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        if isinstance(value, (str, dict)) or not isinstance(value, (list, tuple)):
            return f"expected a list, got {_describe(value)}"
        element = options[0] if options else Any
        for item in value:
            problem = mismatch(item, element)
            if problem:
                return f"{problem} in the list"
    return None


def _describe(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value!r}"
    return "nothing (null)" if value is None else repr(value)


def did_you_mean(word: Any, options: Iterable[Any]) -> str:
    """Returns "; did you mean X?" for the closest option, or nothing."""
    close = difflib.get_close_matches(str(word), [str(option) for option in options], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def instead(key: str, options: Iterable[str]) -> str:
    """Returns what to use for a key that does not exist, as a part of a message, or nothing."""
    hint = _ELSEWHERE.get(key.rpartition(".")[2])
    return f"; {hint}" if hint else did_you_mean(key, options)
