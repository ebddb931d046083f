"""Comparison of plain values with type annotations."""

import inspect
import typing
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union

from danet.config.schema import did_you_mean
from danet.plain import is_int, is_number


def mismatch(value: Any, hint: Any) -> str | None:
    """Return what is expected if a plain value does not fit an annotation, None if it does.

    Everything fits annotations of other things than plain values, such as modules and callables.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        problems = [mismatch(value, option) for option in options]
        if None in problems:
            return None
        # Of X | None the message is about X.
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
    is_mapping = is_dataclass(hint) or (inspect.isclass(origin) and issubclass(origin, Mapping))
    if is_mapping and not isinstance(value, dict):
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
