"""The check that finds every fault of a composed config before anything is built.

It looks at what the schema cannot: missing values, interpolations, and every ``_target_`` node,
whose arguments are held against the signature of what it names.
"""

import difflib
import importlib
import inspect
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from danet.config import RunSettings, TrainConfig
from danet.engine.settings import TrainSettings
from danet.errors import InputError

TRUSTED = (
    "danet.models.",
    "danet.losses",
    "danet.data.transforms",
    "danet.datasets.",
    "danet.engine.optimizer",
    "danet.engine.schedule",
    "danet.evaluation.inference",
)
"""Modules whose own classes a config may name. A config comes with a checkpoint, and that is
somebody else's file: whatever it names is called with arguments it chooses."""


def check(
    config: DictConfig, added: Iterable[str] = (), *, needs_data: bool = False
) -> dict[str, Any]:
    """Returns a composed train config as plain values, or names every fault in it.

    Args:
        config: As Hydra composed it.
        added: Keys that were appended on the command line with ``+``.
        needs_data: Whether ``data.root`` must be a folder, which is looked at before all else.

    Raises:
        InputError: One line per fault, with the key.
    """
    missing = _missing_keys(OmegaConf.to_container(config, resolve=False))
    if missing:
        raise InputError(
            "\n".join(f"{key}: no value is given; set {key}={_hint(key)}" for key in missing)
        )
    root = config.data.get("root")
    if root is not None:  # a checkpoint must find its data from wherever it is used
        folder = Path(root).expanduser().absolute()
        if needs_data and not folder.is_dir():
            raise InputError(f"data.root={folder}: there is no such folder; set data.root=<folder>")
        config.data.root = str(folder)
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        # A resolver of ours speaks for itself; OmegaConf puts its own words in front.
        told = first_line(error).partition("InputError raised while resolving interpolation: ")[2]
        raise InputError(told or first_line(error, getattr(error, "full_key", None))) from error
    plain = typing.cast(dict[str, Any], plain)
    faults = _unknown_keys(plain, TrainConfig, "")
    faults += _unknown_keys(plain["trainer"], TrainSettings, "trainer.")
    faults += _unknown_keys(plain["run"], RunSettings, "run.")
    # Each data set has keys of its own, so there the choice says which keys exist.
    faults += [f"{key}: there is no such key" for key in added if re.fullmatch(r"data\.\w+", key)]
    faults += _data_faults(plain["data"])
    faults += _weight_faults(plain["loss"], "loss", plain["data"].get("num_classes"))
    for group in ("data", "model", "loss", "optimizer", "schedule", "evaluation"):
        faults += _node_faults(plain[group], group)
    known = {f.name for f in fields(TrainSettings)}
    faults += TrainSettings(**{k: v for k, v in plain["trainer"].items() if k in known}).faults()
    if faults:
        raise InputError("\n".join(dict.fromkeys(faults)))
    return plain


def _weight_faults(node: Any, key: str, num_classes: Any) -> list[str]:
    """Finds class weights that are not one per class."""
    if isinstance(node, list):
        nodes = [(f"{key}.{i}", item) for i, item in enumerate(node)]
    elif isinstance(node, dict):
        nodes = [(f"{key}.{name}", value) for name, value in node.items()]
    else:
        return []
    faults = []
    for name, value in nodes:
        if name.endswith(".class_weights") and isinstance(value, list):
            if len(value) != num_classes:
                faults.append(f"{name}: {len(value)} weights for data.num_classes={num_classes}")
        else:
            faults += _weight_faults(value, name, num_classes)
    return faults


def _hint(key: str) -> str:
    """Returns what a missing value looks like."""
    return {"data.root": "<folder>", "data.classes": "[name,name]"}.get(key, "<value>")


def _unknown_keys(node: Mapping[str, Any], schema: type, prefix: str) -> list[str]:
    """Finds keys that were forced into a typed node with ``+``."""
    known = [f.name for f in fields(schema)]
    return [
        f"{prefix}{key}: there is no such key{did_you_mean(key, known)}"
        for key in node
        if key not in known
    ]


def _missing_keys(node: Any, prefix: str = "") -> list[str]:
    """Returns the keys whose value is still "???"."""
    if node == MISSING:
        return [prefix.rstrip(".")]
    if not isinstance(node, dict):
        return []
    return [key for name, value in node.items() for key in _missing_keys(value, f"{prefix}{name}.")]


def check_node(node: dict[str, Any], key: str) -> None:
    """Checks one group of a config; raises InputError with a line per fault."""
    faults = _node_faults(node, key)
    if faults:
        raise InputError("\n".join(faults))


def _data_faults(data: Mapping[str, Any]) -> list[str]:
    """Checks the values that every data set has."""
    faults = []
    for key, low in (("batch_size", 1), ("num_workers", 0), ("num_classes", 2)):
        value = data.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            faults.append(f"data.{key}={value}: expected a whole number of at least {low}")
    crop = data.get("crop")
    if crop is not None:
        is_pair = isinstance(crop, Sequence) and not isinstance(crop, str) and len(crop) == 2
        if not is_pair or not all(_is_int(n) and n >= 32 for n in crop):
            faults.append(
                f"data.crop={crop}: expected two whole numbers of at least 32, data.crop=[512,512]"
            )
    return faults


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _node_faults(node: Any, key: str) -> list[str]:
    """Checks a node and all below it; ``key`` is where it stands."""
    if isinstance(node, list):
        return [f for i, item in enumerate(node) for f in _node_faults(item, f"{key}.{i}")]
    if not isinstance(node, dict):
        return []
    faults = []
    if "_target_" in node:
        faults += _target_faults(node, key)
    for name, value in node.items():
        faults += _node_faults(value, f"{key}.{name}")
    return faults


def _target_faults(node: dict[str, Any], key: str) -> list[str]:
    """Holds the arguments of a node against the signature of its target."""
    try:
        target = locate(node["_target_"])
    except InputError as error:
        return [f"{key}._target_: {error}"]
    parameters = inspect.signature(target).parameters
    hints = _hints(target)
    arguments = {k: v for k, v in node.items() if k not in ("_target_", "_partial_", "_convert_")}
    faults = []
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in arguments.items():
        if name not in parameters and not open_ended:
            faults.append(
                f"{key}.{name}: {target.__name__} takes no such argument"
                + did_you_mean(name, parameters)
            )
        elif name in hints and not (isinstance(value, dict) and "_target_" in value):
            problem = mismatch(value, hints[name])
            if problem:
                faults.append(f"{key}.{name}={value}: {problem}")
    if not node.get("_partial_"):
        faults += [
            f"{key}.{name}: {target.__name__} needs this argument"
            for name, p in parameters.items()
            if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
            if name not in arguments
        ]
    return faults


def _hints(target: Any) -> dict[str, Any]:
    """Returns the annotations of what is called."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # a foreign class with annotations that cannot be resolved
        return {}


def locate(path: Any) -> Any:
    """Returns the class that a ``_target_`` names, if configs may name it.

    Raises:
        InputError: It is not among the trusted ones, or does not exist.
    """
    module_name, _, name = str(path).rpartition(".")
    is_ours = any(f"{module_name}.".startswith(prefix.rstrip(".") + ".") for prefix in TRUSTED)
    if not is_ours and module_name != "albumentations":
        raise InputError(
            f"{path} is refused: a config may name classes of "
            f"{', '.join(prefix.rstrip('.') for prefix in TRUSTED)} and of albumentations only"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"there is no module {module_name}") from error
    target = getattr(module, name, None)
    # Only what the module itself defines: not what it imports from elsewhere.
    defined = [
        n
        for n, v in vars(module).items()
        if inspect.isclass(v)
        and not n.startswith("_")
        and (not is_ours or v.__module__ == module_name)
    ]
    if name not in defined:
        raise InputError(f"{module_name} has no class {name}{did_you_mean(name, defined)}")
    if not is_ours:
        import albumentations

        if not issubclass(target, albumentations.BasicTransform):  # type: ignore[arg-type]
            raise InputError(f"{path} is refused: it is not a transform")
    return target


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
            int: _is_int(value),
            float: _is_int(value) or isinstance(value, float),
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


def first_line(error: BaseException, key: str | None = None) -> str:
    """Returns the first line of an error's text, with the key in front where it is known."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
    return f"{key}: {text}" if key else text
