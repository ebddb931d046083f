"""Comparison of the arguments in a config with the signature of the class that it names."""

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union

from danet.config.schema import did_you_mean
from danet.config.targets import locate
from danet.errors import InputError
from danet.plain import is_int, is_number

_PLAIN: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (is_int, "a whole number"),
    float: (is_number, "a number"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    str: (lambda value: isinstance(value, str), "a text"),
}
"""Annotation -> whether a value fits it, and its name in messages."""


def target_errors(node: Mapping[str, Any], key: str) -> list[str]:
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


def mismatch(value: Any, hint: Any) -> str | None:
    """Return what is expected if a plain value does not fit an annotation, None if it does.

    Everything fits annotations of other things than plain values, such as modules and callables.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        problems = {option: mismatch(value, option) for option in options}
        # Of X | None the message is about X.
        of_values = [problem for option, problem in problems.items() if option is not NoneType]
        return None if None in problems.values() else of_values[0]
    if hint is NoneType:
        return None if value is None else "expected null"
    if origin is Literal:
        if value in options:
            return None
        return f"expected one of {', '.join(map(str, options))}{did_you_mean(value, options)}"
    shown = f"the text {value!r}" if isinstance(value, str) else repr(value)
    shown = "nothing (null)" if value is None else shown
    if hint in _PLAIN:
        fits, name = _PLAIN[hint]
        return None if fits(value) else f"expected {name}, got {shown}"
    is_mapping = is_dataclass(hint) or (inspect.isclass(origin) and issubclass(origin, Mapping))
    if is_mapping and not isinstance(value, dict):
        return f"expected a mapping, {{name: value}}, got {shown}"
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        if not isinstance(value, (list, tuple)):
            return f"expected a list, got {shown}"
        found = (mismatch(item, options[0] if options else Any) for item in value)
        return next((f"{problem} in the list" for problem in found if problem), None)
    return None
