"""The folder of a run: made once, by one process, never shared by two runs."""

import itertools
import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from danet.checkpoint import manager
from danet.distributed import collectives
from danet.errors import InputError, StorageError, UserError
from danet.filesystem import file_lock

STOPPED = "stopped"
"""File in the folder of a run that a signal ended before its last step."""

_ID = ".run_id"
"""File with a name of the run that no other has; its checkpoints carry it, too."""

_HEADER = """\
# The whole config of this run. To repeat it in a new folder:
#   python tools/train.py --config-dir {folder} --config-name config run.dir=null resume=null
defaults:
  - train_schema
  - _self_
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
hydra:
  run: {{dir: .}}
  output_subdir: null
"""

_OF_A_START = ("run", "resume", "init_from", "allow_changes", "dry_run")
"""Keys of a config that say how a run was started."""


def prepare(
    wanted: str | None,
    fallback: Path,
    *,
    config: Mapping[str, Any],
    resuming: bool,
    saved: Mapping[str, Any] | None = None,
) -> Path:
    """Create the folder and write config.yaml on rank 0; return the folder on all ranks.

    Args:
        wanted: ``run.dir``; None for a fresh folder named after ``fallback``.
        fallback: Used with a number behind it where it exists already.
        config: Of the run. A config.yaml that differs, of the steps so far, is renamed to
            config_until_<step>.yaml.
        resuming: Whether the folder may hold an earlier part of the run.
        saved: The checkpoint to continue from.

    Raises:
        InputError: Another run is in the folder, or another process trains in it.
        StorageError: It cannot be made or written.
    """
    outcome: Path | UserError | None = None
    if collectives.is_first():
        try:
            outcome = _make(wanted, fallback, resuming)
            _lock(outcome)  # before anything in the folder is changed
            _describe(outcome, config, resuming, saved)
            manager.remove_leftovers(outcome)
            (outcome / STOPPED).unlink(missing_ok=True)
        except UserError as error:
            # Raised on all ranks below: one that failed alone would leave the others waiting.
            outcome = error
    outcome = collectives.from_first(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    assert outcome is not None
    return outcome


def id_of(folder: Path) -> str:
    """Return the id of the run in a folder; empty for a folder of a version without ids."""
    try:
        return (folder / _ID).read_text().strip()
    except OSError:
        return ""


def refuse_foreign(folder: Path, path: Path, saved: Mapping[str, Any]) -> None:
    """Refuse to resume in the folder of one run from the checkpoint of another.

    Raises:
        InputError: With both names.
    """
    here, there = id_of(folder), saved.get("run_id") or ""
    if here and there and here != there:
        raise InputError(
            f"resume={path}: a checkpoint of run {there}, but run.dir={folder} is of run {here}; "
            "it was copied here by mistake, or name a new folder with run.dir"
        )


def _make(wanted: str | None, fallback: Path, resuming: bool) -> Path:
    folder = Path(wanted).expanduser() if wanted else fallback
    if (folder / "config.yaml").exists() and wanted and not resuming:
        raise InputError(
            f"run.dir={folder}: another run is there; give resume=auto to go on with it, or "
            "another run.dir"
        )
    for number in itertools.count(2):
        try:
            # mkdir decides, not exists(): of two runs started in one second, it lets one win.
            folder.mkdir(parents=True, exist_ok=wanted is not None)
            break
        except OSError as error:
            if wanted or not isinstance(error, FileExistsError):
                raise _unwritable(folder, error) from error
            folder = fallback.with_name(f"{fallback.name}-{number}")  # of a run of this second
    return folder


def _unwritable(folder: Path, error: OSError) -> StorageError:
    return StorageError(f"run.dir={folder}: not a writable folder ({error.strerror})")


def _describe(
    folder: Path, config: Mapping[str, Any], resuming: bool, saved: Mapping[str, Any] | None
) -> None:
    file = folder / "config.yaml"
    try:
        if file.exists() and not _is_described(file, config):
            step = saved["step"] if saved is not None else 0
            file.replace(folder / f"config_until_{step:09d}.yaml")
        if not file.exists():
            body = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
            file.write_text(
                _HEADER.format(folder=shlex.quote(str(folder.absolute()))) + body, encoding="utf-8"
            )
        if not (resuming and id_of(folder)):
            # A run that is continued in another folder is another run, with an id of its own.
            is_its_own = saved is not None and manager.path_at(folder, saved["step"]).exists()
            known = saved.get("run_id") if saved is not None and is_its_own else None
            (folder / _ID).write_text(f"{known or uuid4().hex}\n")
    except OSError as error:
        raise _unwritable(folder, error) from error


def _is_described(file: Path, config: Mapping[str, Any]) -> bool:
    """Return whether config.yaml equals a config, apart from the keys of how it was started."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    kept = {key: value for key, value in config.items() if key not in _OF_A_START}
    # Written and read back, as the file was: tuples become lists.
    plain = yaml.safe_load(yaml.safe_dump(kept))
    return isinstance(found, dict) and plain == {key: found.get(key) for key in plain}


_locks: dict[Path, int] = {}
"""Folders that this process has, with open handles; the system unlocks them when it ends."""


def _lock(folder: Path) -> None:
    """Lock a folder against other training processes until this one ends, even if killed.

    Raises:
        InputError: A process that is alive has it.
    """
    # A second handle on the same file would not get the lock that this process itself holds.
    if os.name != "posix" or folder.absolute() in _locks:
        return
    path = folder / ".lock"
    try:
        # Not truncated, so that the owner can be read. Programs that are executed do not inherit
        # it; they would hold the lock beyond the end of the run.
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        is_free = file_lock(handle, wait=False)
    except OSError:  # a network file system without locks
        os.close(handle)
        return
    if not is_free:
        owner = os.read(handle, 100).decode(errors="replace").strip()
        os.close(handle)
        raise InputError(
            f"run.dir={folder}: another process trains here ({owner}); wait for its end, or give "
            "another run.dir"
        )
    # The owner is for messages alone: the file stays behind, and only the lock counts, which the
    # system releases however the process ends.
    with suppress(OSError):
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {os.uname().nodename}\n".encode())
    _locks[folder.absolute()] = handle
