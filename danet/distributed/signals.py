"""Signals as requests: a run ends or saves between two steps, not in the middle of one."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

STOP = 1  # SIGTERM, SIGINT or SIGHUP: save, then end. Once more ends the process at once.
SAVE = 2  # SIGUSR1: save and continue
FAIL = 4  # no signal, but a flag exchanged beside them: a checkpoint could not be written, so end

# Slurm and systemd send SIGTERM to every process of a job, and torchrun then sends it again to its
# workers; likewise the SIGINT of a terminal, which the workers have received already.
SAME = 5.0  # seconds within which a further SIGTERM or SIGHUP is a copy of the same request
_REQUESTS = {signal.SIGTERM: STOP, signal.SIGINT: STOP}
if hasattr(signal, "SIGUSR1"):  # not on Windows
    _REQUESTS |= {signal.SIGUSR1: SAVE, signal.SIGHUP: STOP}


class Stop(Exception):
    """Ends a training between two steps, or an evaluation anywhere."""


class Signals(ExitStack):
    """Collects requests within a block; ``name`` is that of the signal that asked for the stop."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self._requests, self._since = "", 0, 0.0
        self._raises_stop = False
        for number in _REQUESTS:
            # An ignored signal stays ignored: nohup does that to SIGHUP, and a shell to the SIGINT
            # of what it starts in the background.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.callback(signal.signal, number, signal.signal(number, self._on_signal))

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        request, has_stop = _REQUESTS[signal.Signals(number)], bool(self._requests & STOP)
        self._requests |= request
        if request != STOP:
            return
        if has_stop:
            # Outside torchrun a second SIGINT is a second Ctrl-C.
            may_be_copy = number != signal.SIGINT or "TORCHELASTIC_RUN_ID" in os.environ
            if may_be_copy and time.monotonic() - self._since < SAME:
                return
            # Nothing is lost: checkpoints are renamed into place, so the one of before is whole.
            os._exit(128 + number)  # the code that a shell gives for this signal
        self.name, self._since = signal.Signals(number).name, time.monotonic()
        # Raised out of the handler, between two bytecodes of whatever the main thread executes.
        if self._raises_stop:
            raise Stop

    def take(self) -> int:
        """Return the requests so far, as bits, and clear a request to save."""
        requests = self._requests
        self._requests &= ~SAVE  # STOP stays: a second signal must find it
        return requests

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Stop at once for a request to stop, in code that may be interrupted anywhere."""
        if self._requests & STOP:
            raise Stop
        self._raises_stop = True
        try:
            yield
        finally:
            self._raises_stop = False


def follow_parent() -> None:
    """Ask Linux for SIGTERM when the launcher dies; to be called first, while it is alive."""
    # After a SIGKILL of torchrun its workers would live on, and hold the GPUs.
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
        parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)
