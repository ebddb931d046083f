"""From a checked config to objects: data sets, a network, the network of a checkpoint."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from danet.check import check
from danet.config import DataFolder, DataOverrides, TrainConfig
from danet.datasets.base import Reading, SegmentationDataset
from danet.engine import checkpoint
from danet.engine.checkpoint import Checkpoint
from danet.errors import InputError
from danet.export import folder, hub
from danet.models.weights import explain_mismatch

Config = Mapping[str, Any]
"""A train config as ``check`` returns it: plain values, nothing to resolve."""


def make(node: Any, key: str, **arguments: Any) -> Any:
    """Builds what a checked node describes; a partial one is called with ``arguments``.

    Raises:
        InputError: A constructor refuses a value; the message starts with the key.
    """
    try:
        made = instantiate(node, _convert_="all")
        return made(**arguments) if arguments else made
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, InputError):
            raise cause from error
        if isinstance(cause, (ValueError, TypeError)):
            raise InputError(f"{key}: {cause}") from error
        raise
    except ValueError as error:  # of the partial's call
        raise error if isinstance(error, InputError) else InputError(f"{key}: {error}") from error


def make_dataset(config: Config, split: str, *, training: bool) -> SegmentationDataset:
    """Makes the data set of one split, with the transforms of training or of evaluation.

    Raises:
        InputError: Files are missing, or the class count of the config is not the data set's.
    """
    data = config["data"]
    transforms = data["transforms"]["train" if training else "eval"]
    transform = make(transforms, "data.transforms") if transforms else None
    arguments: dict[str, Any] = {"split": split, "transform": transform}
    reading = {f.name: data[f.name] for f in fields(Reading) if f.name in data}
    if reading:  # a data set that draws its pictures has no such keys
        arguments["reading"] = Reading(**reading)
    dataset: SegmentationDataset = make(data["dataset"], "data", **arguments)
    if len(dataset.classes) != data["num_classes"]:
        raise InputError(
            f"data.num_classes={data['num_classes']}, but {type(dataset).__name__} has "
            f"{len(dataset.classes)} class names: leave data.num_classes as the data set has it"
        )
    return dataset


def make_model(config: Config) -> nn.Module:
    """Makes the network of a config; raises InputError."""
    model: nn.Module = make(config["model"], "model")
    return model


def checked_config(
    saved: Checkpoint, path: str | Path, data: DataFolder | None = None
) -> dict[str, Any]:
    """Returns the config inside a checkpoint after the same check that a new one gets.

    Args:
        saved: The checkpoint.
        path: Of the checkpoint, for messages.
        data: What replaces the data settings inside.
    """
    try:
        config: Any = OmegaConf.merge(OmegaConf.structured(TrainConfig), saved["config"])
        if data is not None and data.root is not None:
            # The config is resolved: the root stands there twice.
            config.data.root = config.data.dataset.root = str(
                Path(data.root).expanduser().absolute()
            )
        if isinstance(data, DataOverrides) and data.num_workers is not None:
            config.data.num_workers = data.num_workers
        if data is not None and "cache" in config.data:
            config.data.cache = "none"  # its folder is one of the machine that trained
        return check(config)
    except (InputError, KeyError, OmegaConfBaseException) as error:
        raise InputError(f"checkpoint={path}: its config is refused: {error}") from error


def model_of(saved: Checkpoint, config: Config, path: str | Path) -> nn.Module:
    """Returns the network of a checkpoint in eval mode, with averaged weights where it has them."""
    backbone = dict(config["model"]["backbone"])
    if "weights" in backbone:
        # They are in the file; where they once started from need not exist any more.
        backbone["weights"] = None
    model: nn.Module = make({**config["model"], "backbone": backbone}, "model")
    state = saved["model"]
    if saved.get("ema") is not None:
        prefix = "module."
        state = {k[len(prefix) :]: v for k, v in saved["ema"].items() if k.startswith(prefix)}
    problems = explain_mismatch(model.state_dict(), state)
    if problems:
        raise InputError(
            f"checkpoint={path}: the weights do not fit its own config: {problems}; one of the two "
            "was changed after the training"
        )
    model.load_state_dict(state)
    return model.eval()


def load_saved(path: str | Path) -> Checkpoint:
    """Reads the network of a checkpoint, of an exported folder, or of a hub; runs no code of it.

    Args:
        path: A file; a folder as ``tools/export.py`` writes it, which has no state of an optimizer;
            or ``hf://owner/name[@revision]``, which is downloaded once.

    Raises:
        InputError: It is missing, damaged or foreign.
    """
    if str(path).startswith(hub.SCHEME):
        return folder.load(hub.fetch(str(path)))
    place = Path(path).expanduser()
    return folder.load(place) if folder.is_exported(place) else checkpoint.load(path)


def load_model(path: str | Path) -> nn.Module:
    """Returns a trained network, on the CPU and in eval mode.

    It maps RGB images (B, 3, H, W), uint8 or float in 0..255, to a SegmentationOutput whose
    ``logits`` are (B, K, H, W). ``classes`` and ``palette`` of the network name and colour the K
    classes.

    Args:
        path: A checkpoint, an exported folder, or ``hf://owner/name``; see ``load_saved``.

    Raises:
        InputError: The file is missing, damaged, foreign, or its config is refused.
    """
    saved = load_saved(path)
    model = model_of(saved, checked_config(saved, path), path)
    model.classes = tuple(saved["classes"])  # type: ignore[assignment]
    model.palette = tuple(tuple(color) for color in saved["palette"])  # type: ignore[assignment]
    return model
