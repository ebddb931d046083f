"""Validation of a composed config: reports every error in it before anything is built.

It covers what the schema cannot: missing values, interpolations, ranges, and every ``_target_``
node (see ``danet.config.targets``).
"""

import inspect
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from danet.bands import bands_of
from danet.config.schema import SETTINGS, DataConfig, RunSettings, TrainConfig, instead
from danet.config.targets import TRUSTED, locate, target_errors
from danet.engine.settings import TrainSettings
from danet.errors import InputError, UserError, first_line
from danet.plain import flat, is_int, is_number, problem_with, walk
from danet.types import MAX_CLASSES

T = TypeVar("T")


def _whole(low: int) -> Callable[[Any], bool]:
    return lambda number: is_int(number) and number >= low


def _pair(low: int) -> Callable[[Any], bool]:
    return lambda pair: (
        pair is None or (isinstance(pair, list) and len(pair) == 2 and all(map(_whole(low), pair)))
    )


def _null_or(fits: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda number: number is None or (is_number(number) and fits(number))


def _are_roots(places: Any) -> bool:
    """Return whether a value is a list of folders, or of mappings of a folder and a split."""
    return isinstance(places, list) and all(
        isinstance(place, str)
        or (
            (isinstance(place, dict) and {"root"} <= place.keys() <= {"root", "split"})
            and all(isinstance(text, str) for text in place.values())
        )
        for place in places
    )


_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("seed", _whole(0), "a whole number of at least 0"),
    ("device_memory", lambda gib: gib is None or gib > 0, "GiB above 0, or null to ask the device"),
    ("run.processes", lambda n: n is None or n >= 1, "at least 1, or null"),
    ("data.batch_size", _whole(1), "a whole number of at least 1"),
    ("data.num_workers", _whole(0), "a whole number of at least 0"),
    *(
        (f"model.head.{key}", lambda n: n is None or _whole(1)(n), "a whole number of at least 1")
        for key in ("channels", "reduction")
    ),
    ("data.num_classes", lambda n: not is_int(n) or n <= MAX_CLASSES, f"at most {MAX_CLASSES}"),
    (
        *("data.num_classes", _whole(2)),
        "a whole number of at least 2; for one kind of object these are background and object, "
        "'data.classes=[background,object]'",
    ),
    (
        *("data.val_split", lambda split: split is None or isinstance(split, str)),
        "the name of a split, or null to train without a validation set",
    ),
    ("data.root", lambda root: root is None or isinstance(root, str), "a folder, or null"),
    ("data.crop", _pair(32), "two whole numbers of at least 32, 'data.crop=[512,512]'"),
    ("data.size", _pair(1), "two whole numbers of at least 1, 'data.size=[64,384]'"),
    ("data.on_bad_sample", lambda text: text in ("error", "skip"), "error or skip"),
    ("data.max_bad_share", lambda n: is_number(n) and 0 <= n <= 1, "a share between 0 and 1"),
    ("data.rare_class_temperature", _null_or(lambda t: t > 0), "a number above 0, or null"),
    ("data.rare_class_min_pixels", _whole(1), "a whole number of at least 1"),
    ("data.class_mix", _null_or(lambda p: 0 < p <= 1), "a share above 0, at most 1, or null"),
    (
        *("data.extra_roots", _are_roots),
        "a list of folders, [/data/more], or of {root: FOLDER, split: NAME}",
    ),
    ("data.timeout", lambda n: is_number(n) and n >= 0, "seconds, or 0 to wait for ever"),
)
"""Key of a setting, whether a value is in its range, and the range in words."""
_REFERENCE = re.compile(r"\$\{([\w.]+)\}", re.ASCII)
_MOST_ERRORS = 20


def check(
    config: DictConfig, added: Iterable[str] = (), *, needs_data: bool = False
) -> TrainConfig:
    """Return a composed train config as typed settings, or raise InputError with a line per error.

    ``added`` are the keys that were appended on the command line with ``+``. With ``needs_data``
    ``data.root`` must be a folder, which is checked before all else.
    """
    # Before anything is resolved: OmegaConf stops at the first interpolation of a missing value and
    # names the key that interpolates, not the one to set.
    unresolved: Any = OmegaConf.to_container(config, resolve=False)
    _refuse_missing(unresolved)
    root = config.data.get("root")
    if root is not None:  # a checkpoint must find its data from wherever it is used
        folder = Path(os.path.expanduser(str(root))).absolute()
        if needs_data and "root" not in (config.data.get("dataset") or {}):
            raise InputError(
                f"data.root={root}: this data set draws its pictures and reads none; for your own: "
                f"data=folder {shlex.quote(f'data.root={root}')} 'data.classes=[name,name]'"
            )
        if needs_data and not folder.is_dir():
            raise InputError(f"data.root={folder}: there is no such folder; set data.root=<folder>")
        config.data.root = str(folder)
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True)
        if _are_roots(extra := plain["data"].get("extra_roots")):
            plain["data"]["extra_roots"] = [_absolute(place, needs_data) for place in extra]
        return check_plain(plain, added)
    except OmegaConfBaseException as error:
        own: BaseException | None = error
        while own is not None and not isinstance(own, UserError):
            own = own.__cause__ or own.__context__
        if own is not None:  # of a resolver of ours
            raise own from None
        raise InputError(first_line(error, getattr(error, "full_key", None))) from error
    except InputError as error:
        raise InputError(_name_settings(str(error), unresolved)) from None


def _absolute(place: str | dict[str, str], needs_data: bool) -> str | dict[str, str]:
    """Return an entry of ``data.extra_roots`` with an absolute path; if needed, it must exist."""
    if isinstance(place, dict):
        return {**place, "root": str(_absolute(place["root"], needs_data))}
    folder = Path(os.path.expanduser(place)).absolute()
    if needs_data and not folder.is_dir():
        raise InputError(f"data.extra_roots: {folder}: there is no such folder; fix or remove it")
    return str(folder)


def check_plain(plain: dict[str, Any], added: Iterable[str] = ()) -> TrainConfig:
    """Return a train config of plain values as typed settings, or raise InputError, as ``check``.

    Nothing in it is resolved, here or later: text that looks like an interpolation is an error. A
    resolver could otherwise put a ``_target_`` or a value in after the check. ``plain`` has all
    keys of TrainSchema, and becomes the attribute of that name.
    """
    if problem := problem_with(plain, ""):
        raise InputError(problem)
    _refuse_missing(plain)
    trainer, run = _typed(TrainSettings, plain["trainer"]), _typed(RunSettings, plain["run"])
    errors = [*_unknown_keys(plain, added), *_value_errors(plain)]
    for group in TRUSTED:
        errors += [*_root_errors(plain[group], group), *_node_errors(plain[group], group)]
    _refuse([*errors, *trainer.errors(), *run.errors()])
    # Only now: DataConfig has required fields, which may be among the errors above.
    data = _typed(DataConfig, plain["data"])
    others = {k: v for k, v in plain.items() if k not in ("data", "trainer", "run")}
    return TrainConfig(data=data, trainer=trainer, run=run, plain=plain, **others)


def _name_settings(errors: str, unresolved: Mapping[str, Any]) -> str:
    """Name each error by the setting that a user sets, not by a key that interpolates it.

    One error is left of those that a wrong value of a setting causes wherever it is interpolated.
    """
    references: dict[str, str] = {}
    for key, value in flat(unresolved).items():
        for source in _REFERENCE.findall(str(value)):
            # Of the arguments of a resolver it is the one with the name of the key: the names of
            # data.dataset.classes are those of data.classes, data.num_classes is their count.
            if value == f"${{{source}}}" or source.split(".")[-1] == key.split(".")[-1]:
                references.setdefault(key, source)
    lines: list[str] = []
    for line in errors.split("\n"):
        subject, colon, problem = line.partition(": ")
        key = setting = re.split(r"[=[]", subject)[0]
        while source := next((k for k in references if f"{setting}.".startswith(f"{k}.")), ""):
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
    """Raise InputError with the first of the errors, one line each; without any do nothing."""
    lines = list(dict.fromkeys(errors))
    rest = len(lines) - _MOST_ERRORS
    if lines:
        raise InputError("\n".join(lines[:_MOST_ERRORS] + [f"and {rest} more"] * (rest > 0)))


def _refuse_missing(plain: Mapping[str, Any]) -> None:
    """Raise InputError with the keys whose value is "???"."""
    forms = {"data.root": "data.root=<folder>", "data.classes": "'data.classes=[name,name]'"}
    _refuse(
        f"{key}: no value is given; set {forms.get(key, f'{key}=<value>')}"
        for key, value in flat(plain).items()
        if value == MISSING
    )


def _unknown_keys(plain: Mapping[str, Any], added: Iterable[str]) -> list[str]:
    """Return a line for each key that was added with ``+`` and that nothing reads."""
    # Each data set has keys of its own, so ``data`` has no schema, and Hydra accepts any "+" there.
    unknown = [key for key in added if re.fullmatch(r"data\.\w+", key)]
    for prefix, schema in SETTINGS.items():
        if prefix != "data.":
            known = [prefix + f.name for f in fields(schema) if f.name != "plain"]
            node = plain[prefix[:-1]] if prefix else plain
            unknown += [prefix + key for key in node if prefix + key not in known]
    keys = [key for key, _, _ in walk(plain, "") if key not in unknown]
    return [f"{key}: there is no such key{instead(key, keys)}" for key in unknown]


def _value_errors(plain: Mapping[str, Any]) -> list[str]:
    """Check single values: those of ``_RANGES``, that numbers are finite, and class weights."""
    values = {"data.num_classes": None, **{key: value for key, value, _ in walk(plain, "")}}
    errors = [
        f"{key}={values[key]}: expected {expected}"
        for key, fits, expected in _RANGES
        if key in values and not fits(values[key])
    ]
    data, count = plain["data"], values["data.num_classes"]
    try:
        bands_of(*map(data.get, ("channels", "range", "rgb")))
    except InputError as error:
        errors.append(str(error))
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            errors.append(f"{key}={value}: expected a finite number")
        elif re.fullmatch(r"model\.(.+\.)?num_classes", key) and value != count:
            errors.append(f"{key}={value}: the data set has {count} classes; leave it out")
        elif re.fullmatch(r"model\.(channels|range|rgb)", key) and value != data.get(key[6:]):
            errors.append(f"{key}={value}: it follows data.{key[6:]}; leave it out")
        elif re.search(r"\.class_weights\[\d+\]$", key) and is_number(value) and value < 0:
            errors.append(f"{key}={value}: expected a number of at least 0")
        elif key.endswith(".class_weights") and isinstance(value, list) and len(value) != count:
            errors.append(f"{key}: {len(value)} weights for data.num_classes={count}")
    return errors


def _root_errors(node: Mapping[str, Any], group: str) -> list[str]:
    """Check the class of a group; that of ``data`` is partial, called later for each split."""
    if not node:  # tools/check_data.py has data alone
        return []
    key, is_partial, count = group, group == "data", node.get("num_classes")
    if is_partial:
        key, node = "data.dataset", node.get("dataset") or {}
    if not isinstance(node, Mapping) or "_target_" not in node:
        return [f"{key}: names no class; expected _target_ and its arguments"]
    path = node["_target_"]
    if node.get("_partial_", False) is not is_partial:
        return [f"{key}._partial_={node.get('_partial_')}: expected {str(is_partial).lower()}"]
    with suppress(InputError):  # reported with all other targets
        target = locate(path, group)
        # Of all classes that a loss may name, it alone takes the losses of the branches.
        if group == "loss" and "main" not in inspect.signature(target).parameters:
            return [
                f"loss._target_={path}: expected danet.losses.DeepSupervision; a loss is its "
                f"argument: loss.main._target_={path}"
            ]
        # Where no file must be read for the names.
        names = node.get("classes", getattr(target, "classes", None)) if is_partial else None
        if is_int(count) and isinstance(names, (list, tuple)) and 0 < len(names) != count:
            return [
                f"data.num_classes={count}, but {target.__name__} has {len(names)} class names "
                f"({names[0]} to {names[-1]}): leave data.num_classes out"
            ]
    return []


def check_node(node: dict[str, Any], key: str) -> None:
    """Check one group of a config; raise InputError with a line per error."""
    problem = problem_with(node, key)
    _refuse([problem] if problem else _node_errors(node, key))


def _node_errors(node: Any, key: str) -> list[str]:
    """Check all nodes of a group that name a class; ``key`` is its position in the config."""
    found = [(value, place) for place, value, _ in walk(node, key) if isinstance(value, Mapping)]
    return [e for value, place in found if "_target_" in value for e in target_errors(value, place)]
