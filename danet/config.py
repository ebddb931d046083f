"""The schema of the configs: what Hydra holds a composed config against.

Hydra refuses unknown choices and, with the schema, unknown keys and wrong types of the fixed part.
``danet.check`` looks at the rest.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from danet.engine.settings import TrainSettings


@dataclass
class RunSettings:
    """The config group ``run``: where a run keeps its files."""

    dir: str | None = None
    name: str | None = None


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
    device: str = "auto"
    output: str | None = None
    submission: str | None = None


@dataclass
class CheckConfig:
    """The root of ``check.yaml``."""

    data: dict[str, Any] = field(default_factory=dict)
    splits: list[str] | None = None
    full: bool = False
    show: int = 5
    samples: int = 12
    output: str | None = None


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
    opacity: float = 0.55
    device: str = "auto"
    output: str | None = None


def _class_names(source: Any) -> list[str]:
    """Reads names from a text file, so that a checkpoint holds them and not the file's path."""
    if not isinstance(source, str):
        return list(source)
    from danet.datasets.labels import read_class_names  # brings in torch

    return read_class_names(source)


def register() -> None:
    """Makes the schemas known to Hydra and the resolvers of the configs to OmegaConf."""
    store = ConfigStore.instance()
    for name, schema in (
        ("train_schema", TrainConfig),
        ("eval_schema", EvalConfig),
        ("visualize_schema", VisualizeConfig),
        ("check_schema", CheckConfig),
    ):
        store.store(name=name, node=schema)
    OmegaConf.register_new_resolver("count", len, replace=True)
    OmegaConf.register_new_resolver("class_names", _class_names, replace=True)
