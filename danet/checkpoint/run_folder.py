"""The folder of a run: made once, by one process, never shared by two runs."""

import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from danet.checkpoint import manager
from danet.checkpoint.format import Checkpoint
from danet.distributed import collectives
from danet.errors import InputError, StorageError, UserError
from danet.filesystem import file_lock

STOPPED = "stopped"  # file in the folder of a run that a signal ended before its last step
_ID = ".run_id"  # file with a name of the run that no other has; its checkpoints carry it, too
_HEADER = """\
# The whole config of this run. To repeat it in a new folder:
#   python tools/train.py --config-dir {folder} --config-name config run.dir=null resume=null
defaults:
  [train_schema, _self_, override hydra/job_logging: none, override hydra/hydra_logging: none]
hydra: {{run: {{dir: .}}, output_subdir: null}}
"""
_OF_A_START = {"run", "resume", "init_from", "allow_changes", "dry_run"}
"""Keys of a config that say how a run was started."""


def refuse_used(folder: Path, *, resuming: bool) -> None:
    """Raise InputError if another run is in a folder, which is not to be resumed."""
    if (folder / "config.yaml").exists() and not resuming:
        raise InputError(
            f"run.dir={folder}: another run is there; give resume=auto to go on with it, or "
            "another run.dir"
        )


def prepare(
    folder: Path, *, config: Mapping[str, Any], resuming: bool, saved: Checkpoint | None = None
) -> Path:
    """Create the folder and write config.yaml on rank 0; return its folder on all ranks.

    A config.yaml that differs, of the steps so far, is renamed to config_until_<step>.yaml. With
    ``resuming`` the folder may hold an earlier part of the run, which goes on from ``saved``. One
    with another run, or in which another process trains, raises InputError.
    """
    error: UserError | None = None
    if collectives.is_first():
        try:
            refuse_used(folder, resuming=resuming)
            folder.mkdir(parents=True, exist_ok=True)
            _lock(folder)  # before anything in the folder is changed
            _describe(folder, config, saved)
            if not (resuming and id_of(folder)):
                # A run that is continued in another folder is another run, with an id of its own.
                is_its_own = saved is not None and manager.path_at(folder, saved["step"]).exists()
                known = saved.get("run_id") if saved is not None and is_its_own else None
                (folder / _ID).write_text(f"{known or uuid4().hex}\n")
            manager.remove_leftovers(folder)
            (folder / STOPPED).unlink(missing_ok=True)
        except UserError as refused:
            # Raised on all ranks below: one that failed alone would leave the others waiting.
            error = refused
        except OSError as refused:
            error = StorageError(f"run.dir={folder}: not a writable folder ({refused.strerror})")
    folder, error = collectives.from_first((folder, error))
    if error is not None:
        raise error
    return folder


def id_of(folder: Path) -> str:
    """Return the id of the run in a folder; empty for a folder of a version without ids."""
    try:
        return (folder / _ID).read_text().strip()
    except OSError:
        return ""


def best_in(path: str | Path, key: str) -> str:
    """Return the best checkpoint in the folder of a run, without scores the newest, and print it.

    Any other path is returned as it is; ``key`` is the setting that named it.
    """
    folder = Path(path).expanduser()
    if not (found := manager.by_age(folder)):
        return str(path)
    file = found[-1] if found[-1].name == "best.pt" else found[0]
    if os.environ.get("RANK", "0") == "0":
        print(f"{key}={path}: using {file.name}", flush=True)
    return str(file)


def refuse_foreign(folder: Path, path: Path, saved: Mapping[str, Any]) -> None:
    """Raise InputError if a run would resume in the folder of another."""
    here, there = id_of(folder), saved.get("run_id") or ""
    if here and there and here != there:
        raise InputError(
            f"resume={path}: a checkpoint of run {there}, but run.dir={folder} is of run {here}; "
            "it was copied here by mistake, or name a new folder with run.dir"
        )


def _describe(folder: Path, config: Mapping[str, Any], saved: Mapping[str, Any] | None) -> None:
    """Write config.yaml, unless it is the same but for the keys of how the run was started."""
    file = folder / "config.yaml"
    body = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    plain = yaml.safe_load(body)  # as the file is read: tuples became lists
    if file.exists():
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            found = None
        kept = plain.keys() - _OF_A_START
        if isinstance(found, dict) and all(found.get(key) == plain[key] for key in kept):
            return
        step = saved["step"] if saved is not None else 0
        file.replace(folder / f"config_until_{step:09d}.yaml")
    header = _HEADER.format(folder=shlex.quote(str(folder.absolute())))
    file.write_text(header + body, encoding="utf-8")


_locks: dict[Path, int] = {}
"""Folders that this process has, with open handles; the system unlocks them when it ends."""


def _lock(folder: Path) -> None:
    """Lock a folder until this process ends, even if killed; raise InputError if another has it."""
    # A second handle on the same file would not get the lock that this process itself holds.
    if os.name != "posix" or folder.absolute() in _locks:
        return
    # Not truncated, so that the owner can be read. Programs that are executed do not inherit it;
    # they would hold the lock beyond the end of the run.
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
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
