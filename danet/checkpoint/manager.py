"""Which checkpoints a run keeps, when one is due, and what a failed write means."""

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import danet
from danet.checkpoint import format as checkpoint_format
from danet.distributed import collectives
from danet.distributed.failures import is_alive
from danet.distributed.signals import FAIL, SAVE
from danet.errors import StorageError

_STEP = re.compile(r"step_(\d{9})\.pt")
_TEMPORARY = re.compile(r"\.(?:last|best|step_\d{9})\.pt\.(\d+)\.tmp")


def path_at(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / f"step_{step:09d}.pt"


def by_age(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, latest step first.

    ``last.pt`` comes first; ``best.pt`` comes last, since its name does not hold its step. The
    order is that of the steps and not of the clock, which may have been set back.
    """
    steps = sorted((p for p in folder.glob("step_*.pt") if _STEP.fullmatch(p.name)), reverse=True)
    ends = folder / "last.pt", folder / "best.pt"
    return [*(p for p in ends[:1] if p.exists()), *steps, *(p for p in ends[1:] if p.exists())]


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of processes that no longer run."""
    for path in folder.glob(".*.pt.*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and not is_alive(int(match[1])):
            with suppress(OSError):
                path.unlink()


def set_aside_best(folder: Path, step: int) -> Path | None:
    """Move ``best.pt`` to the folder ``abandoned``, since later scores do not compare with its own.

    Args:
        folder: Of the run.
        step: From which the run is resumed; part of the new name.

    Returns:
        The new path; None if there was no ``best.pt``.

    Raises:
        StorageError: It cannot be moved.
    """
    best, aside = folder / "best.pt", folder / "abandoned" / f"best_before_step_{step:09d}.pt"
    if not best.exists():
        return None
    try:
        aside.parent.mkdir(exist_ok=True)
        return best.replace(aside)
    except OSError as error:
        raise StorageError(f"{aside}: could not be written ({error.strerror})") from error


class CheckpointPolicy(Protocol):
    """Settings of the group ``trainer`` that say when to save and what to keep."""

    save_every: int | None
    save_minutes: float | None
    keep_last: int
    keep_best: int
    keep_every: int | None
    save_in_background: bool
    on_storage_error: str


class CheckpointManager:
    """Writes the checkpoints of a run into its folder, on rank 0; other ranks write nothing.

    Every checkpoint is ``step_<step>.pt``. ``last.pt`` is the newest and ``best.pt`` the one with
    the best score: hard links where the file system has them, else copies. A name always stands for
    a whole file. When a run was resumed from an older step, checkpoints of later steps are moved to
    the folder ``abandoned``.

    A failed write never ends the run on the spot, since the other ranks would wait for this one:
    it is kept, and ``status`` raises a flag that all ranks obey at the same step.

    Args:
        folder: Of the run.
        policy: When to save and what to keep.
        metadata: Entries of every checkpoint, such as the config.
        best: (score, step) of the best so far, from a resumed run.
        warn: Called with one line for each failed write that stops nothing.
    """

    def __init__(
        self,
        folder: Path,
        policy: CheckpointPolicy,
        *,
        metadata: Mapping[str, Any] | None = None,
        best: Iterable[tuple[float, int]] = (),
        warn: Callable[[str], None] = print,
    ) -> None:
        self.folder = folder
        self.policy = policy
        self.metadata = dict(metadata or {})
        # A checkpoint that was deleted or moved must not keep later ones from being the best.
        self.best = [(score, step) for score, step in best if path_at(folder, step).exists()]
        self._warn = warn
        self._thread = ThreadPoolExecutor(1, "checkpoint") if policy.save_in_background else None
        self._pending: Future[None] | None = None
        self._last_save = time.monotonic()
        self._unsaved: StorageError | None = None
        """Why the newest checkpoint is not on the disk."""
        self._fatal: StorageError | None = None
        """The failure that stops the run."""

    def due(self, step: int) -> bool:
        """Return whether ``save_every`` asks for a checkpoint of this step."""
        return self.policy.save_every is not None and step % self.policy.save_every == 0

    def status(self) -> int:
        """Return FAIL if the run must stop, and SAVE if ``save_minutes`` have passed."""
        if not collectives.is_first():
            return 0
        if self._pending is not None and self._pending.done():
            self._handle(self._wait())
        flags = FAIL if self._fatal is not None else 0
        minutes = self.policy.save_minutes
        if minutes is not None and time.monotonic() - self._last_save >= 60 * minutes:
            self._last_save = time.monotonic()
            flags |= SAVE
        return flags

    def save(self, state: Mapping[str, Any], *, score: float | None = None) -> None:
        """Write a checkpoint, in the background if the policy says so.

        In the background the tensors are copied first, so the next step may change them; one write
        is under way at a time. Failures are reported by ``status`` and ``finish``.

        Args:
            state: Entries of the checkpoint; ``step`` names the file.
            score: Of the evaluation at this step, higher is better; None without evaluation.
        """
        if not collectives.is_first():
            return
        self._handle(self._wait())
        self._unsaved = None
        self._last_save = time.monotonic()
        step = state["step"]
        is_best = self._rank(step, score)
        content = {
            "format": checkpoint_format.FORMAT,
            "version": danet.__version__,
            **self.metadata,
            **state,
            "processes": collectives.world_size(),
            "threads": torch.get_num_threads(),
            "best": [list(pair) for pair in self.best],
        }
        if self._thread is not None:
            self._pending = self._thread.submit(self._write, _copied(content), step, is_best)
            return
        try:
            self._write(content, step, is_best)
        except StorageError as error:
            self._handle(error)

    def finish(self) -> StorageError | None:
        """Wait for the write under way; return why the newest checkpoint is not on the disk."""
        error = self._wait()
        if error is not None:
            self._unsaved = error
        error = self._fatal or self._unsaved
        self._fatal = self._unsaved = None
        return error

    def close(self) -> None:
        """Wait for the write under way, and end the thread."""
        try:
            if (error := self.finish()) is not None:
                self._warn(str(error))
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    def _rank(self, step: int, score: float | None) -> bool:
        """Enter a score into ``best``; return whether it is the highest."""
        others = [pair for pair in self.best if pair[1] != step]  # a step may be saved twice
        if score is None:
            return False
        ranked = sorted([*others, (score, step)], key=lambda pair: (-pair[0], pair[1]))
        self.best = ranked[: self.policy.keep_best]
        return not others or score > others[0][0]

    def _wait(self) -> StorageError | None:
        """Wait for the write under way; return its failure."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except StorageError as error:
            return error
        return None

    def _handle(self, error: StorageError | None) -> None:
        """Keep a failure that stops the run, or warn of one that does not."""
        if error is None:
            return
        self._unsaved = error
        if self.policy.on_storage_error == "warn":
            self._warn(f"{error}; the training goes on (trainer.on_storage_error=warn)")
        else:
            self._fatal = error

    def _write(self, content: checkpoint_format.Checkpoint, step: int, is_best: bool) -> None:
        path = path_at(self.folder, step)
        checkpoint_format.save(path, content)
        for name in ("last.pt", *["best.pt"] * is_best):
            _link(path, self.folder / name)
        self._set_aside_after(step)
        self._prune()

    def _steps(self) -> dict[int, Path]:
        return {
            int(match[1]): path
            for path in self.folder.glob("step_*.pt")
            if (match := _STEP.fullmatch(path.name))
        }

    def _set_aside_after(self, now: int) -> None:
        """Move checkpoints of later steps away; point ``best.pt`` to one of the remaining."""
        later = [path for step, path in self._steps().items() if step > now]
        if not later:
            return
        aside, best = self.folder / "abandoned", self.folder / "best.pt"
        try:
            aside.mkdir(exist_ok=True)
            for path in later:
                path.replace(aside / path.name)
            if not self.best and best.exists():
                best.replace(aside / best.name)
        except OSError as error:
            raise StorageError(f"{aside}: could not be written ({error.strerror})") from error
        if self.best:
            _link(path_at(self.folder, self.best[0][1]), best)

    def _prune(self) -> None:
        """Remove the checkpoints that no rule keeps."""
        policy, steps = self.policy, self._steps()
        best = {step for _, step in self.best}
        newest = sorted(steps)[-policy.keep_last :]
        for step, path in steps.items():
            is_milestone = policy.keep_every is not None and step % policy.keep_every == 0
            if not (step in newest or step in best or is_milestone):
                with suppress(OSError):
                    path.unlink()


def _link(path: Path, name: Path) -> None:
    """Makes ``name`` stand for the file ``path``, replacing what it stood for in one move."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    try:
        with suppress(FileNotFoundError):
            temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            with open(path, "rb") as source, open(temporary, "wb") as target:
                while block := source.read(1 << 22):
                    target.write(block)
                target.flush()
                os.fsync(target.fileno())
        temporary.replace(name)
        checkpoint_format.sync_folder(name.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise StorageError(f"{name}: could not be written ({error.strerror})") from error


def _copied(content: Any) -> Any:
    """Returns a state whose tensors are copies on the CPU, those of one storage shared no more."""

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        return value.clone() if value.device.type == "cpu" else value.to("cpu")

    with torch.no_grad():
        return tree_map(copy, content)
