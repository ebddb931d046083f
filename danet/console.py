"""Console output whose failures do not end the program.

Results are in files; what is printed is only for people. So a closed pipe, as of ``| head``, a log
on a full disk, a closed terminal or a stream that was never open cost the printed lines and nothing
else.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)
"""Permanent errors of a stream; a full disk is not among them, it may have room later."""


class Console:
    """A text stream that never raises when it is written.

    Args:
        stream: The stream behind it, such as ``sys.stdout``.
        name: Of the stream, for messages.

    Attributes:
        failure: Why a write failed first, for a log; empty if none did.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self.failure = ""

    def write(self, text: str) -> int:
        """Write text; characters that the encoding lacks are escaped."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._fail(error)

    def close_quietly(self) -> None:
        """Flush the stream or drop its buffer, so that Python does not fail over it at exit."""
        self.flush()
        if self.failure:
            self._drop()
            with suppress(OSError, ValueError):
                self._stream.flush()

    def _fail(self, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        self.failure = self.failure or f"{self._name} could not be written ({reason})"
        if isinstance(error, OSError) and error.errno in _GONE:
            self._drop()

    def _drop(self) -> None:
        """Redirect the descriptor to the null device, for libraries and child processes, too."""
        with suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unbreakable() -> Iterator[None]:
    """Replace ``sys.stdout`` and ``sys.stderr`` by streams that never raise."""
    for number in range(3):  # else the next file opened gets the number and output of libraries
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    streams = []
    for stream, name in zip(before, ("standard output", "standard error"), strict=True):
        is_open = stream is not None
        null = None if is_open else open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
        streams.append(Console(null or stream, name))
        if not is_open:
            streams[-1].failure = f"{name} was closed at the start"
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in streams:
            stream.close_quietly()
        sys.stdout, sys.stderr = before


def failure() -> str:
    """Return why the console could not be written; empty if it could."""
    found = (getattr(stream, "failure", "") for stream in (sys.stdout, sys.stderr))
    return "; ".join(text for text in found if text)
