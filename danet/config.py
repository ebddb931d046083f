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


def register() -> None:
    """Makes the schemas known to Hydra and the resolver ``count`` to OmegaConf."""
    store = ConfigStore.instance()
    for name, schema in (
        ("train_schema", TrainConfig),
        ("eval_schema", EvalConfig),
        ("visualize_schema", VisualizeConfig),
    ):
        store.store(name=name, node=schema)
    OmegaConf.register_new_resolver("count", len, replace=True)
