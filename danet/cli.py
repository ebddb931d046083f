"""The frame of every tool: composes the config, calls the tool, converts errors to exit codes."""

import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from danet import console
from danet.config import help, schema
from danet.config.help import CONFIGS, choices
from danet.config.schema import did_you_mean, instead
from danet.distributed import error_reporting, launcher
from danet.errors import InputError, Interrupted, UserError, first_line
from danet.filesystem import explain_storage, refuse_name
from danet.plain import printable, quoted, walk, without_credentials

_PATHS = (
    *("data.root", "run.dir", "resume", "init_from", "model.backbone.weights"),
    *("checkpoint", "input", "output", "images", "metrics", "other", "submission"),
    *("data.sbd_root", "data.cache_dir", "demo_runtime"),
)
"""Keys of settings whose value is a path."""

_UNKNOWN_KEY = re.compile(
    r"Could not override '([^']+)'|not in '?(?:struct|.+?)'?\n *full_key: (\S+)"
)
"""Ends of the messages of Hydra and OmegaConf about keys that do not exist."""


def run(work: Callable[[DictConfig], None], config_name: str) -> None:
    """Compose ``config_name`` with the command line, call ``work``, and end the process.

    Of a UserError one process prints the message on stderr, and all exit with its code. A full or
    read-only disk, or a name that the file system refuses, is handled in the same way. Any other
    exception is a bug and keeps its traceback; with ``DANET_TRACEBACK=1`` all do. A console that
    cannot be written to does not end the run.
    """
    # Hydra would print a shortened traceback and exit with 1; with this it lets exceptions through.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    schema.register()
    # Set by require_packages, so that Ctrl-C during the imports of a tool prints no traceback.
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with console.unbreakable(), error_reporting.leaving_the_group(), _exit_codes(config_name):
        launcher.require_sound(os.environ)
        check_arguments(sys.argv[1:], config_name)
        # hydra.main reads sys.argv and takes no arguments.
        sys.argv[1:] = [quote(argument) for argument in sys.argv[1:]]
        if flags() in (["--help"], ["-h"]):
            say(help.page(_composed(config_name, typed(), with_hydra=True), config_name))
            return
        name = _resumed() if config_name == "train" else config_name
        errors: list[Exception] = []

        def keep_errors(config: DictConfig) -> None:
            if any(isinstance(error, Interrupted) for error in errors):
                return  # Ctrl-C ends a sweep, and a run that fails does not
            try:
                work(config)
            except Exception as error:  # Hydra would print the overrides before it raises it again
                errors.append(error)

        with _exit_codes(name):
            start = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)
            start(keep_errors)()
        if errors:
            raise errors[0]


def _resumed() -> str:
    """Return the name of the primary config of a training: of the checkpoint that it resumes."""
    arguments = get_args_parser().parse_args(sys.argv[1:])
    typed = OverridesParser.create().parse_overrides(arguments.overrides)
    own = (arguments.config_name, arguments.config_dir, arguments.config_path)
    if any(own) or not any(override.key_or_group == "resume" for override in typed):
        return "train"
    from danet.config import overlay  # late, since it brings in torch

    if (found := overlay.base(typed)) is None:
        return "train"
    ConfigStore.instance().store(name="resumed", node=found[0])
    sys.argv[1:] = [*(a for a in sys.argv[1:] if a not in arguments.overrides), *found[1]]
    return "resumed"


@contextmanager
def _exit_codes(config_name: str) -> Iterator[None]:
    """Convert errors for the user to a message on stderr and an exit code."""
    is_debugged = os.environ.get("DANET_TRACEBACK") == "1"
    try:
        yield
    except (UserError, OSError, HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        shown: UserError | None
        if isinstance(error, (HydraException, OmegaConfBaseException, yaml.YAMLError)):
            shown = InputError(_explain(error, config_name))
        else:
            shown = error if isinstance(error, UserError) else explain_storage(error)
        if shown is None or is_debugged:
            raise
        if not error_reporting.is_reported(shown):
            kind = "" if isinstance(shown, Interrupted) else "error: "
            # It may quote a foreign file, which must not steer the terminal, or a password.
            text = without_credentials(printable(str(shown), keep=chr(10)))
            print(f"{kind}{text}", file=sys.stderr, flush=True)
        sys.exit(shown.exit_code)
    except KeyboardInterrupt:
        if is_debugged:
            raise
        if os.environ.get("RANK", "0") == "0":
            print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)


def quote(argument: str) -> str:
    """Quote a value, or the items of a list, that Hydra's grammar refuses, and every path.

    Names in any alphabet and with any punctuation are thus taken literally; ``~`` at the start of a
    path is the home folder.
    """
    key, equals, value = argument.partition("=")
    if key.lstrip("+") in _PATHS and value not in ("", "null") and value[0] not in "'\"":
        return f"{key}={quoted(os.path.expanduser(value))}"
    if not equals or argument.startswith("-") or _is_understood(argument):
        return argument
    if value[:1] == "[" and value[-1:] == "]":
        parts = [part.strip() for part in value[1:-1].split(",")]
        parts = [part if _is_understood(f"x=[{part}]") else quoted(part) for part in parts]
        fitting = f"{key}=[{','.join(parts)}]"
    else:
        fitting = argument if value[:1] in ("[", "{") else f"{key}={quoted(value)}"
    return fitting if _is_understood(fitting) else argument


def _is_understood(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def check_arguments(arguments: list[str], config_name: str) -> None:
    """Raise InputError for ``--steps 3``, ``model.head=fcn`` and choices of null."""
    flags_of_hydra = get_args_parser()._option_string_actions
    for argument in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):  # bytes that are not text
            shown = os.fsencode(argument).decode("ascii", "backslashreplace")
            raise InputError(
                f"{shown}: this Python takes names for {sys.getfilesystemencoding()}, and here are "
                "other bytes; set PYTHONUTF8=1 in the environment, or rename"
            )
        name, _, value = argument.lstrip("-+").partition("=")
        is_stream = (config_name, name) == ("predict", "images") and "://" in value
        if is_stream and {"-m", "--multirun"} & set(arguments):
            raise InputError("--multirun: leave it out; it writes passwords of streams to a file")
        if name in (*_PATHS, "run.name") and not is_stream:
            refuse_name(name, value)
        if name in _PATHS and "://" in value and not (is_stream or value.startswith("hf://")):
            raise InputError(f"{argument}: addresses are not read; download the file first")
        if argument.startswith("-") and argument.partition("=")[0] not in flags_of_hydra:
            known = _keys(config_name)
            if name in known:
                raise InputError(f"{argument}: no dashes here; write {name}={value or 'VALUE'}")
            example = "trainer.steps=300" if "trainer" in known else f"{known[1]}=VALUE"
            raise InputError(
                f"{argument}: settings are given without dashes, as in {example}"
                + instead(name, known)
            )
        if "." in name and value in choices(group := name.replace(".", "/")):
            raise InputError(f"{argument}: a choice has slashes in its name, {group}={value}")
        # For these Hydra has a traceback.
        if "=" in argument and re.fullmatch(r"|null|true|false|[\d.]+", value) and choices(name):
            raise InputError(f"{argument}: expected one of {', '.join(choices(name))}")
    if {"-m", "--multirun"} & set(arguments) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--multirun under torchrun: start torchrun once per run instead")


def overrides() -> list[str]:
    """Return the settings of the command line as typed."""
    return list(HydraConfig.get().overrides.task)


def typed() -> list[str]:
    """Return the arguments of the command line that are not flags."""
    return list(get_args_parser().parse_args(sys.argv[1:]).overrides)


def flags() -> list[str]:
    """Return the flags of the command line with their values, except those of a sweep."""
    settings = typed()
    return [a for a in sys.argv[1:] if a not in settings and a not in ("-m", "--multirun")]


def added_keys() -> list[str]:
    """Return the keys that were appended with ``+``."""
    return [o.lstrip("+").split("=")[0] for o in overrides() if o.startswith("+")]


def _explain(error: Exception, config_name: str) -> str:
    """Return the error of Hydra, OmegaConf or YAML in one line, with the closest valid name."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _no_choice(error.missing_cfg_file or "", sorted(error.options))
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
        tab = "; YAML is indented with blanks, not with tabs" * ("'\\t'" in str(error.problem))
        place = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}"
        return f"{place}: {error.problem}{tab}"
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__:
        causes.append(cause)
    text = "\n".join(map(str, causes))
    if found := _UNKNOWN_KEY.search(text):
        known = _keys(config_name)
        if config_name == "convert":  # which takes the settings of a training, too
            known += _keys("train")
        unknown = dict.fromkeys([found[1] or found[2], *_misspelt(known)])
        return "\n".join(f"{key}: there is no such key{instead(key, known)}" for key in unknown)
    for cause in causes:
        key = getattr(cause, "full_key", None)
        if key and not isinstance(cause, ConfigCompositionException):
            return _shorten(first_line(cause), key)
    if isinstance(error, OverrideParseException) or "Ambiguous value" in text or "sweep" in text:
        named = re.search(r"'([^'\s]+=[^']*)'", text)
        shown = named.group(1) if named else (getattr(error, "override", "") or "").strip()
        key, equals, value = shown.partition("=")
        form = f"a list '{key}=[{value.strip('[]')}]'" if set("[,") & set(value) else "a list [a,b]"
        if value.startswith("{"):
            form = f"a mapping '{key}={{{value.strip('{}')}}}'"
        many = "; with -m each value is a run of its own" * ("sweep" in text)
        if shown and not equals:
            owner = {"train": "experiment", "check_data": "data.root", "convert": "input"}
            meant = f"{owner.get(config_name, 'checkpoint')}={shown}"
            if config_name == "train":
                meant = f"resume={shown}" if shown.endswith((".pt", ".pth")) else "experiment=NAME"
            form = f"a setting has the form key=value; did you mean {meant}?"
            return f"{shown}: not understood; {form}"
        if many and not _takes_list(config_name, key):
            return f"{shown}: expected one value{many}"
        return f"{shown}: not understood; a setting has the form key=value, {form}{many}"
    return first_line(error)


def _no_choice(missing: str, options: list[str]) -> str:
    """Return what is said of a choice that does not exist: ``missing`` is its group and name."""
    place = missing.removeprefix("data/")
    if place != missing and re.search(r"[/~]|\.ya?ml$", place):
        root = "<folder>" if place.endswith((".yaml", ".yml")) else place
        own = f"data=folder data.root={root} 'data.classes=[name,name]'"
        return f"data={place}: data names a loader; your own pictures: {own}"
    group, _, choice = missing.rpartition("/")
    close = did_you_mean(choice, options)
    if group == "model" and re.search(r"\d", choice):
        close = f"; set model/backbone, one of {', '.join(choices('model/backbone'))}"
    elif group == "model/backbone":
        with suppress(ImportError):  # optional
            if importlib.import_module("timm").is_model(choice):  # takes seconds
                close = f"; it is one of timm: {group}=timm model.backbone.name={choice}"
    return f"{group}={choice}: there is no such choice{close}; choices: {', '.join(options)}"


def _shorten(text: str, key: str) -> str:
    """Return a message of OmegaConf in plain words, with the key and the value."""
    match = re.match(
        r"Value '(.*)' (?:of type '\w+' could not be converted to|is not a valid) (\w+)", text
    )
    if match:
        names = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}
        return f"{key}={match[1]}: expected {names.get(match[2], match[2])}"
    if "missing mandatory value" in text:
        is_file = key in ("checkpoint", "input", "output")
        return f"{key}: no value is given; set {key}=<{'file' if is_file else 'value'}>"
    if "is not a ListConfig, list" in text:
        values = [a.partition("=")[2] for a in typed() if a.partition("=")[0] == key]
        # A number is no item of these lists: they have names or pairs.
        form = f", {key}=[{values[-1]}]" if values and not values[-1][:1].isdigit() else ""
        return f"{'='.join([key, *values[-1:]])}: expected a list{form}"
    return f"{key}=null: expected a value" if text.endswith("is not Optional") else f"{key}: {text}"


def _composed(config_name: str, settings: list[str], *, with_hydra: bool = False) -> DictConfig:
    """Compose a root config outside of hydra.main."""
    GlobalHydra.instance().clear()  # that of hydra.main, beside which no other can be initialised
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(config_name, settings, return_hydra_config=with_hydra)


def _takes_list(config_name: str, key: str) -> bool:
    """Return whether a setting may be a list; one without a schema may."""
    try:
        OmegaConf.update(_composed(config_name, []), key, [])
    except (HydraException, OmegaConfBaseException):
        return False
    return True


def _keys(config_name: str) -> list[str]:
    """Return the keys of the config, composed with the choices of the command line."""
    chosen = [a for a in sys.argv[1:] if "=" in a and choices(a.lstrip("+").partition("=")[0])]
    for settings in (chosen, []):  # a tool lacks the groups of a training
        with suppress(HydraException, OmegaConfBaseException):  # the config files may be invalid
            config = _composed(config_name, settings)
            return [key for key, _, _ in walk(OmegaConf.to_container(config, resolve=False), "")]
    return []


def _misspelt(known: list[str]) -> list[str]:
    """Return the keys of the command line that the config lacks; Hydra names only the first."""
    keys = [argument.partition("=")[0] for argument in typed()]
    # Keys that begin with + or ~ may be new, and choices of groups are no keys.
    plain = [k for k in keys if re.fullmatch(r"(?!hydra)[\w.]+", k) and not choices(k)]
    return [key for key in plain if known and key not in known]


def choice() -> str:
    """Return the default name of a run: the experiment, else the data set."""
    return chosen("experiment") or chosen("data") or "run"


def chosen(group: str) -> str | None:
    """Return the choice of the command line or the root config for a group, or None."""
    choice = HydraConfig.get().runtime.choices.get(group)
    return None if choice is None else str(choice)


def say(text: str) -> None:
    """Print a line, on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
