"""Construction of objects from a checked config: data sets, networks, a checkpoint's network."""

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from danet.checkpoint import exported, run_folder
from danet.checkpoint import format as checkpoint_format
from danet.checkpoint.format import Checkpoint
from danet.checkpoint.weights import explain_mismatch
from danet.config.schema import DataConfig, DataFolder, DataOverrides, TrainConfig, TrainSchema
from danet.config.targets import TRUSTED, locate
from danet.config.validate import check_node, check_plain
from danet.datasets.band_io import measure_range
from danet.datasets.base import FileDataset, Reading, SegmentationDataset
from danet.distributed import collectives
from danet.distributed.agreement import wait_patiently
from danet.errors import InputError, UserError, first_line
from danet.models.segmentor import Segmentor
from danet.plain import printable, problem_with


def make(node: Any, key: str, **arguments: Any) -> Any:
    """Build the object that a checked node describes; call a partial one with ``arguments``.

    Nothing is resolved: a node is plain data. What a constructor refuses raises InputError.
    """
    made = _built(node, key)
    return _called(key, made, arguments) if arguments else made


def _built(value: Any, key: str) -> Any:
    if isinstance(value, list):
        return [_built(item, f"{key}.{i}") for i, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    inside = {name: _built(item, f"{key}.{name}") for name, item in value.items()}
    if "_target_" not in inside:
        return inside
    # Located again, though the config is checked: a caller may bring a node that never was. Not by
    # hydra.utils.instantiate, which calls any import path that its block list does not have.
    target = locate(inside.pop("_target_"), key.split(".")[0])
    is_partial = inside.pop("_partial_", False)
    return partial(target, **inside) if is_partial else _called(key, target, inside)


def _called(key: str, target: Any, arguments: Mapping[str, Any]) -> Any:
    """Call a constructor; convert its exceptions to an InputError of one line, the key first."""
    try:
        return target(**arguments)
    except UserError:
        raise
    except Exception as error:  # with the values of a foreign file torch may raise anything
        kind = "" if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: "
        text = first_line(error)
        if callable(problems := getattr(error.__cause__, "errors", None)):  # of albumentations
            first = problems()[0]
            reason = first["msg"].removeprefix("Value error, ")
            text = f"{first['loc'][0]}={first['input']}: {reason}"
        raise InputError(f"{key}: {kind}{text}") from error


def make_dataset(config: TrainConfig, split: str, *, training: bool) -> SegmentationDataset:
    """Build the data set of one split, with the transforms of training or of evaluation."""
    data, given = config.data, config.plain["data"]
    use = "train" if training else "eval"
    transform = make(data.transforms[use], f"data.transforms.{use}")
    arguments: dict[str, Any] = {"split": split, "transform": transform}
    reading = {f.name: given[f.name] for f in fields(Reading) if f.name in given}
    if reading:  # a data set that draws its pictures has no such keys
        arguments["reading"] = Reading(**reading)
    dataset: SegmentationDataset = make(data.dataset, "data", **arguments)
    if len(dataset.classes) != data.num_classes:
        raise InputError(
            f"data.num_classes={data.num_classes}, but {type(dataset).__name__} has "
            f"{len(dataset.classes)} class names: leave data.num_classes as the data set has it"
        )
    return dataset


def why_unscored(config: TrainConfig, training_set: SegmentationDataset) -> str:
    """Return why a training has no validation set; "" where it has one."""
    if config.data.val_split is None:
        return "data.val_split=null"
    return training_set.undivided if isinstance(training_set, FileDataset) else ""


def join_extra_roots(training_set: SegmentationDataset, config: TrainConfig) -> None:
    """Append the pictures of ``data.extra_roots`` to the training set; raise InputError."""
    if not config.data.extra_roots:
        return
    if not isinstance(training_set, FileDataset):
        name = type(training_set).__name__
        raise InputError(f"data.extra_roots: {name} has no files; set 'data.extra_roots=[]'")
    split = config.data.train_split
    others: list[FileDataset] = []
    known = {(os.path.realpath(training_set.root), split)}
    for entry in config.data.extra_roots:
        place = {"split": split, **({"root": entry} if isinstance(entry, str) else entry)}
        key = f"data.extra_roots: {place['root']}, split {place['split']}"
        identity = os.path.realpath(place["root"]), place["split"]
        if identity in known:
            raise InputError(f"{key}: these pictures are there already; remove one")
        known.add(identity)
        dataset = {**config.data.dataset, "root": place["root"]}
        moved = replace(config, data=replace(config.data, dataset=dataset))
        try:
            other = make_dataset(moved, place["split"], training=False)
        except InputError as error:
            raise InputError(f"{key}: {error}") from error
        if not (isinstance(other, FileDataset) and other.is_labelled):
            raise InputError(f"{key}: there are no labels to train on; remove it")
        others.append(other)
    training_set.join(others)


def with_measured_range(config: TrainConfig) -> TrainConfig:
    """Return a config with numbers, which are printed, in the place of ``data.range=auto``."""
    if config.plain["data"].get("range") != "auto":
        return config
    dataset: Any = make_dataset(config, config.data.train_split, training=False)
    join_extra_roots(dataset, config)
    paths, reading = [Path(item.image) for item in dataset.items], dataset.reading
    is_first = collectives.is_first()
    found = measure_range(paths, reading.bands, reading.max_pixels) if is_first else []
    wait_patiently("the measurement of data.range")
    found, plain = collectives.from_first(found), deepcopy(config.plain)
    for group in ("data", "model"):
        plain[group] |= {"range": found} if plain[group] else {}
    if is_first:
        print(f"data.range=auto: 'data.range={str(found).replace(' ', '')}' measured", flush=True)
    return check_plain(plain)


def make_model(config: TrainConfig) -> nn.Module:
    """Build the network of a config; raise InputError where its classes refuse the values."""
    model: nn.Module = make(config.model, "model")
    return model


def checked_config(
    saved: Checkpoint, path: str | Path, data: DataFolder | None = None
) -> TrainConfig:
    """Return the config of a checkpoint, after the same check as a new one.

    ``data`` replaces data settings of it. InputError, with the path, says what is invalid in it.
    """
    try:
        stored = saved["config"]
        if problem := problem_with(stored, "config"):
            raise InputError(problem)
        # Merged with the schema first, as Hydra does with a new one: keys that its version did not
        # have get their defaults, and values of another type are refused before code reads them.
        typed = OmegaConf.merge(OmegaConf.structured(TrainSchema), stored)
        config: Any = OmegaConf.to_container(typed, resolve=False)
        if missing := [group for group in TRUSTED if not config[group]]:
            raise InputError(f"config.{missing[0]}: there is nothing; the file was changed")
        if str(config["evaluation"].get("_target_")).startswith("danet.evaluation."):
            # Versions without the setting computed in float32.
            config["evaluation"].setdefault("precision", "float32")
        for f in fields(DataConfig):
            # Versions without a setting of the samples drew them as its default does.
            if f.default not in (None, MISSING) and not f.metadata:
                config["data"].setdefault(f.name, f.default)
        checked = check_plain(config)
        count = checked.data.num_classes
        for name in ("classes", "palette"):
            if len(saved.get(name, range(count))) != count:
                raise InputError(f"data.num_classes={count} and {len(saved[name])} {name}")
    except Exception as error:  # OmegaConf and code that expects other types may raise anything
        reason = str(error) if isinstance(error, InputError) else first_line(error)
        shown = printable(reason, "\n")
        raise InputError(f"checkpoint={path}: its config is refused: {shown}") from error
    if data is None:
        return checked
    # After the check of its own, so that what is refused here was typed.
    _replace_data(checked.plain["data"], data)
    return check_plain(checked.plain)


def choose_inference(chosen: Mapping[str, Any], trained: TrainConfig) -> tuple[Any, Any]:
    """Return the protocol of the training with settings of a tool, or its own one, and its mode."""
    protocol = {**({} if "_target_" in chosen else trained.evaluation), **chosen}
    check_node(protocol, "evaluation")
    return protocol, make(protocol, "evaluation")


def _replace_data(node: dict[str, Any], data: DataFolder) -> None:
    if data.root is not None and "root" not in node["dataset"]:
        name = node["dataset"]["_target_"].rpartition(".")[2]
        raise InputError(f"data.root={data.root}: {name} has no files; leave data.root out")
    if data.root is not None:
        # The interpolation of data.root in the data set was resolved: the root is there twice.
        root = str(Path(os.path.expanduser(data.root)).absolute())
        node["root"] = node["dataset"]["root"] = root
    if isinstance(data, DataOverrides) and data.num_workers is not None:
        node["num_workers"] = data.num_workers
    if "cache" in node:
        node["cache"] = "none"  # its folder is on the machine that trained


def refuse_misfit(saved: Checkpoint, config: TrainConfig, source: str) -> None:
    """Raise InputError if the weights of a checkpoint do not fit the network of its config."""
    # On the meta device a foreign config may ask for any width without taking memory.
    with torch.device("meta"):
        expected = untrained(config).state_dict()
    problems = explain_mismatch(expected, saved["model"])
    if not problems and saved.get("ema") is not None:
        expected = {f"module.{name}": value for name, value in expected.items()}
        count = {"n_averaged": torch.tensor(0)}  # a buffer of ModelEMA, which a checkpoint may lack
        problems = explain_mismatch({**expected, **count}, {**count, **saved["ema"]})
    if problems:
        raise InputError(
            f"{source}: the weights do not fit its own config: {problems}; one of the two was "
            "changed after the training"
        )


def untrained(config: TrainConfig) -> nn.Module:
    """Build the network of a config with random weights, even if the run started from a file.

    For a checkpoint, which holds its weights: that file need not exist any more.
    """
    backbone = config.model.get("backbone")
    if isinstance(backbone, Mapping) and "weights" in backbone:
        backbone = {**backbone, "weights": None}
        config = replace(config, model={**config.model, "backbone": backbone})
    return make_model(config)


def model_of(saved: Checkpoint, config: TrainConfig, path: str | Path) -> nn.Module:
    """Return the network of a checkpoint in eval mode, with averaged weights if there are any."""
    refuse_misfit(saved, config, f"checkpoint={path}")
    model: Any = untrained(config)
    weights, prefix = saved["model"], "module."
    if (ema := saved.get("ema")) is not None:
        weights = {k.removeprefix(prefix): v for k, v in ema.items() if k.startswith(prefix)}
    model.load_state_dict(weights)
    model.temperature = saved.get("temperature", 1.0)
    return model.eval()


def load_saved(path: str | Path) -> Checkpoint:
    """Read a checkpoint, an exported folder, or one of a hub, without executing code from it.

    It is a file; the folder of a run, for its best; a folder of ``tools/export.py``, which has no
    state of an optimizer; or ``hf://owner/name[@revision]``, which is downloaded once.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"checkpoint: expected a path, found {type(path).__name__}")
    place = Path(path).expanduser()
    if str(path).startswith(exported.SCHEME):
        saved = exported.load(exported.fetch(str(path)))
    elif (place / exported.CONFIG).is_file():
        saved = exported.load(place)
    else:
        saved = checkpoint_format.load(run_folder.best_in(place, "checkpoint"))
    checkpoint_format.require_fields(saved, checkpoint_format.FOR_USE, f"checkpoint={path}")
    return saved


def load_model(path: str | Path) -> Segmentor:
    """Return a trained network, on the CPU and in eval mode.

    It maps RGB images (B, 3, H, W), uint8 or float in 0..255, or raw values of the N bands it was
    trained on, to a SegmentationOutput whose ``logits`` are (B, K, H, W). ``classes`` and
    ``palette`` of the network name and colour the K classes. The path is of a checkpoint, the
    folder of a run or an exported one, or ``hf://owner/name``; see ``load_saved``. One that is
    damaged or foreign raises InputError.
    """
    saved = load_saved(path)
    model: Any = model_of(saved, checked_config(saved, path), path)
    model.classes = tuple(saved["classes"])
    model.palette = tuple(tuple(color) for color in saved["palette"])
    return model
