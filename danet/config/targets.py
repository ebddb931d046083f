"""The classes that a config may name in ``_target_``, and the check of their arguments."""

import importlib
import inspect
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union

from danet.config.schema import did_you_mean, instead
from danet.errors import InputError
from danet.plain import is_int, is_number, printable

TRUSTED: Mapping[str, Mapping[str, str]] = {
    "data": {
        "danet.datasets": "fingerprint",
        "danet.data.transforms": "__call__",
        "albumentations": "apply",
    },
    "model": {"danet.models": "forward"},
    "loss": {"danet.losses": "forward"},
    "optimizer": {"danet.engine.optimizer": "__call__"},
    "schedule": {"danet.engine.schedule": "__call__"},
    "evaluation": {
        "danet.evaluation.inference": "predict",
        "danet.evaluation.protocols": "predict",
    },
}
"""Group of a config -> the modules whose own classes it may name, with what such a class defines.

A checkpoint may come from anybody, and its config chooses which classes are called with which
arguments."""

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)

_PLAIN: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (is_int, "a whole number"),
    float: (is_number, "a number"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    str: (lambda value: isinstance(value, str), "a text"),
}
"""Annotation -> whether a value fits it, and its name in messages."""


def locate(path: Any, group: str) -> Any:
    """Return the class that a ``_target_`` names; raise InputError if configs may not name it.

    ``path`` is such as ``danet.losses.OHEM``, and ``group`` the first part of the key, ``loss``.
    """
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        shown = printable(str(path)[:60])
        raise InputError(f"{shown} is no path of a class, as in danet.losses.OHEM")
    module_name, _, name = path.rpartition(".")
    own = (name.strip() for name in os.environ.get("DANET_TRUST", "").split(","))
    trusted = {**TRUSTED.get(group, {}), **{name: "" for name in own if name}}
    parent = next((m for m in trusted if f"{module_name}.".startswith(f"{m}.")), None)
    if parent is None:
        raise InputError(
            f"{path} is refused: {group} may name classes of {', '.join(trusted)} only; "
            "name modules of your own in the environment variable DANET_TRUST"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"there is no module {module_name}") from error
    # Only what is defined there: getattr finds what a module imports, too (danet.losses.Tensor).
    defined = {
        n: v
        for n, v in vars(module).items()
        if inspect.isclass(v)
        and not n.startswith("_")
        and f"{v.__module__}.".startswith(f"{module_name}.")
        and (not trusted[parent] or trusted[parent] in dir(v))
    }
    if name not in defined:
        raise InputError(f"{module_name} has no class {name}{did_you_mean(name, defined)}")
    return defined[name]


def with_defaults(value: Any, group: str = "") -> Any:
    """Return a checked config in which classes have all arguments, with their defaults if left out.

    ``group`` is as in ``locate``; empty for the whole config.
    """
    if isinstance(value, list):
        return [with_defaults(item, group) for item in value]
    if not isinstance(value, Mapping):
        return value
    given = {key: with_defaults(item, group or key) for key, item in value.items()}
    if "_target_" not in value:
        return given
    parameters = inspect.signature(locate(value["_target_"], group)).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()} | given


def target_errors(node: Mapping[str, Any], key: str) -> list[str]:
    """Compare the arguments of a node with the signature of its target."""
    try:
        target = locate(node["_target_"], key.split(".")[0])
    except InputError as error:
        return [f"{key}._target_: {error}"]
    if not isinstance(is_partial := node.get("_partial_", False), bool):
        return [f"{key}._partial_={is_partial}: expected true or false"]
    arguments = {k: v for k, v in node.items() if k not in ("_target_", "_partial_")}
    errors = _argument_errors(arguments, target, key)
    if not is_partial:
        errors += [
            f"{key}.{name}: {target.__name__} needs this argument"
            for name, p in inspect.signature(target).parameters.items()
            if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
            if name not in arguments
        ]
    return errors


def _argument_errors(arguments: Mapping[str, Any], target: Any, key: str) -> list[str]:
    """Check names and types of arguments; a mapping for a dataclass is checked in the same way."""
    parameters, errors = inspect.signature(target).parameters, []
    try:
        hints = typing.get_type_hints(target.__init__)
    except (NameError, TypeError):  # a foreign class with annotations that cannot be resolved
        hints = {}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in arguments.items():
        is_unknown = name not in parameters and not open_ended
        if is_unknown or not isinstance(name, str) or name.startswith("_"):
            close = instead(f"{key}.{name}", parameters)
            errors.append(f"{key}.{name}: {target.__name__} takes no such argument{close}")
        elif name in hints and not (isinstance(value, dict) and "_target_" in value):
            if problem := mismatch(value, hints[name]):
                if isinstance(value, str) and ":" in value and "expected a mapping" in problem:
                    setting = f"{key.split('.')[0]}.{name}={{{value}}}"  # a shell took the braces
                    problem += f"; in quotes, all pairs together: '{setting}'"
                errors.append(f"{key}.{name}={value}: {problem}")
            elif isinstance(value, dict):
                for group in filter(is_dataclass, typing.get_args(hints[name])):
                    errors += _argument_errors(value, group, f"{key}.{name}")
    return errors


def mismatch(value: Any, hint: Any) -> str | None:
    """Return what is expected if a plain value does not fit an annotation, None if it does.

    Everything fits annotations of other things than plain values, such as modules and callables.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):  # of X | None the message is about X
        problems = [mismatch(value, option) for option in options if option is not NoneType]
        is_null = value is None and NoneType in options
        return None if is_null or None in problems else problems[0]
    if origin is Literal:
        names = ", ".join(map(str, options))
        close = did_you_mean(value, options)
        # True == 1 == 1.0, of which a config may mean one.
        is_known = any(type(value) is type(option) and value == option for option in options)
        return None if is_known else f"expected one of {names}{close}"
    shown = f"the text {value!r}" if isinstance(value, str) else repr(value)
    shown = "nothing (null)" if value is None else shown
    if hint in _PLAIN:
        fits, name = _PLAIN[hint]
        return None if fits(value) else f"expected {name}, got {shown}"
    kind = origin if inspect.isclass(origin) else object
    if (is_dataclass(hint) or issubclass(kind, Mapping)) and not isinstance(value, dict):
        return f"expected a mapping, {{name: value}}, got {shown}"
    if issubclass(kind, Sequence):
        if not isinstance(value, (list, tuple)):
            return f"expected a list, got {shown}"
        found = (mismatch(item, options[0] if options else Any) for item in value)
        return next((f"{problem} in the list" for problem in found if problem), None)
    return None
