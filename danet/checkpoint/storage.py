"""What becomes of a run whose checkpoints cannot be written: it stops, or goes on and says so."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from danet.checkpoint.manager import Saver
from danet.errors import StorageError

FAILED = 4
"""Flag between the processes, beside those of the signals: the run must stop for its storage."""


class Storage:
    """Hands checkpoints to a Saver and keeps its failures until the processes agree on them.

    Args:
        saver: Of the run.
        policy: ``stop`` ends the run at the next step, ``warn`` goes on; the last checkpoint must
            be written in either case.
        warn: Is given a line for every failure that stops nothing.

    Attributes:
        failure: What stops the run; None while nothing does.
    """

    def __init__(self, saver: Saver, policy: str, warn: Callable[[str], None]) -> None:
        self.saver = saver
        self.policy = policy
        self.warn = warn
        self.failure: StorageError | None = None
        self._unsaved: StorageError | None = None
        self._since = time.monotonic()

    def falls_due(self, minutes: float | None) -> bool:
        """Tells whether nothing was saved for so long; once, then it counts from now."""
        if minutes is None or time.monotonic() - self._since < 60 * minutes:
            return False
        self._since = time.monotonic()
        return True

    def save(self, state: Mapping[str, Any], *, step: int, score: float | None) -> None:
        """Writes or begins to write; a failure is told by ``flags`` or ``finish``."""
        self._note(self._wait())
        self._unsaved = None
        self._since = time.monotonic()
        try:
            self.saver.save(state, step=step, score=score)
        except StorageError as error:
            self._note(error)

    def flags(self) -> int:
        """Returns FAILED when the run must stop, without waiting for what is under way."""
        if self.saver.is_done():
            self._note(self._wait())
        return FAILED if self.failure is not None else 0

    def finish(self) -> StorageError | None:
        """Waits; returns why the latest checkpoint is not on the disk, None where it is."""
        error = self._wait()
        if error is not None:
            self._unsaved = error
        error = self.failure or self._unsaved
        self.failure = self._unsaved = None
        return error

    def _wait(self) -> StorageError | None:
        try:
            self.saver.wait()
        except StorageError as error:
            return error
        return None

    def _note(self, error: StorageError | None) -> None:
        if error is None:
            return
        self._unsaved = error
        if self.policy == "warn":
            self.warn(f"{error}; the training goes on (trainer.on_storage_error=warn)")
        else:
            self.failure = error
