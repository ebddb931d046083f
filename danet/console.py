"""Console output whose failures do not end the program.

Results are in files; what is printed is only for people. So a closed pipe, as of ``| head``, a log
on a full disk, a closed terminal or a stream that was never open cost the printed lines from there
on and nothing else.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Console:
    """A text stream that never raises when it is written; its name is for messages."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self.failure = ""  # why a write failed first, for a log

    def write(self, text: str) -> int:
        """Write text; characters that the encoding lacks are escaped."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        """Redirect the descriptor to the null device, for libraries and child processes, too."""
        reason = error.strerror if isinstance(error, OSError) else str(error)
        self.failure = self.failure or f"{self._name} could not be written ({reason})"
        with suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._stream.flush()  # else Python would do it at exit

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
        # A stream that was closed at the start is None; the null device stays open until the end.
        streams.append(Console(stream or open(os.devnull, "w"), name))  # noqa: SIM115
        if stream is None:
            streams[-1].failure = f"{name} was closed at the start"
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for console in streams:
            console.flush()
        sys.stdout, sys.stderr = before


def failure() -> str:
    """Return why the console could not be written; empty if it could."""
    found = (getattr(stream, "failure", "") for stream in (sys.stdout, sys.stderr))
    return "; ".join(text for text in found if text)
