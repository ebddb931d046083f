"""The dataclasses of the configs: schemas for Hydra, and the objects that the code receives.

Hydra refuses unknown choices and, with a schema, unknown keys and wrong types of the fixed part;
``danet.config.validate`` checks the rest. A field that may have another value in a resumed run is
declared by ``resumable``, with the reason.
"""

import difflib
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, ListConfig, OmegaConf

from danet.config.help import choices_with
from danet.engine.settings import TrainSettings, resumable
from danet.errors import InputError

Node = dict[str, Any]  # a class, ``_target_``, and its arguments: plain values and further nodes
LOG_TO = ("tensorboard", "wandb", "mlflow")
"""Programs that show a log; each is the name of its package, too."""
_FILES = "where files go changes no weight"
_READING = "how files are read changes no sample"
_MOVED = "data moves; its files are compared by name"
_START = "says how this start begins"


# Never frozen: OmegaConf makes the node of a frozen dataclass read-only, and composition fails.
@dataclass
class RunSettings:
    """The config group ``run``: where a run writes its files, and how it is started."""

    dir: str | None = resumable(None, _FILES)
    name: str | None = resumable(None, _FILES)
    log_to: list[str] = field(
        default_factory=lambda: ["tensorboard"], metadata={"resumable": _FILES}
    )
    processes: int | None = resumable(None, "part of the global batch, compared as a product")

    def errors(self) -> list[str]:
        """Return what is wrong with the values, one line each."""
        lines = []
        for name in self.log_to:
            if name not in LOG_TO:
                close = did_you_mean(name, LOG_TO)
                lines.append(f"run.log_to: there is no {name}{close}; choices: {', '.join(LOG_TO)}")
            elif importlib.util.find_spec(name) is None:  # no import: it may take seconds
                lines.append(f"run.log_to: {name} is not installed: pip install {name}")
        return lines


@dataclass
class TrainSchema:
    """The root of ``train.yaml`` as Hydra composes it: each data set has keys of its own."""

    model: Node = field(default_factory=dict)
    loss: Node = field(default_factory=dict)
    optimizer: Node = field(default_factory=dict)
    schedule: Node = field(default_factory=dict)
    evaluation: Node = field(default_factory=dict)
    trainer: TrainSettings = MISSING
    run: RunSettings = field(default_factory=RunSettings)
    seed: int = 1
    resume: str | None = resumable(None, _START)
    allow_changes: bool = resumable(False, _START)
    init_from: str | None = resumable(None, _START)
    dry_run: bool = resumable(False, _START)
    device_memory: float | None = resumable(None, "of a plan, which trains nothing")
    data: Any = field(default_factory=dict)


@dataclass(kw_only=True)
class DataConfig:
    """The config group ``data``: the keys that the code reads for every data set."""

    dataset: Node  # the class that reads the files; make_dataset adds split and transform
    transforms: dict[str, Node | None]  # by "train" and "eval"; null for none
    num_classes: int
    train_split: str
    val_split: str | None  # None trains without a validation set
    batch_size: int = resumable(1, "part of the global batch, compared as a product")  # per process
    # Processes that load; with 0 the training process does.
    num_workers: int = resumable(0, "the order of samples does not depend on it")
    root: str | None = resumable(None, _MOVED)
    # Further folders for training: a folder, or {root: FOLDER, split: NAME}.
    extra_roots: list[Any] = field(default_factory=list, metadata={"resumable": _MOVED})
    rare_class_temperature: float | None = None  # of rare-class sampling; None for none
    rare_class_min_pixels: int = 3000  # of the drawn class in its picture
    class_mix: float | None = None  # share of the samples with classes of another pasted over them
    crop: list[int] | None = None  # height and width of a training image,
    size: list[int] | None = None  # if all have one size
    allow_overlap: bool = resumable(False, "permits, and changes no sample")
    on_bad_sample: str = resumable("error", _READING)
    max_bad_share: float = resumable(0.01, _READING)
    timeout: float = resumable(300, _READING)  # seconds to wait for a batch; 0 for no limit
    cache: str = resumable("none", _READING)
    cache_dir: str | None = resumable(None, _READING)
    cache_gib: float | None = resumable(None, _READING)
    max_pixels: int | None = resumable(None, _READING)


@dataclass(kw_only=True)  # fields without a default after those of the base, which have one
class TrainConfig(TrainSchema):
    """A checked train config: what ``danet.config.validate.check`` returns."""

    data: DataConfig
    # The same as plain values, with all keys of the data set; stored in checkpoints.
    plain: dict[str, Any] = field(repr=False)


SETTINGS = {"": TrainConfig, "data.": DataConfig, "trainer.": TrainSettings, "run.": RunSettings}
"""Beginning of a key -> the dataclass of the settings there."""

_OF_TRAINING = ("model", "loss", "optimizer", "schedule", "trainer", "run", "experiment", "debug")
"""First parts of keys that only a training has."""


@dataclass
class DataFolder:
    """Where the data is now, if not in the folder of the checkpoint's config; null keeps that."""

    root: str | None = None


@dataclass
class DataOverrides(DataFolder):
    """Data settings that may differ from those of a checkpoint; null keeps these."""

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
    calibrate: bool = False
    corruptions: Any = False
    frost: str = "weights/frost"
    device: str = "auto"
    output: str | None = None
    submission: str | None = None


@dataclass
class PredictConfig:
    """The root of ``predict.yaml``."""

    checkpoint: str = MISSING
    images: str = MISSING
    write: list[str] = field(default_factory=lambda: ["index", "overlay"])
    tolerance: float = 1.0
    min_confidence: float = 0.0
    maps: str = "uint16"
    evaluation: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    frames: int | None = None
    max_pixels: int = 178_956_970
    opacity: float = 0.55
    device: str = "auto"
    output: str | None = None


@dataclass
class ExportConfig:
    """The root of ``export.yaml``."""

    checkpoint: str = MISSING
    formats: list[str] | None = None
    opset: int = 20
    size: list[int] | None = None
    sizes: list[Any] = field(default_factory=lambda: [[256, 256], [125, 203], [77, 310]])
    data: DataFolder = field(default_factory=DataFolder)
    calibration: int = 64
    metrics: str | None = None
    output: str | None = None
    demo: bool = False
    demo_runtime: str | None = None
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
    checkpoint: str | None = None
    suspects: int = 40
    device: str = "auto"
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
    channels: int = 1
    other: str | None = None
    report: bool = False
    opacity: float = 0.55
    device: str = "auto"
    output: str | None = None


def _class_names(source: Any) -> list[str]:
    """Return class names, perhaps from a text file: a checkpoint has the names and not a path."""
    if isinstance(source, (list, ListConfig)):
        return list(source)
    if not isinstance(source, str):
        raise InputError(
            f"data.classes={source}: expected names, 'data.classes=[name,name]', or a file with "
            "one name per line"
        )
    return _class_file(source).names


def _class_colors(source: Any, colors: Any, values: Any, first: Any) -> Any:
    """Return the colours of masks that are set, else those in a file of class names."""
    if colors or values or first or not isinstance(source, str):
        return colors
    return _class_file(source).colors


def _class_file(source: str) -> Any:
    from danet.datasets.labels import read_class_file  # late, since it loads torch

    return read_class_file(source)


def _annotated_classes(classes: Any, root: str, *settings: Any) -> list[str]:
    """Return class names that are set, else those of the export of an annotation tool."""
    if classes is not None:
        return _class_names(classes)
    from danet.datasets.annotations import class_names_of  # late, since they load torch
    from danet.datasets.cache import cache_folder
    from danet.datasets.exports.index import open_export

    kind, annotations, images_dir, labels, background, cache = settings
    place = Path(root).expanduser().absolute(), cache_folder(cache)
    index = open_export(*place, kind=kind, annotations=annotations, images_dir=images_dir)
    return class_names_of(index, labels, background)


def register() -> None:
    """Register the schemas with Hydra and the resolvers of the configs with OmegaConf."""
    tools = (EvalConfig, VisualizeConfig, CheckConfig, ConvertConfig, PredictConfig, ExportConfig)
    for schema in (TrainSchema, *tools):
        name = re.sub("Schema|Config", "_schema", schema.__name__).lower()
        node = OmegaConf.structured(schema)
        if schema in (EvalConfig, PredictConfig):  # any setting of the protocol of the training
            OmegaConf.set_struct(node.evaluation, False)
        ConfigStore.instance().store(name=name, node=node)
    resolvers: dict[str, Any] = {"count": len, "class_names": _class_names}
    resolvers["class_colors"] = _class_colors
    resolvers["val_share"] = lambda share, split: 0.0 if split is None else share
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)  # a second call would raise
    # Once for a config: it looks at all files of an export.
    once: dict[str, Any] = {"replace": True, "use_cache": True}
    OmegaConf.register_new_resolver("annotated_classes", _annotated_classes, **once)


def did_you_mean(word: Any, options: Iterable[Any]) -> str:
    """Return "; did you mean X?" with the option of which a word may be a misspelling, or ""."""
    close = difflib.get_close_matches(str(word), map(str, options), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def instead(key: str, options: Iterable[str]) -> str:
    """Return what to use instead of a key that does not exist, as the end of a message.

    It is the choice that has the key, else the setting of the same effect for a name of another
    program, else the place where that name stands among the keys of ``options``, else a key of
    which it may be a misspelling.
    """
    known, last = list(options), re.split("[./]", key)[-1].replace("-", "_").lower()
    path = Path(__file__).with_name("foreign_names.yaml")
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    is_training = "output" not in known  # which each of the other tools has
    if is_training and (owners := choices_with(key)):
        return f"; it is a key with {owners}"
    sayings = table["training"] | ({} if is_training else table["tools"])
    for saying in (text for text, names in sayings.items() if last in names):
        meant = re.sub(r"see '?([\w./]+).*|.*", r"\1", saying).replace("/", ".")
        # In a training another choice may have the key; a protocol is that of the checkpoint.
        if is_training or meant in ("", "evaluation.precision", *known):
            return f"; {saying}"
    top = re.split("[./]", key)[0]
    if not is_training and key == "data":
        moves = "; data.root= moves it" * ("data.root" in known)
        return f"; the data set is that of the checkpoint{moves}"
    if not is_training and last not in known:
        is_setting = any(key == p + f.name for p, s in SETTINGS.items() for f in fields(s))
        if is_setting or (top in _OF_TRAINING and top not in known):
            return "; it is a setting of tools/train.py: leave it out"
    names = {option: option.rpartition(".")[2] for option in known}
    close = difflib.get_close_matches(last, names.values(), n=1, cutoff=0.8)
    alike = [option for option in known if names[option] in close]
    if close == [last]:
        depth = min(place.count(".") for place in alike)  # deeper ones are interpolated
        return f"; see {' or '.join(place for place in alike if place.count('.') == depth)}"
    nearest = difflib.get_close_matches(key, alike, n=1, cutoff=0)
    return f"; did you mean {nearest[0]}?" if nearest else "; --help shows what there is"
