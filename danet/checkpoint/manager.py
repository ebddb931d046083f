"""Which checkpoints a run keeps, and writing them while the training goes on."""

import os
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from danet.checkpoint import format as checkpoint_format
from danet.errors import StorageError

_STEP = re.compile(r"step_(\d{9})\.pt")
_TEMPORARY = re.compile(r"\.(?:last|best|step_\d{9})\.pt\.(\d+)\.tmp")


def path_at(folder: Path, step: int) -> Path:
    """Returns where the checkpoint of a step lies."""
    return folder / f"step_{step:09d}.pt"


def by_age(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run, newest step first, whatever the clock said.

    ``last.pt`` comes first; ``best.pt`` comes last, since its name does not tell its step.
    """
    steps = sorted((p for p in folder.glob("step_*.pt") if _STEP.fullmatch(p.name)), reverse=True)
    ends = folder / "last.pt", folder / "best.pt"
    return [*(p for p in ends[:1] if p.exists()), *steps, *(p for p in ends[1:] if p.exists())]


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files of processes that are no more."""
    for path in folder.glob(".*.pt.*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and not _is_alive(int(match[1])):
            with suppress(OSError):
                path.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def set_aside_best(folder: Path, step: int) -> Path | None:
    """Moves ``best.pt`` to the folder ``abandoned``: scores from here on do not compare with its.

    Args:
        folder: Of the run.
        step: From which the run goes on; ends the name.

    Returns:
        Where it is now; None where there was none.

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


class Saver:
    """Writes the checkpoints of a run into its folder.

    Every checkpoint is ``step_<step>.pt``; ``last.pt`` is the newest and ``best.pt`` the one with
    the best score: further names of the same file (hard links) where the file system has such, else
    copies. A name always stands for a whole file. Checkpoints of later steps, of an attempt before
    a run was resumed from an older one, go to the folder ``abandoned``.

    Args:
        folder: Of the run.
        keep_last: How many of the newest to keep, at least 1.
        keep_best: How many of the best to keep, at least 1.
        keep_every: Keep those whose step is a multiple of it for ever; None for none.
        in_background: Return after the state was copied, and write it in a thread.
        best: (score, step) of the best so far, from a resumed run; of those that are still there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        keep_every: int | None = None,
        in_background: bool = False,
        best: list[tuple[float, int]] | None = None,
    ) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.keep_every = keep_every
        self.best = [pair for pair in best or [] if path_at(folder, pair[1]).exists()]
        self._thread = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._pending: Future[None] | None = None

    def save(self, state: Mapping[str, Any], *, step: int, score: float | None) -> None:
        """Writes the state of a step.

        In the background the state is copied first, so that the training may change it at once; one
        checkpoint is under way at a time.

        Args:
            state: See danet.checkpoint.format.
            step: Updates done.
            score: Of the evaluation at this step, higher is better; None where there was none.

        Raises:
            StorageError: This checkpoint, or the one before in the background, was not written.
        """
        self.wait()
        others = [pair for pair in self.best if pair[1] != step]  # a step may be saved again
        is_best = score is not None and (not others or score > others[0][0])
        if score is not None:
            ranked = sorted([*others, (score, step)], key=lambda pair: (-pair[0], pair[1]))
            self.best = ranked[: self.keep_best]
        content = {**state, "best": [list(pair) for pair in self.best]}
        if self._thread is None:
            self._write(content, step, is_best)
        else:
            self._pending = self._thread.submit(self._write, _copied(content), step, is_best)

    def is_done(self) -> bool:
        """Tells whether something was under way and has ended; ``wait`` will not wait for it."""
        return self._pending is not None and self._pending.done()

    def wait(self) -> None:
        """Returns when nothing is under way.

        Raises:
            StorageError: What was under way was not written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

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
        """Moves checkpoints of later steps away; ``best.pt`` is of the steps that are left."""
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
        """Removes the checkpoints that no rule keeps."""
        best = {step for _, step in self.best}
        steps = self._steps()
        newest = sorted(steps)[-self.keep_last :]
        for step, path in steps.items():
            is_kept_for_ever = self.keep_every is not None and step % self.keep_every == 0
            if not (step in newest or step in best or is_kept_for_ever):
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
