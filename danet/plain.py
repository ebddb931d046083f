"""Plain data: the values that a config or a record of a foreign file may consist of."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

MOST_VALUES = 100_000  # values in one config; class lists and tables of label values have thousands
DEEPEST = 32  # levels of nesting of a config; those of this project have 8
LONGEST = 10_000  # characters of one text

_UNPRINTABLE = re.compile(
    # Control characters, line and paragraph separators, marks that change the direction of text,
    # and surrogates (undecodable bytes of a file name).
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

# hf://owner/name@revision has none.
_CREDENTIALS = re.compile(r"(?<!\bhf)(?<=\w\w)(:/+)[^\s'\"]*@")
_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s:'\"]+")


def without_credentials(text: str) -> str:
    """Remove users, passwords and queries from the addresses in a text."""
    return _QUERY.sub(r"\1", _CREDENTIALS.sub(r"\1", text))


def printable(text: str, keep: str = "") -> str:
    r"""Return text with control characters escaped, but for those to ``keep``, such as "\n"."""
    return _UNPRINTABLE.sub(
        lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape").decode("ascii"), text
    )


def is_int(value: Any) -> TypeGuard[int]:
    """Return whether a value is an integer; ``True`` and ``False`` are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is an integer or a float, infinity and NaN included."""
    return is_int(value) or isinstance(value, float)


def problem_with(value: Any, key: str) -> str:
    """Return why a value is not plain data, in one line that begins with its key; "" if it is.

    Plain data are strings, numbers, booleans and null in lists and mappings. Interpolations of
    OmegaConf (``${...}``, escaped or not) are refused, since resolving them could read files and
    environment variables, or build any object. The key of the root is empty.
    """
    for count, (place, item, depth) in enumerate(walk(value, key)):
        if count >= MOST_VALUES:
            return f"{key}: more than {MOST_VALUES} values"
        if depth > DEEPEST:
            return f"{place}: more than {DEEPEST} levels of lists and mappings"
        if isinstance(item, Mapping):
            for name in item:
                if not isinstance(name, (str, int, float)):
                    return f"{place}: a key of type {type(name).__name__}; expected a text"
                if found := _problem_with_text(str(name)):
                    return f"{place}: the key {found}"
        elif isinstance(item, str):
            if found := _problem_with_text(item):
                return f"{place}={found}"
        elif isinstance(item, int) and not -(2**63) <= item < 2**63:
            return f"{place}: a number of more than 64 bits"
        elif not (item is None or isinstance(item, (int, float)) or _is_list(item)):
            return f"{place}: {type(item).__name__} is not plain data"
    return ""


def flat(node: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted keys; a list is one value."""
    found: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def walk(value: Any, key: str) -> Iterator[tuple[str, Any, int]]:
    """Yield every value with its key and depth; iterative, since a file may nest to any depth.

    Keys are those of the command line, ``losses.0.smooth``; plain values of a list are ``crop[1]``.
    """
    waiting = [(key, value, 0)]
    while waiting:
        place, item, depth = waiting.pop()
        yield place, item, depth
        if depth > DEEPEST:
            continue
        prefix = f"{place}." if place else ""
        inside: list[tuple[str, Any]] = []
        if isinstance(item, Mapping):
            inside = [(f"{prefix}{printable(str(n))}", v) for n, v in item.items()]
        elif _is_list(item):
            for i, v in enumerate(item):
                is_nested = isinstance(v, Mapping) or _is_list(v)
                inside.append((f"{prefix}{i}" if is_nested else f"{place}[{i}]", v))
        waiting += [(name, v, depth + 1) for name, v in reversed(inside)]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _problem_with_text(text: str) -> str:
    """Return the start of a text and why it is refused; "" if it is not."""
    problem = ""
    if "${" in text:
        problem = "has ${, which is not resolved in a config that is used: write the value itself"
    elif _UNPRINTABLE.search(text):
        problem = "has characters that cannot be printed"
    elif len(text) > LONGEST:
        problem = f"has {len(text)} characters; expected at most {LONGEST}"
    return problem and f"{printable(text[:60])}{'...' * (len(text) > 60)}: {problem}"


def quoted(text: str) -> str:
    """Return a text quoted for Hydra, in which a backslash escapes only before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + "\\'" * bool(m[2]), text) + "'"
