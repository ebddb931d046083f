"""Checkpoint files: what is in one, how it is written, how it is read.

A checkpoint is one dictionary of tensors, numbers, strings, lists and dictionaries, so that it can
be read without running anything that lies in it::

    format      3
    version     of this package
    config      the run's whole config, resolved
    classes     names            palette   RGB colours
    model       state dict       ema       state dict of averaged weights, or None
    optimizer   state dict, in which every state has the name and the shape of its parameter
    scaler      state dict of the loss scaler
    processes   how many trained
    step        batches trained  skipped   those of them whose gradients overflowed float16
    best_miou   so far, or None
    scores      of the last evaluation, or None

The file is torch's zip archive with 40 bytes behind it: eight that say so and the SHA-256 of all
before, so that a flipped bit is noticed. Files of formats 1 and 2 name classes in modules that no
longer exist; their weights can still start a run, with ``init_from``.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import danet
from danet.checkpoint import reading
from danet.checkpoint.weights import without_wrappers
from danet.distributed import collectives
from danet.errors import InputError, StorageError
from danet.filesystem import atomic_write
from danet.plain import is_int, printable

FORMAT = 3
Checkpoint = dict[str, Any]


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically: the file is complete or absent, even after a power cut.

    Raises:
        StorageError: The disk is full, or the folder may not be written.
    """
    try:
        # Durable: a rename can reach the disk before the data, and a power cut then leaves an
        # empty file under the final name; the folder is flushed, too, or the rename may be lost.
        # The process id in its temporary name lets the next run remove what a kill left.
        with atomic_write(path, durable=True) as temporary, open(temporary, "w+b") as file:
            torch.save(checkpoint, file)
            # torch's reader ignores what follows the table of the archive, so plain torch.load
            # still reads the file.
            file.write(reading.MARK + reading.digest_of(file, file.tell()))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise StorageError(f"{path}: the checkpoint could not be written ({error})") from error


def _is_count(value: Any, low: int = 0) -> bool:
    return is_int(value) and low <= value < 2**53  # exact as a float


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (is_int(value) and abs(value) < 2**53)


def _is_text(value: Any) -> bool:
    # Printed in messages, where control characters would reach the terminal.
    return isinstance(value, str) and len(value) <= 1000 and printable(value) == value


def _by_name(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(_is_text(k) and is_right(v) for k, v in value.items())


def _are_all(values: Any, is_right: Callable[[Any], bool], count: int | None = None) -> bool:
    is_list = isinstance(values, (list, tuple)) and count in (None, len(values))
    return is_list and all(map(is_right, values))


def _are_tensors(value: Any) -> bool:
    return _by_name(value, lambda tensor: isinstance(tensor, Tensor))


def _are_scores(value: Any) -> bool:
    return _by_name(value, lambda score: score is None or _is_number(score))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 1000  # made printable below


def _is_color(value: Any) -> bool:
    return _are_all(value, lambda part: _is_count(part) and part < 256, 3)


def _is_best(value: Any) -> bool:
    return _are_all(value, _is_number, 2) and _is_count(value[1])


# All keys at once: GradScaler.load_state_dict raises KeyError on a state with some of them.
_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
_FIELDS: dict[tuple[str, ...], tuple[Callable[[Any], bool], str]] = {
    ("step", "evaluated_at", "skipped"): (_is_count, "a whole number of at least 0"),
    ("processes", "threads"): (lambda v: _is_count(v, 1), "a whole number of at least 1"),
    ("classes",): (lambda v: _are_all(v, _is_name), "a list of names"),
    ("palette",): (lambda v: _are_all(v, _is_color), "a list of RGB colours of 0 to 255"),
    ("model",): (_are_tensors, "tensors by name"),
    ("ema",): (lambda v: v is None or _are_tensors(v), "tensors by name, or null"),
    ("optimizer",): (lambda v: v is None or isinstance(v, dict), "a state, or null"),
    # The state of a disabled scaler is empty.
    ("scaler",): (lambda v: not v or (_are_scores(v) and set(v) == _SCALER), "of a loss scaler"),
    ("best_miou",): (lambda v: v is None or _is_number(v), "a number, or null"),
    ("scores",): (lambda v: v is None or _are_scores(v), "numbers by name, or null"),
    ("best",): (lambda v: _are_all(v, _is_best), "pairs of a score and a step"),
    ("version",): (_is_text, "a text of printable letters"),
    ("training_set", "validation_set"): (
        lambda v: v is None or _is_text(v),
        "a text of printable letters, or null",
    ),
    # Letters and digits, since it is printed in messages.
    ("run_id",): (lambda v: v == "" or (isinstance(v, str) and v.isalnum()), "letters and digits"),
}
"""Fields of a checkpoint -> what they must be; not all formats and folders have all of them."""


FOR_USE = ("config", "classes", "palette", "model", "step")
FOR_RESUME = (*FOR_USE, "ema", "optimizer", "scaler", "processes", "best_miou", "scores")


def require_fields(saved: Checkpoint, names: Sequence[str], source: str) -> None:
    """Raise InputError if a file lacks a field."""
    if lost := [name for name in names if name not in saved]:
        raise InputError(f"{source}: there is no {lost[0]} in it; it was not written by a run")


def require_sound(saved: Checkpoint, source: str) -> None:
    r"""Check the types of the fields of a foreign file; escape the names of its classes.

    Names go into reports, tables and the terminal: control characters in them become ``\x1b``.

    Args:
        saved: The fields that it has; ``classes`` is replaced by printable names.
        source: Setting and path, for messages.

    Raises:
        InputError: A field is of another type.
    """
    for names, (is_right, expected) in _FIELDS.items():
        for name in names:
            if name in saved and not is_right(saved[name]):
                raise InputError(f"{source}: its {name} is not what it must be: {expected}")
    if "classes" in saved:
        # Each name once, since a list may hold one a million times.
        shown = {name: printable(name) for name in set(saved["classes"])}
        saved["classes"] = [shown[name] for name in saved["classes"]]


def _shown(value: Any) -> str:
    # The text of nested lists that hold one another twice is of any length.
    return printable(str(value)[:20]) if isinstance(value, (str, int)) else type(value).__name__


def load(path: str | Path, *, key: str = "checkpoint") -> Checkpoint:
    """Read a checkpoint to the CPU without running code from it.

    Args:
        path: Of the file.
        key: The setting that named it, for messages.

    Raises:
        InputError: The file is missing, damaged, foreign, of another format, or has weights that
            are not finite.
    """
    path = Path(path).expanduser()
    checkpoint, is_sealed = reading.read(path, key)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise InputError(
            f"{key}={path}: not a checkpoint of this project (no 'format' in it): it has no "
            "config and no state of an optimizer; plain weights go to init_from"
        )
    version = checkpoint["format"]
    number = version if is_int(version) else None  # a foreign file may hold anything
    if number != FORMAT:
        advice = "; its weights can start a new run with init_from" if number in (1, 2) else ""
        raise InputError(
            f"{key}={path}: format {_shown(version)} of danet "
            f"{_shown(checkpoint.get('version'))}; this is danet "
            f"{danet.__version__}, which reads format {FORMAT}{advice}"
        )
    # Judged after the format: files of format 1 have no checksum and need other advice.
    if not is_sealed:
        raise InputError(
            f"{key}={path}: damaged or incomplete: the checksum at its end is missing"
            + reading.another_whole(path)
        )
    require_sound(checkpoint, f"{key}={path}")
    require_fields(checkpoint, ("model",), f"{key}={path}")
    checkpoint["model"], notes = without_wrappers(checkpoint["model"], f"{key}={path}")
    if average := checkpoint.get("ema"):
        # AveragedModel puts "module." before every tensor but its counter.
        count = {name: value for name, value in average.items() if name == "n_averaged"}
        inner = without_wrappers(average, f"{key}={path}").tensors.items()
        checkpoint["ema"] = {**count, **{f"module.{n}": v for n, v in inner if n not in count}}
    if collectives.is_first():  # every rank reads the file, one prints
        print("".join(f"{note}\n" for note in notes), end="", flush=True)
    # A network of NaN predicts class 0 everywhere through argmax: its score looks merely bad.
    for part in ("model", "ema"):
        problem = reading.unsound(checkpoint.get(part) or {})
        if problem:
            raise InputError(
                f"{key}={path}: {problem}; take a checkpoint from before the run diverged"
            )
    return checkpoint
