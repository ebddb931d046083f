"""Signals as requests: a run ends or saves between two steps, not in the middle of one."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP = 1
"""SIGTERM or SIGINT: save, then end. Once more ends the process at once."""
SAVE = 2
"""SIGUSR1: save, and go on."""

SAME = 5.0
"""Seconds within which a further SIGTERM is the same request: Slurm and systemd send it to every
process of a job, and torchrun then sends it to its workers again."""

_REQUESTS = {signal.SIGTERM: STOP, signal.SIGINT: STOP}
if hasattr(signal, "SIGUSR1"):  # not on Windows
    _REQUESTS[signal.SIGUSR1] = SAVE


class Stop(Exception):
    """Ends a training between two steps, or an evaluation anywhere."""


class Signals:
    """Collects requests while it is entered; the handlers of before return afterwards.

    Attributes:
        name: Of the signal that asked for the stop, for messages.
    """

    def __init__(self) -> None:
        self.name = ""
        self._requests = 0
        self._since = 0.0
        self._is_at_once = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        for number in _REQUESTS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        request = _REQUESTS[signal.Signals(number)]
        if request == STOP and self._requests & STOP:
            if number == signal.SIGTERM and time.monotonic() - self._since < SAME:
                return
            # Nothing is lost: checkpoints are renamed into place, so the one of before is whole.
            os._exit(128 + number)
        if request == STOP:
            self.name = signal.Signals(number).name
            self._since = time.monotonic()
        self._requests |= request
        if request == STOP and self._is_at_once:
            raise Stop

    def take(self) -> int:
        """Returns the requests that came, as bits; a request to save is forgotten with that."""
        requests = self._requests
        self._requests &= ~SAVE
        return requests

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Lets a request to stop raise Stop within, where nothing can be torn.

        Raises:
            Stop: One came, now or before.
        """
        if self._requests & STOP:
            raise Stop
        self._is_at_once = True
        try:
            yield
        finally:
            self._is_at_once = False


def follow_parent() -> None:
    """Asks the system for SIGTERM when the launcher dies, which torchrun's workers outlive else.

    To be called first of all: a launcher that died before is not noticed. Linux only; elsewhere
    nothing happens.
    """
    if sys.platform != "linux" or "LOCAL_RANK" not in os.environ:
        return
    parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)
