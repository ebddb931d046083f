"""Checkpoint files: what is in one, how it is written, how it is read.

A checkpoint is one dictionary of tensors, numbers, strings, lists and dictionaries, so that it can
be read without running anything that lies in it: the ``Fields`` below, and::

    format      3
    config      the run's whole config, resolved
    model       state dict       ema       state dict of averaged weights, or None

The file is torch's zip archive with 40 bytes behind it: eight that say so and the SHA-256 of all
before, so that a flipped bit is noticed. Files of formats 1 and 2 name classes in modules that no
longer exist; their weights can still start a run, with ``init_from``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, FailFast, Field, ValidationError

import danet
from danet.checkpoint import reading
from danet.checkpoint.weights import COUNTER, without_wrappers
from danet.errors import InputError, StorageError
from danet.filesystem import atomic_write
from danet.plain import is_int, is_number, printable

FORMAT = 3
Checkpoint = dict[str, Any]


def _require_few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > 10_000:  # each that is wrong takes 1 kB
        raise ValueError("more than 10000 entries")
    return value


def _require_number(value: Any) -> Any:
    if not is_number(value):  # for pydantic a tensor of one number is a float
        raise ValueError("Input should be a valid number")
    return value


# Strict: neither True nor a text is a number. Whole numbers must be exact as a float.
_Count = Annotated[int, Field(strict=True, ge=0, lt=2**53)]
_Processes = Annotated[int, Field(strict=True, ge=1, lt=2**53)]
_Byte = Annotated[int, Field(strict=True, ge=0, lt=256)]
_Plain = BeforeValidator(_require_number)
_Number = Annotated[float, _Plain, Field(strict=True)]
# Fitted ones are 0.125 to 8; others than these overflow float32.
_Temperature = Annotated[float, _Plain, Field(strict=True, ge=0.01, le=100, allow_inf_nan=False)]
_Name = Annotated[str, Field(strict=True, max_length=1000)]
# Printed in messages, where control characters would reach the terminal.
_Text = Annotated[_Name, Field(pattern=r"^[^\p{C}\p{Zl}\p{Zp}]*$")]
_Few = BeforeValidator(_require_few)
_Key = Literal["scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"]
_Scaler = Annotated[dict[_Key, _Number], Field(min_length=5)]


class Fields(BaseModel):
    """Fields of a checkpoint beside config and tensors; not all files have all of them."""

    version: _Text = ""  # of this package
    classes: Annotated[list[_Name], FailFast()] = []
    palette: Annotated[list[tuple[_Byte, _Byte, _Byte]], FailFast()] = []
    # State dict, in which every state has the name and the shape of its parameter.
    optimizer: dict[Any, Any] | None = None
    # GradScaler needs all keys; the state of a disabled one is empty.
    scaler: Annotated[_Scaler | Annotated[dict[Any, Any], Field(max_length=0)] | None, _Few] = None
    processes: _Processes = 1  # how many trained
    threads: _Processes = 1
    step: _Count = 0  # batches trained
    skipped: _Count = 0  # those of them whose gradients overflowed float16
    evaluated_at: _Count = 0
    best_score: _Number | None = None  # by trainer.best_by
    best_step: _Count = 0
    evaluations_since_best: _Count = 0
    scores: Annotated[dict[_Text, _Number | None] | None, _Few] = None
    best: Annotated[list[tuple[_Number, _Count]], FailFast()] = []  # scores and steps
    training_set: _Text | None = None
    validation_set: _Text | None = None
    temperature: _Temperature = 1.0  # divides the logits, see danet.evaluation.calibration
    run_id: Annotated[str, Field(strict=True, pattern="^[0-9a-zA-Z]*$")] = ""


FOR_USE = ("config", "classes", "palette", "model", "step")
FOR_RESUME = (*FOR_USE, "ema", "optimizer", "scaler", "processes", "best_score", "scores")


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, whole or not at all, even at a power cut; raise StorageError."""
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


def require_fields(saved: Checkpoint, names: Sequence[str], source: str) -> None:
    """Raise InputError if a file lacks a field."""
    if lost := [name for name in names if name not in saved]:
        raise InputError(f"{source}: there is no {lost[0]} in it; it was not written by a run")


def require_sound(saved: Checkpoint, source: str) -> None:
    r"""Check the fields and weights of a foreign file; escape the names of its classes.

    Names go into reports, tables and the terminal: control characters in them become ``\x1b``. A
    field of another type raises InputError, which begins with ``source``.
    """
    require_fields(saved, ("model",), source)
    try:
        Fields.model_validate(saved)
    except ValidationError as error:
        wrong = error.errors()[0]
        found = reading.shown(wrong["input"])
        raise InputError(f"{source}: its {wrong['loc'][0]} has {found}: {wrong['msg']}") from error
    if "classes" in saved:
        # Each name once, since a list may hold one a million times.
        escaped = {name: printable(name) for name in set(saved["classes"])}
        saved["classes"] = [escaped[name] for name in saved["classes"]]
    reading.require_tensors(saved["model"], source)


def load(path: str | Path, *, key: str = "checkpoint") -> Checkpoint:
    """Read a checkpoint to the CPU without running code from it; ``key`` is the setting with it.

    A missing, damaged or foreign file, another format and infinite weights raise InputError.
    """
    path = Path(path).expanduser()
    source = f"{key}={path}"
    checkpoint, is_sealed = reading.read(path, key)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise InputError(
            f"{source}: not a checkpoint of this project (no 'format' in it): it has no config and "
            "no state of an optimizer; plain weights go to init_from"
        )
    version = checkpoint["format"]
    number = version if is_int(version) else None  # a foreign file may hold anything
    if number != FORMAT:
        advice = "; its weights can start a new run with init_from" if number in (1, 2) else ""
        raise InputError(
            f"{source}: format {reading.shown(version)} of danet "
            f"{reading.shown(checkpoint.get('version'))}; this is danet {danet.__version__}, which "
            f"reads format {FORMAT}{advice}"
        )
    # Judged after the format: files of format 1 have no checksum and need other advice.
    if not is_sealed:
        raise InputError(
            f"{source}: damaged or incomplete: the checksum at its end is missing"
            + reading.another_whole(path)
        )
    if "best_miou" in checkpoint:  # of versions without trainer.best_by
        checkpoint["best_score"] = checkpoint.pop("best_miou")
    require_sound(checkpoint, source)
    checkpoint["model"] = without_wrappers(checkpoint["model"], source)
    if (ema := checkpoint.get("ema")) is not None:
        reading.require_tensors(ema, f"{source}: its ema")
        # AveragedModel puts "module." before every tensor but its counter.
        plain = without_wrappers({n.removeprefix("module."): v for n, v in ema.items()}, source)
        checkpoint["ema"] = {n if n == COUNTER else f"module.{n}": v for n, v in plain.items()}
    return checkpoint
