"""Signals as requests: a run ends or saves between two steps, not in the middle of one."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP = 1
"""SIGTERM, SIGINT or SIGHUP: save, then end. Once more ends the process at once."""
SAVE = 2
"""SIGUSR1: save, and go on."""
FAIL = 4
"""No signal, but a flag exchanged beside them: a checkpoint could not be written, so end."""

SAME = 5.0
"""Seconds within which a further SIGTERM or SIGHUP is the same request: Slurm and systemd send it
to every process of a job, and torchrun then sends it to its workers again. So torchrun does with
the SIGINT of a terminal, which its workers have had already."""

_REQUESTS = {signal.SIGTERM: STOP, signal.SIGINT: STOP}
if hasattr(signal, "SIGUSR1"):  # not on Windows
    _REQUESTS |= {signal.SIGUSR1: SAVE, signal.SIGHUP: STOP}


class Stop(Exception):
    """Ends a training between two steps, or an evaluation anywhere."""


@contextmanager
def handled(
    handler: Callable[[int, FrameType | None], None], requests: int = STOP | SAVE
) -> Iterator[None]:
    """Send signals to a handler that mean one of the requests; those of before return afterwards.

    A signal that was ignored at the start stays so: nohup does that with SIGHUP, a shell with the
    SIGINT of what it starts in the background.
    """
    before = {
        number: signal.signal(number, handler)
        for number, request in _REQUESTS.items()
        if request & requests and signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Signals:
    """Collects requests while it is entered; see ``handled``.

    Attributes:
        name: Of the signal that asked for the stop, for messages.
    """

    def __init__(self) -> None:
        self.name = ""
        self._requests = 0
        self._since = 0.0
        self._is_at_once = False

    def __enter__(self) -> "Signals":
        self._handled = handled(self._note)
        self._handled.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handled.__exit__(None, None, None)

    def _note(self, number: int, _: FrameType | None) -> None:
        request = _REQUESTS[signal.Signals(number)]
        if request == STOP and self._requests & STOP:
            is_passed_on = number != signal.SIGINT or "TORCHELASTIC_RUN_ID" in os.environ
            if is_passed_on and time.monotonic() - self._since < SAME:
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


def is_in_foreground() -> bool:
    """Return whether a terminal sends its signals to this process and those in its group."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except (OSError, AttributeError):  # no terminal, or Windows
        return False


def follow_parent() -> None:
    """Asks the system for SIGTERM when the launcher dies, which torchrun's workers outlive else.

    To be called first of all: a launcher that died before is not noticed. Linux only; elsewhere
    nothing happens.
    """
    if sys.platform != "linux" or "LOCAL_RANK" not in os.environ:
        return
    parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)
