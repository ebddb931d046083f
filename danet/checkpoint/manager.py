"""Which checkpoints a run keeps, when one is due, and what a failed write means."""

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import danet
from danet.checkpoint import format as checkpoint_format
from danet.checkpoint import reading
from danet.distributed import collectives
from danet.distributed.signals import FAIL, SAVE
from danet.errors import InputError, StorageError
from danet.filesystem import atomic_write

if TYPE_CHECKING:
    from danet.engine.settings import TrainSettings


def path_at(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / f"step_{step:09d}.pt"


def steps_of(folder: Path) -> dict[int, Path]:
    """Return the numbered checkpoints of a run by their steps, the first one first."""
    paths = sorted(p for p in folder.glob("step_*.pt") if re.fullmatch(r"step_\d{9}", p.stem))
    return {int(path.stem.removeprefix("step_")): path for path in paths}


def by_age(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, latest step first: ``last.pt`` leads, ``best.pt`` is last.

    The order is that of the steps and not of the clock, which may have been set back.
    """
    steps = reversed(steps_of(folder).values())
    return [p for p in (folder / "last.pt", *steps, folder / "best.pt") if p.exists()]


def add_temperature(path: Path, temperature: float, *, step: int) -> list[Path]:
    """Write a temperature into a checkpoint of a step; return the names of the file in its folder.

    All of them have it. A checkpoint of another step raises InputError.
    """
    path = path.resolve()  # a symbolic link stays
    names = [p for p in by_age(path.parent) if p.samefile(path) and not p.is_symlink()]
    content, _ = reading.read(path, "checkpoint")
    if content["step"] != step:
        raise InputError(
            f"checkpoint={path}: its training replaced it meanwhile; start again when that has "
            "ended"
        )
    checkpoint_format.save(path, {**content, "temperature": temperature})
    for name in names:
        if name != path:
            _link(path, name)
    return names or [path]


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of other processes from a folder that this one has locked."""
    for path in folder.glob(".*.pt.*.tmp"):  # names of atomic_write, with the id of the process
        # With the lock no other process writes here: whatever wrote this has been killed.
        if not path.name.endswith(f".{os.getpid()}.tmp"):
            with suppress(OSError):  # a leftover costs space, and no more
                path.unlink()


def set_aside(path: Path, name: str) -> Path:
    """Move a checkpoint to the folder ``abandoned``, under a name."""
    aside = path.parent / "abandoned" / name
    aside.parent.mkdir(exist_ok=True)
    return path.replace(aside)  # not removed: other names of this file may be gone


@dataclass(eq=False, repr=False)
class CheckpointManager:
    """Writes the checkpoints of a run into its folder, on rank 0; other ranks write nothing.

    Every checkpoint is ``step_<step>.pt``. ``last.pt`` is the newest and ``best.pt`` the one with
    the best score: hard links, or else copies. A name always stands for a whole file. When a run
    was resumed from an older step, checkpoints of later steps are moved to ``abandoned``.

    A failed write never ends the run on the spot, since the other ranks would wait for this one:
    it is kept, and ``status`` raises a flag that all ranks obey at the same step.
    """

    folder: Path  # of the run
    policy: "TrainSettings"  # when to save and what to keep
    _: KW_ONLY
    metadata: Mapping[str, Any] = field(default_factory=dict)  # entries of every checkpoint
    best: Sequence[tuple[float, int]] = ()  # scores and steps so far, from a resumed run
    warn: Callable[[str], None] = print  # for each failed write that stops nothing

    def __post_init__(self) -> None:
        # A checkpoint that was deleted or moved must not keep later ones from being the best.
        self.best = [(x, step) for x, step in self.best if path_at(self.folder, step).exists()]
        self._only_warns = self.policy.on_storage_error == "warn"
        # A thread is enough, since hashing and writing release the GIL; one keeps the order.
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._last_save = time.monotonic()
        self._error: StorageError | None = None
        """Why the newest checkpoint is not on the disk, or why the run must stop."""

    def due(self, step: int) -> bool:
        """Return whether ``save_every`` asks for a checkpoint of this step."""
        return self.policy.save_every is not None and step % self.policy.save_every == 0

    def status(self) -> int:
        """Return FAIL if the run must stop, and SAVE if ``save_minutes`` have passed."""
        if not collectives.is_first():
            return 0
        # Only a write that is done is collected: this is called at every step and must not wait.
        if self._pending is not None and self._pending.done():
            self._collect()
        flags = FAIL if self._error is not None and not self._only_warns else 0
        minutes = self.policy.save_minutes
        if minutes is not None and time.monotonic() - self._last_save >= 60 * minutes:
            # Not left to save(): ranks agree on a flag one step later, and until then this one
            # would be raised again.
            self._last_save = time.monotonic()
            flags |= SAVE
        return flags

    def save(self, state: Mapping[str, Any], *, score: float | None = None) -> None:
        """Write a checkpoint, in the background if the policy says so.

        In the background the tensors are copied first, so the next step may change them; one write
        is under way at a time. Failures are reported by ``status`` and ``finish``. The entry
        ``step`` of the state names the file; without evaluation there is no score.
        """
        if not collectives.is_first():
            return
        self._collect()  # at most one copy of the state is in memory
        if self._only_warns:
            self._error = None  # what failed before is not the newest checkpoint any more
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
        if self.policy.save_in_background:
            # The optimizer changes parameters in place, so without a copy the file would mix the
            # tensors of two steps.
            content = tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), content)
        self._pending = self._thread.submit(self._write, content, step, is_best)
        if not self.policy.save_in_background:
            self._collect()

    def finish(self) -> StorageError | None:
        """Wait for the write under way; return why the newest checkpoint is not on the disk."""
        self._collect(warn=False)
        error, self._error = self._error, None
        return error

    def close(self) -> None:
        """Wait for the write under way, and end the thread."""
        try:
            if error := self.finish():
                self.warn(str(error))
        finally:
            self._thread.shutdown()

    def _rank(self, step: int, score: float | None) -> bool:
        """Enter a score into ``best``; return whether it is the best, which NaN never is."""
        # A step may be saved twice: before its evaluation, which may fail, and with its score after
        # it; its own earlier entry must not count against it.
        others = [pair for pair in self.best if pair[1] != step]
        if score is None or not math.isfinite(score):
            return False
        merit = self.policy.merit
        ranked = sorted([*others, (score, step)], key=lambda pair: (-merit(pair[0]), pair[1]))
        self.best = ranked[: self.policy.keep_best]
        return not others or merit(score) > merit(others[0][0])

    def _collect(self, *, warn: bool = True) -> None:
        """Wait for the write under way; keep its failure, and warn if it does not stop the run."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except OSError as error:
            text = f"{self.folder}: a checkpoint could not be written ({error})"
            self._error = error if isinstance(error, StorageError) else StorageError(text)
            if self._only_warns and warn:
                self.warn(f"{self._error}; the training goes on (trainer.on_storage_error=warn)")

    def _write(self, content: checkpoint_format.Checkpoint, step: int, is_best: bool) -> None:
        path, best = path_at(self.folder, step), self.folder / "best.pt"
        # In this order a kill at any point leaves last.pt and best.pt whole: pruning comes last.
        checkpoint_format.save(path, content)
        _link(path, self.folder / "last.pt")
        steps = steps_of(self.folder)
        later = [steps.pop(other) for other in list(steps) if other > step]
        if is_best or (later and self.best):
            _link(path_at(self.folder, self.best[0][1]), best)
        elif later and best.exists():
            set_aside(best, best.name)
        for abandoned in later:
            set_aside(abandoned, abandoned.name)  # else resume=auto would take it
        best_steps = [of for _, of in self.best]
        newest, every = list(steps)[-self.policy.keep_last :], self.policy.keep_every
        for other, file in steps.items():
            is_milestone = every is not None and other % every == 0
            if not (other in newest or is_milestone or other in best_steps):
                # The data stays as long as best.pt or last.pt is a hard link to it.
                with suppress(OSError):
                    file.unlink()


def _link(path: Path, name: Path) -> None:
    """Make ``name`` another name of the file ``path``, replacing its old target atomically."""
    with atomic_write(name, durable=True) as temporary:
        # A leftover of an earlier process with this id may itself be a hard link to a checkpoint,
        # and the copy below would then write into that checkpoint.
        temporary.unlink(missing_ok=True)
        try:
            # A hard link takes no space and no time, and unlike a symbolic link it still holds the
            # data when the step is pruned, and can be copied to another folder.
            os.link(path, temporary)
        except OSError:  # FAT, and some network and container file systems, have no hard links
            shutil.copyfile(path, temporary)
