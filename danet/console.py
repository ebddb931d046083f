"""The console as something that may fail: a closed pipe or a full disk ends no work.

What a program prints is for people; what it makes is in files. So a reader that goes away, as in
``| head``, a log on a full disk, a terminal that was closed or a stream that was never open cost
the printed lines and nothing else.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)
"""Errors after which a stream will never be written again; a full disk may have room later."""


class Console:
    """A text stream whose failures raise nothing.

    Args:
        stream: What is written to, such as ``sys.stdout``.
        name: Of the stream, for messages.

    Attributes:
        failure: Why something could not be written, for a log; empty while all could.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self.failure = ""

    def write(self, text: str) -> int:
        """Write text; letters that the encoding does not have are escaped."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Write what is pending."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._fail(error)

    def close_quietly(self) -> None:
        """Write what is pending or drop it, so that Python does not fail over it at its end."""
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
        """Send all that is written from now on to nowhere, by libraries and children, too."""
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unbreakable() -> Iterator[None]:
    """Let nothing inside fail for the sake of ``sys.stdout`` and ``sys.stderr``."""
    for number in range(3):  # else the next file opened gets the number, and what libraries print
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    streams = []
    for stream, name in zip(before, ("standard output", "standard error"), strict=True):
        is_open = stream is not None
        nowhere = None if is_open else open(os.devnull, "w")  # noqa: SIM115 - as long as the process
        streams.append(Console(nowhere or stream, name))
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
    """Return why the console could not be written; empty while it could."""
    found = (getattr(stream, "failure", "") for stream in (sys.stdout, sys.stderr))
    return "; ".join(text for text in found if text)
