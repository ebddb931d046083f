"""Validation of a composed config: reports every error in it before anything is built.

It covers what the schema cannot: missing values, interpolations, and every ``_target_`` node, whose
arguments are compared with the signature of the class that it names.
"""

import inspect
import math
import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from danet.config.annotations import mismatch
from danet.config.schema import (
    DataConfig,
    RunSettings,
    TrainConfig,
    TrainSchema,
    did_you_mean,
    instead,
)
from danet.config.targets import TRUSTED, locate
from danet.engine.settings import TrainSettings
from danet.errors import InputError, first_line
from danet.plain import flat, is_int, is_number, problem_with
from danet.types import MAX_CLASSES

T = TypeVar("T")

_ROOTS = {
    "data.dataset": True,
    "model": False,
    "loss": False,
    "optimizer": False,
    "schedule": False,
    "evaluation": False,
}
"""Nodes that name a class, and whether they are partial: called later, with more arguments."""

_REFERENCE = re.compile(r"\$\{([\w.]+)\}", re.ASCII)
_MOST_ERRORS = 20


def check(
    config: DictConfig, added: Iterable[str] = (), *, needs_data: bool = False
) -> TrainConfig:
    """Return a composed train config as typed settings, or raise with every error in it.

    Args:
        config: As Hydra composed it.
        added: Keys that were appended on the command line with ``+``.
        needs_data: Whether ``data.root`` must be a folder, which is checked before all else.

    Raises:
        InputError: One line per error, with the key.
    """
    # Before anything is resolved: OmegaConf stops at the first interpolation of a missing value and
    # names the key that interpolates, not the one to set.
    unresolved = OmegaConf.to_container(config, resolve=False)
    _refuse_missing(unresolved)
    root = config.data.get("root")
    if root is not None:  # a checkpoint must find its data from wherever it is used
        folder = Path(os.path.expanduser(str(root))).absolute()
        if needs_data and not folder.is_dir():
            raise InputError(f"data.root={folder}: there is no such folder; set data.root=<folder>")
        config.data.root = str(folder)
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        # OmegaConf wraps the InputError of a resolver of ours, with words of its own in front.
        own = first_line(error).partition("InputError raised while resolving interpolation: ")[2]
        raise InputError(own or first_line(error, getattr(error, "full_key", None))) from error
    try:
        return check_plain(typing.cast(dict[str, Any], plain), added)
    except InputError as error:
        raise InputError(_name_settings(str(error), _references(unresolved))) from None


def check_plain(plain: dict[str, Any], added: Iterable[str] = ()) -> TrainConfig:
    """Return a train config of plain values as typed settings, or raise with every error in it.

    Nothing in it is resolved, here or later: text that looks like an interpolation is an error. A
    resolver could otherwise put a ``_target_`` or a value in after the check.

    Args:
        plain: All keys of TrainSchema; becomes the attribute ``plain``.
        added: As in ``check``.

    Raises:
        InputError: One line per error, with the key.
    """
    if problem := problem_with(plain, ""):
        raise InputError(problem)
    _refuse_missing(plain)
    errors = _unknown_keys(plain, TrainSchema, "")
    errors += _unknown_keys(plain["trainer"], TrainSettings, "trainer.")
    errors += _unknown_keys(plain["run"], RunSettings, "run.")
    # Each data set has keys of its own, so ``data`` has no schema, and Hydra accepts any "+" there.
    made_up = [key for key in added if re.fullmatch(r"data\.\w+", key)]
    errors += [f"{key}: there is no such key{instead(key, ())}" for key in made_up]
    errors += _data_errors(plain["data"])
    errors += _weight_errors(plain["loss"], "loss", plain["data"].get("num_classes"))
    errors += [error for key in _ROOTS for error in _root_errors(plain, key)]
    for group in TRUSTED:
        errors += _node_errors(plain[group], group)
    errors += [f"{key}={value}: expected a finite number" for key, value in _not_finite(plain)]
    if plain["seed"] < 0:
        errors.append(f"seed={plain['seed']}: expected a whole number of at least 0")
    memory = plain["device_memory"]
    if memory is not None and not memory > 0:
        errors.append(f"device_memory={memory}: expected GiB above 0, or null to ask the device")
    trainer, run = _typed(TrainSettings, plain["trainer"]), _typed(RunSettings, plain["run"])
    errors += [*trainer.errors(), *run.errors()]
    if errors:
        _refuse(errors)
    # Only now: DataConfig has required fields, which may be among the errors above.
    data = _typed(DataConfig, plain["data"])
    if errors := data.errors():
        _refuse(errors)
    others = {k: v for k, v in plain.items() if k not in ("data", "trainer", "run")}
    return TrainConfig(data=data, trainer=trainer, run=run, plain=plain, **others)


def _references(unresolved: Any) -> dict[str, str]:
    """Return key -> key whose value it has, of the interpolations in an unresolved config.

    Of the arguments of a resolver, this is the one with the name of the key: the names of
    ``data.dataset.classes`` are those of ``data.classes``, and ``data.num_classes`` is their count.
    """
    found: dict[str, str] = {}
    for key, value in flat(unresolved).items():
        text = value if isinstance(value, str) else ""
        for source in _REFERENCE.findall(text):
            if text == f"${{{source}}}" or source.split(".")[-1] == key.split(".")[-1]:
                found.setdefault(key, source)
    return found


def _name_settings(errors: str, references: Mapping[str, str]) -> str:
    """Name each error by the setting that a user sets, not by a key that interpolates it.

    One error is left of those that a wrong value of a setting causes wherever it is interpolated.
    """
    lines: list[str] = []
    for line in errors.split("\n"):
        subject, colon, problem = line.partition(": ")
        key = setting = re.split(r"[=[]", subject)[0]
        while source := next((k for k in references if f"{setting}.".startswith(f"{k}.")), None):
            setting = references[source] + setting[len(source) :]
        named = setting + subject[len(key) :]
        if key == setting or not any(known.startswith(f"{named}: ") for known in lines):
            lines.append(named + colon + problem)
    return "\n".join(lines)


def _typed(schema: type[T], node: Mapping[str, Any]) -> T:
    """Return a node as a dataclass; keys that the dataclass does not have are dropped."""
    known: Any = fields(schema)  # type: ignore[arg-type]
    return schema(**{f.name: node[f.name] for f in known if f.name in node})


def _refuse(errors: Iterable[str]) -> None:
    """Raise InputError with the first of the errors, one line each."""
    lines = list(dict.fromkeys(errors))
    rest = len(lines) - _MOST_ERRORS
    raise InputError("\n".join(lines[:_MOST_ERRORS] + [f"and {rest} more"] * (rest > 0)))


def _refuse_missing(plain: Any) -> None:
    """Raise InputError with the keys whose value is "???"."""
    missing = [key for key, value in flat(plain).items() if value == MISSING]
    if missing:
        _refuse(f"{key}: no value is given; set {key}={_hint(key)}" for key in missing)


def _root_errors(plain: Mapping[str, Any], key: str) -> list[str]:
    """Check that a node which must name a class does, with the ``_partial_`` that it must have."""
    node: Any = plain
    if not plain[key.split(".")[0]]:  # tools/check_data.py has data alone
        return []
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    if not isinstance(node, Mapping) or "_target_" not in node:
        return [f"{key}: names no class; expected _target_ and its arguments"]
    if node.get("_partial_", False) is not _ROOTS[key]:
        return [f"{key}._partial_={node.get('_partial_')}: expected {str(_ROOTS[key]).lower()}"]
    return _loss_errors(node["_target_"]) if key == "loss" else []


def _loss_errors(path: Any) -> list[str]:
    """Check that the root of the loss returns the named terms that a trainer sums."""
    try:
        target = locate(path, "loss")
    except InputError:
        return []  # reported with all other targets
    from danet.losses import DeepSupervision  # late, since it loads torch

    if issubclass(target, DeepSupervision):
        return []
    return [
        f"loss._target_={path}: expected danet.losses.DeepSupervision; a loss is its argument: "
        f"loss.main._target_={path}"
    ]


def _weight_errors(node: Any, key: str, num_classes: Any) -> list[str]:
    """Check that class weights are one per class, and none negative."""
    if isinstance(node, list):
        nodes = [(f"{key}.{i}", item) for i, item in enumerate(node)]
    elif isinstance(node, dict):
        nodes = [(f"{key}.{name}", value) for name, value in node.items()]
    else:
        return []
    errors = []
    for name, value in nodes:
        if name.endswith(".class_weights") and isinstance(value, list):
            if len(value) != num_classes:
                errors.append(f"{name}: {len(value)} weights for data.num_classes={num_classes}")
            errors += [
                f"{name}[{position}]={weight}: expected a number of at least 0"
                for position, weight in enumerate(value)
                if is_number(weight) and weight < 0
            ]
        else:
            errors += _weight_errors(value, name, num_classes)
    return errors


def _hint(key: str) -> str:
    """Return a placeholder of a missing value."""
    return {"data.root": "<folder>", "data.classes": "[name,name]"}.get(key, "<value>")


def _unknown_keys(node: Mapping[str, Any], schema: type, prefix: str) -> list[str]:
    """Return a line for each key that was added to a typed node with ``+``."""
    known = [f.name for f in fields(schema)]
    return [
        f"{prefix}{key}: there is no such key"
        + instead(f"{prefix}{key}", [prefix + k for k in known])
        for key in node
        if key not in known
    ]


def check_node(node: dict[str, Any], key: str) -> None:
    """Check one group of a config; raise InputError with a line per error."""
    errors = [problem] if (problem := problem_with(node, key)) else _node_errors(node, key)
    if errors:
        _refuse(errors)


def _data_errors(data: Mapping[str, Any]) -> list[str]:
    """Check the values that every data set has."""
    errors = []
    for key, low, why in (
        ("batch_size", 1, ""),
        ("num_workers", 0, ""),
        (
            *("num_classes", 2),
            "; for one kind of object these are background and object, "
            "data.classes=[background,object]",
        ),
    ):
        value = data.get(key)
        if not is_int(value) or value < low:
            errors.append(f"data.{key}={value}: expected a whole number of at least {low}{why}")
    errors += _class_errors(data)
    for key, low, example in (("crop", 32, "[512,512]"), ("size", 1, "[64,384]")):
        size = data.get(key)
        is_pair = isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2
        if size is not None and not (is_pair and all(is_int(n) and n >= low for n in size)):
            errors.append(
                f"data.{key}={size}: expected two whole numbers of at least {low}, "
                f"data.{key}={example}"
            )
    return errors


def _class_errors(data: Mapping[str, Any]) -> list[str]:
    """Compare the number of classes with their names, where no file must be read for these."""
    node, count = data.get("dataset"), data.get("num_classes")
    if not is_int(count) or not isinstance(node, dict):
        return []
    errors = []
    if count > MAX_CLASSES:
        errors = [f"data.num_classes={count}: expected at most {MAX_CLASSES}; 255 is no class"]
    try:
        target = locate(node.get("_target_"), "data")
    except InputError:  # reported with all other targets
        return errors
    names = node.get("classes")
    if not isinstance(names, list):
        names = getattr(target, "classes", None)
    if not isinstance(names, (list, tuple)) or len(names) == count:
        return errors
    return [
        *errors,
        f"data.num_classes={count}, but {target.__name__} has {len(names)} class names "
        f"({names[0]} to {names[-1]}): leave data.num_classes out",
    ]


def _not_finite(node: Any, prefix: str = "") -> list[tuple[str, float]]:
    """Return the infinite numbers and NaNs, with their keys; lists count from 0."""
    if isinstance(node, float):
        return [] if math.isfinite(node) else [(prefix.rstrip("."), node)]
    inside: list[tuple[str, Any]] = []
    if isinstance(node, list):
        inside = [(f"{prefix.rstrip('.')}[{i}].", value) for i, value in enumerate(node)]
    elif isinstance(node, dict):
        inside = [(f"{prefix}{name}.", value) for name, value in node.items()]
    return [found for key, value in inside for found in _not_finite(value, key)]


def _node_errors(node: Any, key: str) -> list[str]:
    """Check a node and all nodes below it; ``key`` is its position in the config."""
    if isinstance(node, list):
        return [f for i, item in enumerate(node) for f in _node_errors(item, f"{key}.{i}")]
    if not isinstance(node, dict):
        return []
    errors = []
    if "_target_" in node:
        errors += _target_errors(node, key)
    for name, value in node.items():
        errors += _node_errors(value, f"{key}.{name}")
    return errors


def _target_errors(node: dict[str, Any], key: str) -> list[str]:
    """Compare the arguments of a node with the signature of its target."""
    try:
        target = locate(node["_target_"], key.split(".")[0])
    except InputError as error:
        return [f"{key}._target_: {error}"]
    if not isinstance(node.get("_partial_", False), bool):
        return [f"{key}._partial_={node['_partial_']}: expected true or false"]
    arguments = {k: v for k, v in node.items() if k not in ("_target_", "_partial_")}
    errors = _argument_errors(arguments, target, key)
    parameters = inspect.signature(target).parameters
    if not node.get("_partial_"):
        errors += [
            f"{key}.{name}: {target.__name__} needs this argument"
            for name, p in parameters.items()
            if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
            if name not in arguments
        ]
    return errors


def _argument_errors(arguments: Mapping[str, Any], target: Any, key: str) -> list[str]:
    """Check names and types of arguments; a mapping for a dataclass is checked in the same way."""
    parameters, hints = inspect.signature(target).parameters, _hints(target)
    errors = []
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in arguments.items():
        is_unknown = name not in parameters and not open_ended
        if is_unknown or not isinstance(name, str) or name.startswith("_"):
            errors.append(
                f"{key}.{name}: {target.__name__} takes no such argument"
                + did_you_mean(name, parameters)
            )
        elif name in hints and not (isinstance(value, dict) and "_target_" in value):
            if problem := mismatch(value, hints[name]):
                errors.append(f"{key}.{name}={value}: {problem}")
            elif isinstance(value, dict):
                groups = (hint for hint in typing.get_args(hints[name]) if is_dataclass(hint))
                for group in groups:
                    errors += _argument_errors(value, group, f"{key}.{name}")
    return errors


def _hints(target: Any) -> dict[str, Any]:
    """Return the annotations of the parameters of a target."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # a foreign class with annotations that cannot be resolved
        return {}
